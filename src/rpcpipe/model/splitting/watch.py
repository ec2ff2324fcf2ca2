"""What tells a recorder of the calls that a forward makes, and from where."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn


@contextmanager
def told_of_calls(model: nn.Module, told: Callable[..., Any]) -> Iterator[None]:
    """Have ``told(path, call, args, kwargs)`` called in place of every submodule of ``model``, a copy."""
    modules = [(path, module) for path, module in model.named_modules() if module is not model]
    for path, module in modules:
        own = functools.partial(getattr(module, "_call_impl"))  # noqa: B009  (of torch's)
        wrapper = _caller(functools.partial(told, path, own))
        # What module.compile() sets: it is called in place of the forward and all hooks.
        module.__dict__["_compiled_call_impl"] = wrapper
    try:
        yield
    finally:
        for _, module in modules:
            module.__dict__.pop("_compiled_call_impl", None)


def _caller(told: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: told(args, kwargs)


@contextmanager
def told_of_custom_functions(told: Callable[..., Any]) -> Iterator[None]:
    """Have ``told(apply, args, kwargs)`` called in place of ``apply`` of autograd functions, on this thread."""
    original, thread = vars(torch.autograd.Function)["apply"], threading.get_ident()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(original.__func__, cls)
        if threading.get_ident() != thread:
            return own(*args, **kwargs)
        return told(Apply(cls, own), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


class Apply:
    """Calls ``apply`` of an autograd function; ``own`` does so while that of all of them is another."""

    def __init__(self, cls: Any, own: Callable[..., Any] | None = None) -> None:
        self.cls, self._own = cls, own

    @property
    def name(self) -> str:
        """The name of the function's class."""
        return str(self.cls.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._own or self.cls.apply)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Apply) and other.cls is self.cls

    def __hash__(self) -> int:
        return hash(self.cls)

    def __reduce__(self) -> Any:
        return Apply, (self.cls,)


def random_state() -> Any:
    """Return what changes when Python's or numpy's generators are used, or torch's is seeded."""
    numpy = sys.modules.get("numpy")
    drawn = {} if numpy is None else numpy.random.get_state(legacy=False)["state"]
    return random.getstate(), drawn.get("pos"), bytes(drawn.get("key", b"")), torch.initial_seed()


def place(error: BaseException | None = None) -> str:
    """Return file and line of the user's code that is running, or where it raised ``error``."""
    frames: list[tuple[str, int]] = []
    if error is not None:
        trace = error.__traceback__
        while trace is not None:
            frames.insert(0, (trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    own = [(file, line) for file, line in frames if not file.startswith(_NOT_USERS) and not file.startswith("<frozen")]
    file, line = own[0] if own else frames[0]
    return f"{file}:{line}"


_NOT_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_OURS = str(Path(__file__).parents[2])


def depth() -> int:
    """Return how many calls above the caller the code is that called rpcpipe, for a warning's ``stacklevel``."""
    frame: FrameType | None = sys._getframe(1)
    count = 1
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, count = frame.f_back, count + 1
    return count
