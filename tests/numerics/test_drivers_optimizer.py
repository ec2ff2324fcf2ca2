"""The driver's optimizer, which stands for the workers': their state in torch's format, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.misuse import SCHEDULES, assert_as_new, pipeline
from support.models import adamw, batches, cross_entropy, mlp
from support.oracle import Oracle

WRONG_USES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "add_param_group": (
        lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), rp.StateError, "let the factory",
    ),
    "a group removed": (
        lambda o: o.param_groups.clear(), rp.ArgumentError, "has 0 groups, and the workers' optimizers have 1",
    ),
    "a group added": (lambda o: o.param_groups.append({}), rp.ArgumentError, "has 2 groups, and the workers'"),
    "an option removed": (
        lambda o: o.param_groups[0].pop("momentum"), rp.ArgumentError, r"group 0 .* lacks \['momentum'\]",
    ),
    "parameters": (
        lambda o: o.param_groups[0].update(params=[nn.Parameter(torch.ones(1))]), rp.ArgumentError,
        "'params' of group 0 of pipe.optimizer.param_groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", WRONG_USES)
def test_what_the_drivers_optimizer_cannot_do_is_refused(name: str, schedule: str) -> None:
    use, kind, message = WRONG_USES[name]
    pipe = pipeline(schedule)
    before = copy.copy(pipe.optimizer.param_groups), [dict(group) for group in pipe.optimizer.param_groups]

    def train() -> None:
        use(pipe.optimizer)
        pipe.train_step(*next(batches(1)))

    with pytest.raises(kind, match=message):
        train()
    pipe.optimizer.param_groups[:] = before[0]
    for group, values in zip(pipe.optimizer.param_groups, before[1], strict=True):
        group.clear()
        group.update(values)
    assert_as_new(pipe)


def tied() -> nn.Sequential:
    torch.manual_seed(3)
    first, last = nn.Linear(12, 12), nn.Linear(12, 12)
    last.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), last, nn.Linear(12, 4))


def two_groups(params: Any) -> torch.optim.Optimizer:
    named = params.named() if hasattr(params, "named") else params
    flat = [parameter for name, parameter in named if name.endswith("bias")]
    deep = [parameter for name, parameter in named if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": deep, "lr": 1e-2}, {"params": flat, "lr": 1e-3}], betas=(0.8, 0.9))


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one stage": (1, {}),
    "three stages": (3, {}),
    "looped": (2, {"schedule": "interleaved", "virtual_stages": 2}),
    "replicas": (4, {"replicas": 2}),
    "sharded": (4, {"replicas": 2, "shard_optimizer": True}),
}


def made(layout: str, model: Callable[[], nn.Sequential], optimizer: Any = two_groups) -> rp.Pipeline:
    workers, options = LAYOUTS[layout]
    chunks = 2 // options.get("replicas", 1)
    return rp.Pipeline(
        model(), LocalCluster(workers), loss=cross_entropy, optimizer=optimizer, chunks=chunks, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [mlp, tied])
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_saved_state_goes_on_in_any_other_layout(source: str, model: Any) -> None:
    targets = list(LAYOUTS)
    target = targets[(targets.index(source) + 1) % len(targets)]
    old, *feed = made(source, model), *batches(4)
    old.train_step(*feed[0])
    old.optimizer.param_groups[1]["lr"] = 5e-3
    old.train_step(*feed[1])
    buffer = io.BytesIO()
    torch.save({"weights": old.state_dict(), "optimizer": old.optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    new = made(target, model)
    same = made(source, model)
    for pipe in (new, same):
        pipe.load_state_dict(saved["weights"])
        pipe.optimizer.load_state_dict(saved["optimizer"])
        pipe.trained = old.trained
        assert _equal(pipe.optimizer.state_dict(), saved["optimizer"])
        assert pipe.optimizer.param_groups[1]["lr"] == 5e-3
    for batch in feed[2:]:
        expected = old.train_step(*batch).loss
        assert same.train_step(*batch).loss == expected
        if model is mlp and "replicas" not in LAYOUTS[source][1] and "replicas" not in LAYOUTS[target][1]:
            assert new.train_step(*batch).loss == expected  # replicas and ties sum gradients in another order
        else:
            assert new.train_step(*batch).loss == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in same.state_dict().items())


def test_the_state_is_that_of_torchs_optimizer_over_the_unsplit_model() -> None:
    pipe, model = made("three stages", mlp), mlp()
    loop = Oracle(model, lambda params: two_groups(list(model.named_parameters())), cross_entropy, 2)
    for batch in batches(2):
        assert pipe.train_step(*batch).loss == loop.train_step(*batch)
    state = pipe.optimizer.state_dict()
    for group in state["param_groups"]:
        assert len(group.pop("param_names")) == len(group["params"])
    assert _equal(state, loop.optimizer.state_dict())
    other = made("one stage", mlp)
    other.load_state_dict(model.state_dict())
    other.optimizer.load_state_dict(loop.optimizer.state_dict())
    other.trained = 2
    batch = next(batches(1))
    assert other.train_step(*batch).loss == loop.train_step(*batch)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def _without(path: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["param_groups"][0].pop(path)


WRONG_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda state: state.clear(), "takes what state_dict"),
    "no parameters": (_without("params"), "takes what state_dict"),
    "another optimizer's": (_without("betas"), r"lacks \['betas'\] in group 0: it is another optimizer's"),
    "fewer groups": (lambda state: state["param_groups"].pop(), "has groups of"),
    "fewer parameters": (lambda state: state["param_groups"][0]["params"].pop(), "has groups of"),
    "other names": (
        lambda state: state["param_groups"][0]["param_names"].__setitem__(0, "x"), r"other parameters: \['0.0.weight'",
    ),
    "another shape": (lambda state: state["state"][0].update(exp_avg=torch.ones(3, 12)), r"exp_avg of shape \(3, 12\)"),
    "no state": (lambda state: state["state"].update({0: 7}), "has 7 as the state of 0.0.weight"),
    "meta": (lambda state: state["state"][0].update(step=torch.ones((), device="meta")), "meta device"),
    "a lambda": (lambda state: state["param_groups"][0].update(lr=(x for x in [1])), "which cannot be sent"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_that_does_not_fit_changes_nothing(name: str) -> None:
    spoil, message = WRONG_STATES[name]
    pipe, same = (made("three stages", mlp) for _ in range(2))
    for batch in batches(2):
        pipe.train_step(*batch)
        same.train_step(*batch)
    state = pipe.optimizer.state_dict()
    spoil(state)
    with pytest.raises(rp.CheckpointError, match=message):
        pipe.optimizer.load_state_dict(state)
    batch = next(batches(1))
    assert pipe.train_step(*batch).loss == same.train_step(*batch).loss
    assert _equal(pipe.optimizer.state_dict(), same.optimizer.state_dict())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_state_of_a_fresh_optimizer_and_amid_a_stream(schedule: str) -> None:
    pipe = pipeline(schedule, optimizer=adamw)
    assert pipe.optimizer.state_dict()["state"] == {}
    pipe.optimizer.load_state_dict(pipe.optimizer.state_dict())
    assert_as_new(pipe, optimizer=adamw)
    pipe = pipeline(schedule, optimizer=adamw)
    for _ in pipe.train(batches(3)):
        steps = {float(state["step"]) for state in pipe.optimizer.state_dict()["state"].values()}
        assert steps == {float(pipe.trained)}


def test_the_state_is_not_loaded_within_a_step() -> None:
    pipe = pipeline()
    state = pipe.optimizer.state_dict()
    with pipe.step(), pytest.raises(rp.StateError, match=r"optimizer\.load_state_dict after its with-block"):
        pipe.optimizer.load_state_dict(state)
