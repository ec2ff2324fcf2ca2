"""Random calls, most of them wrong, in a random order: each ends as documented, and nothing stays of it."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp

GOOD = list(batches(3))
VALUES: list[Any] = [
    None, "x", "", -1, 0, 1, 2, 1.5, math.nan, math.inf, [], {}, (), True, b"x", object(), 10**9, torch.zeros(()),
    torch.zeros(0, 8), torch.zeros(3, 5), torch.full((4, 8), math.nan), torch.zeros(4, 8, device="meta"),
    lambda *given: None, lambda *given: 1 / 0, Path("/nowhere"), "gpipe", "zb-h1", "pipedream", [1, 2], GOOD[0],
]  # fmt: skip
CALLS = [
    "train_step", "train", "evaluate", "predict", "__call__", "state_dict", "load_state_dict", "save", "load", "resize",
    "step", "trace", "parameter_rrefs", "on_step",
]  # fmt: skip
ATTRIBUTES = [
    "chunks",
    "schedule",
    "accumulate",
    "clip_grad_norm",
    "nonfinite",
    "trained",
    "balance",
    "scaler",
    "made_up",
]
OF_OPTIMIZER = ["step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"]


class Fuzz:
    """Calls ``pipe`` as ``seed`` says; ``left``: steps by hand that nobody has left."""

    def __init__(self, pipe: rp.Pipeline, seed: int) -> None:
        self.pipe, self.random = pipe, random.Random(seed)
        self.left: list[Any] = []

    def value(self) -> Any:
        return self.random.choice(VALUES)

    def call(self) -> None:
        """Do something."""
        kinds = [self.method, self.method, self.method, self.attribute, self.optimizer, self.stage, self.by_hand]
        action: Callable[[], Any] = self.random.choice(kinds)
        with suppress(rp.RpcPipeError, OSError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()

    def method(self) -> None:
        name = self.random.choice(CALLS)
        given = [self.value() for _ in range(self.random.randrange(3))]
        if name in ("train_step", "evaluate") and self.random.random() < 0.5:
            given = [*GOOD[0]] if name == "train_step" else [GOOD]
        try:
            found = getattr(self.pipe, name)(*given)
        except TypeError as error:  # the wrong number of arguments, which Python itself refuses
            if "argument" not in str(error) or isinstance(error, rp.RpcPipeError):
                raise
            return
        if name in ("train", "predict"):
            list(found)
        elif name in ("step", "trace") and self.random.random() < 0.5:
            with found as inner:
                if name == "step" and self.random.random() < 0.5:
                    inner.forward_backward(*GOOD[1])
        elif name == "on_step":
            self.pipe.callbacks.clear()

    def attribute(self) -> None:
        with suppress(AttributeError):
            setattr(self.pipe, self.random.choice(ATTRIBUTES), self.value())

    def optimizer(self) -> None:
        name = self.random.choice(OF_OPTIMIZER)
        try:
            getattr(self.pipe.optimizer, name)(*[self.value() for _ in range(self.random.randrange(2))])
        except TypeError as error:
            if "argument" not in str(error):
                raise
        if self.random.random() < 0.3:
            group = self.pipe.optimizer.param_groups[0]
            before = dict(group)
            group[self.random.choice(["lr", "params", "betas", "made up"])] = self.value()
            with suppress(rp.RpcPipeError):
                self.pipe.train_step(*GOOD[0])
            group.clear()
            group.update(before)

    def stage(self) -> None:
        stage = self.random.choice(self.pipe.stages)
        stage.call(self.random.choice([lambda module: sum(p.sum() for p in module.parameters()).item(), self.value()]))

    def by_hand(self) -> None:
        step = self.pipe.step()
        step.__enter__()
        self.left.append(step)
        with suppress(rp.RpcPipeError):
            step.forward_backward(*GOOD[1])
        if self.random.random() < 0.7:
            self.left.pop()
            step.__exit__(None, None, None)


def ordinary(pipe: rp.Pipeline) -> tuple[Any, ...]:
    """An ordinary step of a pipeline that is as it was made."""
    results = [pipe.train_step(*batch) for batch in GOOD]
    return [(one.loss, one.grad_norm, one.applied) for one in results], pipe.state_dict()


def made() -> rp.Pipeline:
    return rp.Pipeline(mlp(4), LocalCluster(2, 1), loss=cross_entropy, optimizer=adamw, chunks=4, clip_grad_norm=1.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.timeout(120)
def test_what_is_refused_leaves_nothing_behind(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures, weights = ordinary(made())
    pipe = made()
    saved = pipe.save(tmp_path / "as made")
    fuzz = Fuzz(pipe, seed)
    for _ in range(10):
        for _ in range(30):
            fuzz.call()
        for step in fuzz.left:
            with suppress(rp.RpcPipeError):
                step.__exit__(None, None, None)
        fuzz.left.clear()
        pipe.optimizer.zero_grad()
        pipe.schedule, pipe.accumulate, pipe.clip_grad_norm, pipe.nonfinite = "1f1b", 1, 1.0, "skip"
        pipe.chunks = 4
        pipe.train_step(*GOOD[2])  # which sends the options as they are now
        pipe.load(saved)
        found, state = ordinary(pipe)
        assert found == figures
        assert all(torch.equal(state[name], value) for name, value in weights.items())
