from __future__ import annotations

import pickle

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
