"""What cannot be sent is refused before it has a place in a worker's sequence, which would wait for it for ever."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.misuse import SCHEDULES, assert_as_new, pipeline
from support.models import batches

BATCH = next(batches(1))
KEY = "2.0.weight"


class NoPickle:
    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


def load(make: Callable[[torch.Tensor], Any]) -> Callable[[rp.Pipeline], Any]:
    def use(pipe: rp.Pipeline) -> None:
        state = pipe.state_dict()
        for key, value in state.items():
            state[key] = value + 1  # what would show if some of it were loaded
        pipe.load_state_dict({**state, KEY: make(state[KEY])})

    return use


def hyperparameter(value: Any) -> Callable[[rp.Pipeline], Any]:
    def use(pipe: rp.Pipeline) -> None:
        before = pipe.optimizer.param_groups[0]["momentum"]
        pipe.optimizer.param_groups[0]["momentum"] = value
        try:
            pipe.train_step(*BATCH)
        finally:
            pipe.optimizer.param_groups[0]["momentum"] = before

    return use


WRONG: dict[str, tuple[Callable[[rp.Pipeline], Any], type[Exception], str]] = {
    "meta weight": (load(lambda t: t.to("meta")), rp.CheckpointError, f"^{KEY} of the state_dict has .* meta device"),
    "sparse weight": (load(torch.Tensor.to_sparse), rp.CheckpointError, f"^{KEY} is torch.float32 in .*sparse_coo"),
    "complex weight": (load(lambda t: t + 1j), rp.CheckpointError, f"^{KEY} is torch.complex64"),
    "no weight": (load(lambda _: threading.Lock()), rp.CheckpointError, f"^{KEY} is <unlocked .*, not a tensor"),
    "no state": (lambda pipe: pipe.load_state_dict([1]), rp.ArgumentError, r"takes a state_dict, .* not \[1\]"),  # type: ignore[arg-type]
    "meta inputs": (lambda pipe: pipe.train_step(BATCH[0].to("meta"), BATCH[1]), rp.ArgumentError, "batch's inputs"),
    "meta targets": (lambda pipe: pipe.train_step(BATCH[0], BATCH[1].to("meta")), rp.ArgumentError, "batch's targets"),
    "no inputs": (lambda pipe: pipe.train_step((BATCH[0], NoPickle()), BATCH[1]), rp.ArgumentError, "NoPickle, which"),
    "no targets": (lambda pipe: pipe.train_step(BATCH[0], (BATCH[1], NoPickle())), rp.ArgumentError, "NoPickle, which"),
    "no batch of several": (
        lambda pipe: list(pipe.train([(BATCH[0].to("meta"), BATCH[1])], ahead=1)), rp.ArgumentError, "batch's inputs",
    ),
    "evaluate": (lambda pipe: pipe.evaluate([(BATCH[0].to("meta"), BATCH[1])]), rp.ArgumentError, "batch's inputs"),
    "predict": (lambda pipe: pipe((BATCH[0], NoPickle())), rp.ArgumentError, "NoPickle, which cannot be sent"),
    "hyperparameter": (hyperparameter(NoPickle()), rp.ArgumentError, "'momentum' in group 0 .* NoPickle"),
    "meta hyperparameter": (
        hyperparameter(torch.ones((), device="meta")), rp.ArgumentError, "'momentum' in group 0 .* meta device",
    ),
    "metric": (
        lambda pipe: pipe.train_step(*BATCH, metrics={"m": threading.Lock().acquire}), rp.ArgumentError, "to measure",
    ),
    "call": (lambda pipe: pipe.stages[0].call(threading.Lock().acquire), rp.ArgumentError, "the call's function"),
    "forward": (
        lambda pipe: pipe.stages[0].forward(BATCH[0].to("meta")), rp.ArgumentError, "the stage's input has .* meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_sent_is_refused_and_changes_nothing(name: str, schedule: str) -> None:
    use, kind, message = WRONG[name]
    pipe = pipeline(schedule)
    with pytest.raises(kind, match=message):
        use(pipe)
    assert_as_new(pipe)


class Refusing:
    """Lets the transport raise at the message ``at``, counted from now, as where one cannot be pickled."""

    def __init__(self, transport: Any, at: int) -> None:
        self.left = at
        for name in ("call", "remote"):
            setattr(transport, name, self._counting(getattr(transport, name)))

    def _counting(self, send: Any) -> Any:
        def counting(to: str, verb: str, *args: Any, **options: Any) -> Any:
            self.left -= verb in ("submit", "accept")
            if self.left == -1:
                self.left = -2
                raise TypeError("cannot pickle this")
            return send(to, verb, *args, **options)

        return counting


CALLS: dict[str, Callable[[rp.Pipeline], Any]] = {
    "step": lambda pipe: pipe.train_step(*BATCH),
    "ahead": lambda pipe: list(pipe.train([BATCH] * 2, ahead=1)),
    "by hand": lambda pipe: by_hand(pipe),
    "evaluate": lambda pipe: pipe.evaluate([BATCH] * 2),
    "state_dict": lambda pipe: pipe.state_dict(),
}


def by_hand(pipe: rp.Pipeline) -> None:
    with pipe.step() as step:
        step.forward_backward(*BATCH)
        step.optimize()


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_message_may_fail_to_be_sent(schedule: str, dispatch: str) -> None:
    """Whatever the message, the pipeline is as before the call, or as after it, and goes on."""
    for name, call in CALLS.items():
        if schedule == "pipedream" and name in ("ahead", "by hand"):
            continue
        for at in range(0, 100, 3 if dispatch == "rref" else 1):
            cluster: Any = LocalCluster(2, at)
            pipe = pipeline(schedule, cluster, dispatch=dispatch)
            refusing = Refusing(cluster.transport, at)
            with contextlib.suppress(TypeError):
                call(pipe)
            if refusing.left >= 0:
                break
            fresh = pipeline(schedule, dispatch=dispatch)
            while fresh.trained < pipe.trained:
                fresh.train_step(*BATCH)
            for batch in batches(2):
                assert pipe.train_step(*batch).loss == fresh.train_step(*batch).loss, (name, at)
        else:
            pytest.fail("there is no end to the messages")
