"""The operations of a model's forward that hold for training and evaluation and for every batch size.

The forward is recorded three times: in training, in evaluation, and with another number of rows. What differs
between the recordings is a plain value that depends on the mode (the layer then asks for its module's), or refused.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn

from rpcpipe.errors import ArgumentError, ModelError, shown
from rpcpipe.model.microbatch import Batched, MicroBatches, Nest, Replicated, flatten, map_tensors, tensors, unflatten
from rpcpipe.model.splitting.program import ByMode, Operation, Ref, State, items, rebuilt
from rpcpipe.model.splitting.recorder import Recorder, Refused

_ROWS = 4  # of the sample, to record with: as many as are needed to see what depends on their number
_TORCHS = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Recording:
    """A forward: ``operations`` by number, its ``output`` with stand-ins, and what was seen of its tensors.

    ``changed``: names of the parameters and buffers that it changes, and paths of the modules whose attributes it does.
    """

    operations: dict[int, Operation]
    output: Any
    mutations: list[tuple[int, int]]
    storages: dict[Ref, int]
    elements: dict[int, int]
    changed: frozenset[str]


class Sample(NamedTuple):
    """A micro-batch of inputs, and how the model takes them: "one" argument, "positional" ones, or "keywords"."""

    nest: Nest
    style: str

    @classmethod
    def of(cls, model: nn.Module, nest: Nest) -> Sample:
        """Return ``nest`` as the inputs of ``model``; raises ArgumentError if it has no tensors."""
        leaves = flatten(nest)[0]
        if not tensors([_unwrapped(leaf) for leaf in leaves]) or any(isinstance(leaf, MicroBatches) for leaf in leaves):
            raise ArgumentError(
                f"sample must be one micro-batch of the model's inputs, with tensors, not {shown(nest)}"
            )
        signature = inspect.signature(model.forward)
        try:
            if isinstance(nest, Mapping) and all(isinstance(key, str) for key in nest):
                signature.bind(**nest)
                return cls(nest, "keywords")
            if isinstance(nest, tuple):
                signature.bind(*nest)
                return cls(nest, "positional")
        except TypeError:
            pass
        return cls(nest, "one")

    def rows(self, times: int) -> Nest:
        """Return the first few rows of the inputs, all if their tensors have different numbers, ``times`` over."""
        leaves, spec = flatten(self.nest)
        sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
        first = min([*sizes, _ROWS]) if len(sizes) == 1 else None
        return unflatten([_repeated(leaf, times, first) for leaf in leaves], spec)

    def arguments(self, nest: Nest) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the model for the inputs ``nest``."""
        if self.style == "keywords":
            return (), dict(nest)
        return (tuple(nest) if self.style == "positional" else (nest,)), {}

    @property
    def by_key(self) -> bool:
        """Whether layers may take parts of the inputs by their keys."""
        return isinstance(self.nest, Mapping) and all(isinstance(key, str) for key in self.nest)

    @property
    def structured(self) -> bool:
        """Whether it is more than a tensor."""
        return not isinstance(_unwrapped(self.nest), torch.Tensor)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return tensors([_unwrapped(leaf) for leaf in flatten(self.nest)[0]])[0].device


def _unwrapped(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, (Replicated, Batched)) else leaf


def _repeated(leaf: Any, times: int, first: int | None) -> Any:
    match leaf:
        case torch.Tensor():
            return torch.cat([leaf.detach()[:first]] * times) if leaf.dim() else leaf.detach().clone()
        case Replicated():
            return map_tensors(lambda tensor: tensor.detach().clone(), leaf.value)
        case Batched():
            return map_tensors(lambda t: torch.cat([_first_of(t, leaf.dim, first)] * times, leaf.dim), leaf.value)
    return leaf


def _first_of(tensor: torch.Tensor, dim: int, count: int | None) -> torch.Tensor:
    return tensor.detach().narrow(dim, 0, min(count or tensor.shape[dim], tensor.shape[dim]))


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the same parameters; raises ModelError if it cannot be copied."""
    try:
        return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception as error:
        raise ModelError(
            f"the {type(model).__name__} cannot be copied to be run on the sample: {type(error).__name__}: {error};"
            " pass it before its first forward, or as a list of layers"
        ) from error


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Put the global generators of Python and torch back to where they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


def record(model: nn.Module, sample: Sample, closed: frozenset[str]) -> Recording:
    """Return the forward of ``model``, which calls the modules at the paths in ``closed`` whole.

    Raises Refused for a forward that cannot be recorded, or differs with the mode or the number of rows.
    """
    with same_random_numbers(sample.device):
        first = _record(model, sample, closed, rows=2, training=True)
        _agree(first, _record(model, sample, closed, rows=2, training=False), by="mode")
        _agree(first, _record(model, sample, closed, rows=3, training=True), by="rows")
    return first


def _record(model: nn.Module, sample: Sample, closed: frozenset[str], *, rows: int, training: bool) -> Recording:
    model = copied(model)
    for module in model.modules():
        module.training = training
    nest = sample.rows(rows)
    tensors_before = _versions(model)
    attributes = {path: _attributes(module) for path, module in model.named_modules()}
    with torch.set_grad_enabled(training):
        recorder = Recorder(model, closed, sample.device)
        output = recorder.run(*sample.arguments(nest), nest)
    moved = {path for path, module in model.named_modules() if not _same(_attributes(module), attributes[path])}
    for path in sorted(moved):
        if not _inside(path, closed):
            raise _sets_attributes(model, path, attributes[path])
    after = _versions(model)
    changed = {name for name, version in after.items() if tensors_before.get(name) != version}
    return Recording(
        recorder.operations, output, recorder.mutations, recorder.storages, recorder.elements,
        frozenset(changed | moved),
    )  # fmt: skip


def _inside(path: str, closed: frozenset[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:count]) in closed for count in range(1, len(parts) + 1))


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (id(tensor), tensor._version) for name, tensor in named}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what of the module's attributes a forward may set, with what is in its containers."""
    own = {name: value for name, value in vars(module).items() if name not in _TORCHS}
    own |= {name: module.get_buffer(name) for name, buffer in module.named_buffers(recurse=False) if buffer is not None}
    return {name: (value, _content(value)) for name, value in own.items()}


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, (list, set, deque)) else None


def _same(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    if now.keys() != then.keys():
        return False
    return all(_identical(now[name][0], then[name][0]) and _identical(now[name][1], then[name][1]) for name in now)


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_identical, one, other))
    plain = isinstance(one, (int, float, str, bool)) and type(one) is type(other)
    return one is other or (plain and bool(one == other))


def _sets_attributes(model: nn.Module, path: str, before: Mapping[str, Any]) -> Refused:
    module = model.get_submodule(path)
    now = _attributes(module)
    names = [
        name
        for name in {**before, **now}
        if not _same(*({name: one[name]} if name in one else {} for one in (now, before)))
    ]
    scopes = ("", *(".".join(path.split(".")[:count]) for count in range(1, path.count(".") + 2))) if path else ("",)
    code = type(module).forward.__code__
    return Refused(
        f"{code.co_filename}:{code.co_firstlineno}: the forward of {f'{path}, a' if path else 'the'}"
        f" {type(module).__name__}{',' if path else ''} cannot be split: it changes the attribute"
        f" {', '.join(names)}, which its parts on several workers would not see",
        scopes,
    )


# --- what differs between recordings ---


def _agree(first: Recording, other: Recording, *, by: str) -> None:
    """Put into ``first`` what depends on the mode; raise Refused for what differs otherwise.

    Questions about sizes that are asked in one mode alone make no difference if all else is the same.
    """
    pairs = list(zip_longest(_calls(first, by), _calls(other, by)))
    known = _Pairs(first.operations, other.operations, {one: two for one, two in pairs if one and two}, by)
    for index, two_index in pairs:
        one, two = first.operations.get(index), other.operations.get(two_index)
        if one is None or two is None:
            raise _differs(one or two, one or two, by)
        if (one.kind, one.target, one.scopes) != (two.kind, two.target, two.scopes):
            raise _differs(one, two, by)
        if by == "rows":
            _check_rows(one, two)
        try:
            one.args, one.kwargs = known.joined((one.args, one.kwargs), (two.args, two.kwargs), one.scopes[-1])
        except _Different:
            raise _differs(one, two, by) from None
        if one.checks and one.facts["outcome"] != two.facts["outcome"]:
            raise _differs(one, two, by)
    try:
        if known.joined(first.output, other.output, "") != first.output:
            raise _Different
    except _Different:
        raise _differs(None, None, by) from None


def _calls(recording: Recording, by: str) -> list[int]:
    return [number for number, one in recording.operations.items() if by == "rows" or not (one.number or one.checks)]


def _check_rows(one: Operation, two: Operation) -> None:
    """Raise Refused for a branch taken by the number of rows: a smaller last micro-batch may take the other."""
    if not one.checks or one.kind == "fixed":
        return
    moved = [a != b for a, b in zip(one.facts["operands"], two.facts["operands"], strict=True)]
    if any(moved) and not all(moved):
        raise _differs(one, two, "rows")


class _Different(Exception):
    """Two recordings differ."""


class _Pairs(NamedTuple):
    """Two recordings, and which operation of the one is which of the other."""

    first: dict[int, Operation]
    other: dict[int, Operation]
    pairs: dict[int, int]
    by: str

    def joined(self, one: Any, other: Any, scope: str) -> Any:
        """Return the arguments ``one``, with a ByMode where the ``other`` mode has another plain value."""
        if isinstance(one, ByMode):
            if not _equal(one.training, other):
                raise _Different
            return one
        if type(one) is not type(other):
            raise _Different
        if isinstance(one, Ref):
            self._check_same(one, other)
            return one
        if isinstance(one, slice):
            ends = self.joined((one.start, one.stop, one.step), (other.start, other.stop, other.step), scope)
            return slice(*ends)
        if isinstance(one, State) or items(one) is None:
            if _equal(one, other):
                return one
            if self.by == "mode" and not isinstance(one, State):
                return ByMode(scope, one, other)
            raise _Different
        if [key for key, _ in items(one) or ()] != [key for key, _ in items(other) or ()]:
            raise _Different
        parts = dict(items(other) or ())
        return rebuilt(one, lambda key, part: self.joined(part, parts[key], scope))

    def _check_same(self, one: Ref, other: Ref) -> None:
        """Raise _Different unless both are the same value: of paired operations, or the same number."""
        a, b = self.first.get(one.op), self.other.get(other.op)
        if a is not None and b is not None and a.number and b.number and one.op not in self.pairs:
            again = a.target == b.target and self.joined(a.args, b.args, "") == a.args
            if not again or one.path != other.path:
                raise _Different
        elif self.pairs.get(one.op, one.op) != other.op or one.path != other.path:
            raise _Different


def _equal(one: Any, other: Any) -> bool:
    return one is other or bool(one == other) or (one != one and other != other)


def _differs(one: Operation | None, two: Operation | None, by: str) -> Refused:
    scopes: tuple[str, ...] = ("",)
    where = ""
    if one is not None and two is not None:
        pairs = list(zip(one.scopes, two.scopes, strict=False))
        scopes = tuple(a for index, (a, _) in enumerate(pairs) if all(x == y for x, y in pairs[: index + 1]))
        where = f"{one.place}: "
    reason = {
        "mode": "it does other things in training than in evaluation",
        "rows": "what it does depends on the number of rows, which the last micro-batch may have fewer of",
    }[by]
    return Refused(f"{where}the forward of {scopes[-1] or 'the model'} cannot be split: {reason}", scopes)
