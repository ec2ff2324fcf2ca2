from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import rpcpipe as rp
from rpcpipe.errors import Failure


class Rude(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)

    def __str__(self) -> str:
        raise RuntimeError("no words")


def failure_of(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as caught:
        return Failure.of(caught, worker="worker1", action="forward", stage=2, chunk=3)


def test_a_failure_always_travels() -> None:
    for error in (ValueError("größer 你好"), Rude("a", "b"), KeyboardInterrupt(), SystemExit(3)):
        failure = pickle.loads(pickle.dumps(failure_of(error)))
        again = pickle.loads(pickle.dumps(rp.StageError(failure)))
        assert again.stage == 2
        assert again.chunk == 3
        assert "forward of stage 2, micro-batch 3 on worker1 raised" in str(again)
        assert "failure_of" in again.remote_traceback
    assert "<its str() raised RuntimeError>" in str(rp.StageError(failure_of(Rude("a", "b"))))
    assert "größer 你好" in str(rp.StageError(failure_of(ValueError("größer 你好"))))


TREE = [kind for kind in vars(rp.errors).values() if isinstance(kind, type) and issubclass(kind, rp.RpcPipeError)]


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not rp.StageError])
def test_what_a_check_on_a_worker_raises_has_its_type_on_the_driver(kind: type[rp.RpcPipeError]) -> None:
    error = pickle.loads(pickle.dumps(rp.StageError.of(failure_of(kind("why, and what to do")))))
    assert isinstance(error, rp.StageError)
    assert isinstance(error, kind)
    assert f"raised rpcpipe.errors.{kind.__name__}: why, and what to do" in str(error)


def test_the_tree_is_public_and_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "guide" / "failures.md").read_text()
    for kind in TREE:
        assert getattr(rp, kind.__name__) is kind
        assert kind.__name__ in str(rp.errors.__doc__)
        assert f"├── {kind.__name__} " in page or kind in (rp.RpcPipeError, rp.StageError)
        assert f"`{kind.__name__}`" in page or kind is rp.RpcPipeError
