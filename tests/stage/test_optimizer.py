from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from rpcpipe.driver.optimizer import PipelineOptimizer
from rpcpipe.errors import ArgumentError
from rpcpipe.stage.optimizer import LocalOptimizer, Parameters
from rpcpipe.stage.rollback import Reach
from support.models import adamw, sgd


def local(factory: object = adamw) -> LocalOptimizer:
    named = [("a.bias", nn.Parameter(torch.randn(3))), ("a.weight", nn.Parameter(torch.randn(2, 2)))]
    return LocalOptimizer(factory, Parameters(named))  # type: ignore[arg-type]


def apply(optimizer: LocalOptimizer, changes: list[dict[str, float]] | None = None) -> None:
    optimizer.step({p: torch.ones_like(p) for p in optimizer.parameters}, changes or [{}])


def state(optimizer: LocalOptimizer) -> list[torch.Tensor]:
    values = [p.detach().clone() for p in optimizer.parameters]
    for parameter in optimizer.parameters:
        entries = optimizer.optimizer.state.get(parameter, {}).values()
        values += [v.clone() for v in entries if isinstance(v, torch.Tensor)]
    return values


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("factory", [adamw, sgd])
def test_undo_brings_back_parameters_and_state(steps_before: int, factory: object) -> None:
    optimizer, straight = local(factory), local(factory)
    with torch.no_grad():
        for mine, other in zip(optimizer.parameters, straight.parameters, strict=True):
            other.copy_(mine)
    for _ in range(steps_before):
        apply(optimizer)
        optimizer.undo.invalidate()
        apply(straight)
        straight.undo.invalidate()
    apply(optimizer)
    optimizer.undo.restore()
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), state(straight), strict=True))
    optimizer.undo.invalidate()
    apply(optimizer)
    apply(straight)
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), state(straight), strict=True))


def test_copies_are_made_one_at_a_time_and_kept_up_to_date() -> None:
    optimizer = local()
    assert [optimizer.undo.refresh_one() for _ in range(3)] == [True, True, False]
    apply(optimizer)
    assert not optimizer.undo.refresh_one()
    optimizer.undo.invalidate()
    assert optimizer.undo.refresh_one()


def test_changed_hyperparameters_reach_the_worker_and_may_come_back() -> None:
    worker = local()
    driver = PipelineOptimizer(worker.groups(), Mock())
    assert driver.changes() == [{}]
    driver.param_groups[0]["lr"] = 0.5
    apply(worker, driver.changes())
    assert worker.optimizer.param_groups[0]["lr"] == 0.5
    driver.param_groups[0]["lr"] = 1e-2
    apply(worker, driver.changes())
    assert worker.optimizer.param_groups[0]["lr"] == 1e-2
    with pytest.raises(ArgumentError, match="takes no closure"):
        driver.step(lambda: 0.0)


def test_undo_leaves_what_the_optimizer_has_not_touched() -> None:
    """Another worker failed before this one's turn came: the last successful step must stay."""
    optimizer = local()
    apply(optimizer)
    optimizer.undo.invalidate()
    after = state(optimizer)
    optimizer.undo.restore()
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), after, strict=True))
    optimizer.undo.refresh_one()
    optimizer.undo.restore()
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), after, strict=True))


def test_what_others_own_is_not_copied() -> None:
    names = [("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(4)))]
    (_, own), (_, other) = names
    optimizer = LocalOptimizer(lambda ps: torch.optim.AdamW(ps), Parameters(names), {other}, is_whole=False)
    optimizer.undo.begin(0)
    optimizer.undo.refresh()
    assert list(optimizer.undo.copies) == [own]
    optimizer.undo.cover(optimizer.parameters)  # as for a call, which may change all
    optimizer.undo.begin(1)
    optimizer.undo.refresh()
    with torch.no_grad():
        other.zero_()
    optimizer.undo.take_back(1)
    assert torch.equal(other, torch.ones(4))
    optimizer.undo.cover(optimizer.owned)
    assert list(optimizer.undo.copies) == [own]


def test_without_copies_an_update_says_how_far_it_has_got() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LocalOptimizer(lambda ps: torch.optim.AdamW(ps), Parameters([("a", parameter)]), copies=False)
    optimizer.undo.begin(4)
    assert optimizer.undo.reach(4) is Reach.BEFORE
    optimizer.step({parameter: torch.ones(3)}, [{}])
    assert optimizer.undo.copies == {}
    assert optimizer.undo.reach(4) is Reach.WITHIN
    optimizer.undo.end()
    assert optimizer.undo.reach(4) is Reach.AFTER
    optimizer.undo.begin(5)
    assert optimizer.undo.reach(5) is Reach.BEFORE
