"""Whatever a user's code may raise on a worker arrives whole: where, what, its type, and the worker lives."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.models import cross_entropy, sgd


class TwoArguments(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")
        self.left, self.right = left, right

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.left, self.right)


class Unpicklable(ValueError):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class NoString(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class OwnNew(Exception):
    def __new__(cls, one: int, two: int) -> OwnNew:
        return super().__new__(cls)

    def __init__(self, one: int, two: int) -> None:
        super().__init__("made with two")


def two_arguments() -> NoReturn:
    raise TwoArguments(1, 2)


def unpicklable() -> NoReturn:
    raise Unpicklable("with a lock")


def local_class() -> NoReturn:
    class Local(LookupError):
        pass

    raise Local("of a class that only the worker knows")


def no_string() -> NoReturn:
    raise NoString


def own_new() -> NoReturn:
    raise OwnNew(1, 2)


def leave() -> NoReturn:
    raise SystemExit(7)


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


def recursion() -> None:
    recursion()


def non_ascii() -> NoReturn:
    raise ValueError("größer als 5 €, \\n bleibt \\n, 漢字, \x00, \ud800")


def chained() -> NoReturn:
    try:
        raise KeyError("the cause")
    except KeyError as error:
        raise OSError(2, "the effect") from error


def huge() -> NoReturn:
    raise ValueError("x" * 50_000_000)


def stop_iteration() -> NoReturn:
    raise StopIteration("would end a generator of the driver")


CASES: list[tuple[Callable[[], object], type[BaseException], str]] = [
    (two_arguments, TwoArguments, "TwoArguments: 1 and 2"),
    (unpicklable, Unpicklable, "Unpicklable: with a lock"),
    (unpicklable, ValueError, "with a lock"),
    (local_class, rp.StageError, "local_class.<locals>.Local: of a class that only the worker knows"),
    (no_string, NoString, "<its str() raised RuntimeError>"),
    (own_new, rp.StageError, "OwnNew: made with two"),
    (leave, rp.StageError, "raised SystemExit: 7"),
    (interrupt, rp.StageError, "raised KeyboardInterrupt:"),
    (recursion, RecursionError, "maximum recursion depth exceeded"),
    (non_ascii, ValueError, "größer als 5 €, \\n bleibt \\n, 漢字, \x00, \ud800"),
    (chained, OSError, "[Errno 2] the effect"),
    (chained, OSError, "KeyError: 'the cause'"),
    (chained, OSError, "The above exception was the direct cause"),
    (huge, ValueError, "xxx … (50,000,000 characters in all)"),
    (stop_iteration, rp.StageError, "raised StopIteration: would end"),
]


class Raising(nn.Module):
    """Calls ``case`` in forward or backward."""

    def __init__(self, case: Callable[[], object], where: str) -> None:
        super().__init__()
        self.case, self.where = case, where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "forward" and self.training:
            self.case()
        if x.requires_grad:
            x.register_hook(lambda grad: self.case())  # type: ignore[no-untyped-call]
        return x


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("case", "kind", "words"), CASES)
def test_an_exception_arrives_whole(
    cluster: rp.Cluster, case: Callable[[], object], kind: type[BaseException], words: str, where: str
) -> None:
    model = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Raising(case, where))]
    pipe = rp.Pipeline(model, cluster, loss=cross_entropy, optimizer=sgd, chunks=2, balance=[1, 1])
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(kind) as caught:
        pipe.train_step(x, y)
    error = caught.value
    assert isinstance(error, rp.StageError)
    assert (error.stage, error.chunk, error.action) == (1, 0, where)
    assert words in str(error)
    assert f"in {case.__name__}" in error.remote_traceback or kind is RecursionError
    assert len(str(error)) < 50_000
    assert not isinstance(error, (SystemExit, KeyboardInterrupt, StopIteration))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert pipe(x).shape == (4, 4)  # the worker is alive and the pipeline usable
    pipe.close()


def test_the_original_comes_along_where_it_can(cluster: rp.Cluster) -> None:
    with pytest.raises(TwoArguments) as caught:
        cluster.call(1, two_arguments)
    assert isinstance(caught.value, rp.StageError)
    original = caught.value.original
    assert isinstance(original, TwoArguments)
    assert (original.left, original.right) == (1, 2)
    with pytest.raises(Unpicklable) as other:
        cluster.call(1, unpicklable)
    assert isinstance(other.value, rp.StageError)
    assert other.value.original is None


def test_unpicklable_returns_are_named(cluster: rp.Cluster) -> None:
    with pytest.raises(TypeError, match=r"run on worker0 raised TypeError: cannot pickle '_thread.lock' object"):
        cluster.call(1, threading.Lock)
    pipe = rp.Pipeline([nn.Linear(4, 4), Lock()], cluster, loss=cross_entropy, optimizer=sgd, balance=[1, 1])
    with pytest.raises(TypeError, match="cannot pickle"):
        pipe.stages[1].call(lambda module: threading.Lock())
    words = r"on worker1 raised rpcpipe\.errors\.ModelError: the output of layer 1 has a lock"
    with pytest.raises(rp.ModelError, match=words):
        pipe(torch.randn(4, 4))
    pipe.close()
    assert cluster.call(1, max, 1, 2) == 2


def test_an_unpicklable_value_between_stages_is_named(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline([Lock(), nn.Linear(4, 4)], cluster, loss=cross_entropy, optimizer=sgd, balance=[1, 1])
    words = r"forward of stage 0, micro-batch 0 on worker0 raised rpcpipe\.errors\.ModelError"
    with pytest.raises(rp.ModelError, match=words) as caught:
        pipe.train_step(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    assert isinstance(caught.value, rp.StageError)
    pipe.close()


class Lock(nn.Linear):
    """Gives what does not pickle."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), threading.Lock()


def test_a_class_defined_in_a_function_can_be_caught(cluster: rp.Cluster) -> None:
    class OneArgument(ValueError):
        pass

    class Two(Exception):
        def __init__(self, left: int, right: int) -> None:
            super().__init__(f"{left} {right}")

    def one() -> None:
        raise OneArgument("here")

    def two() -> None:
        raise Two(1, 2)

    for kind, fail, words in (OneArgument, one, "here"), (Two, two, "1 2"):
        with pytest.raises(kind, match=words) as caught:
            cluster.call(1, fail)
        assert isinstance(caught.value, rp.StageError)
    with pytest.raises(OneArgument) as other:
        cluster.call(1, one)
    assert isinstance(other.value, rp.StageError)
    assert type(other.value.original) is OneArgument
