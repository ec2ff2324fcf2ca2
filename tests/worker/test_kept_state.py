"""What a successor takes over, at whatever instant the worker dies: a copy of its memory says what is left then."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rpcpipe.model.wiring import StageLinks
from rpcpipe.stage.kept_memory import Condition, look
from rpcpipe.transport.user_pickling import dumps, loads
from rpcpipe.worker.operations import (
    BeginStep,
    CallModule,
    GetState,
    LoadState,
    Repartition,
    ReportStep,
    RollBackStep,
    SetMetrics,
    UndoUpdate,
)
from support.kinds import KINDS, solo
from support.solo import Call, Solo, calls, copy_of, every_line, forget, revived


@pytest.fixture(params=KINDS)
def worker(request: pytest.FixtureRequest) -> Solo:
    return solo(request.param)


def ours(name: str) -> bool:
    """What writes: the worker's, the rollback's, and torch's optimizers."""
    return any(
        part in name for part in ("/worker/", "/rollback.py", "/kept_", "/accumulation", "/torch/optim/", __file__)
    )


class Instants:
    """Revives the worker of ``path`` at every ``stride``-th line; ``check`` looks at what came out."""

    def __init__(self, path: str, check: Callable[[Solo], None], stride: int = 1) -> None:
        self.seen = 0
        self._path, self._check, self._stride = path, check, stride

    def __call__(self) -> None:
        self.seen += 1
        if self.seen % self._stride == 0:
            copy = copy_of(self._path)
            try:
                self._check(Solo.revived(copy))
            finally:
                forget(copy)


def same_rolled_back(step: int, before: bytes) -> Callable[[Solo], None]:
    def check(successor: Solo) -> None:
        successor.roll_back(step)
        assert successor.state(attributes=False) == before

    return check


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_death_at_any_line_of_a_step_is_rolled_back_to_the_bit(worker: Solo, steps_before: int) -> None:
    for step in range(steps_before):
        worker.step(step)
    before = worker.state(attributes=False)
    instants = Instants(worker.path, same_rolled_back(steps_before, before), stride=31)
    with every_line(instants, ours):
        worker.step(steps_before)
    assert instants.seen > 400
    worker.roll_back(steps_before)
    assert worker.state(attributes=False) == before


def test_an_update_of_one_parameter_after_the_other_at_many_lines() -> None:
    worker = solo("adamw parameter by parameter")
    worker.step(0)
    before = worker.state(attributes=False)
    instants = Instants(worker.path, same_rolled_back(1, before), stride=7)
    with every_line(instants, ours):
        worker.step(1)
    assert instants.seen > 800


def test_what_the_driver_was_told_of_is_there(worker: Solo) -> None:
    for step in range(3):
        worker.step(step, lr=0.1 / (step + 1))
        assert revived(worker).state() == worker.state()


def test_a_successor_trains_on_with_the_same_bits_and_has_successors(worker: Solo) -> None:
    for step in range(6):
        copy = copy_of(worker.path)
        successor = Solo.revived(copy)
        forget(copy)
        worker.step(step)
        successor.step(step)
        assert successor.state() == worker.state()
        worker = successor


def test_a_death_in_a_rollback_is_rolled_back_again(worker: Solo) -> None:
    worker.step(0)
    before = worker.state(attributes=False)
    worker.step(1)
    instants = Instants(worker.path, same_rolled_back(1, before), stride=29)
    with every_line(instants, ours):
        worker.roll_back(1)
    assert instants.seen > 100
    assert revived(worker).state(attributes=False) == before


def test_an_update_that_is_undone_stays_undone(worker: Solo) -> None:
    worker.step(0)
    worker.step(1)
    worker.execute(UndoUpdate(1))
    assert revived(worker).state() == worker.state()


def test_accumulated_gradients_are_taken_over_and_a_death_drops_only_its_own_steps() -> None:
    worker = solo("adamw")
    worker.step(0)
    worker.step(1, updates=False)
    before = worker.state()
    assert revived(worker).state() == before
    instants = Instants(worker.path, lambda successor: _repeats(successor, before), stride=29)
    with every_line(instants, ours):
        worker.step(2, accumulates_on=1, updates=False)
    worker.step(3, accumulates_on=2)
    assert revived(worker).state() == worker.state()


def _repeats(successor: Solo, before: bytes) -> None:
    """The sums of a step that had just ended may lie beside those of the one before; the next names its own."""
    successor.roll_back(2)
    successor.actor.held.accumulated.resume(1, successor.actor.held.parameters)
    for parameter in successor.actor.held.parameters:
        parameter.grad = None
    assert successor.state() == before


def test_an_evaluation_leaves_what_the_step_before_has_made() -> None:
    worker = solo("adamw")
    worker.step(0)
    after = worker.state()
    plan = next(calls(1))[0]
    assert isinstance(plan, BeginStep)
    worker.execute(BeginStep(plan.plan._replace(training=False)))
    worker.execute(ReportStep())
    successor = revived(worker)
    successor.execute(RollBackStep(1, updating=True))
    assert successor.state() == after


def test_an_optimizer_that_fails_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = solo("adamw")
    worker.step(0)
    before = worker.state()
    optimizer = worker.actor.held.optimizer
    assert optimizer is not None
    step = optimizer.optimizer.step

    def failing() -> None:
        step()
        raise RuntimeError

    monkeypatch.setattr(optimizer.optimizer, "step", failing)
    with pytest.raises(RuntimeError):
        worker.step(1)
    successor = revived(worker)
    successor.roll_back(1)
    assert successor.state() == before


# --- a step that runs ahead ---


def run_ahead(worker: Solo, step: int) -> list[Call]:
    """Run ``step`` while the one before is not settled, up to where it awaits its orders; return the rest."""
    *begun, orders, commit = calls(step, ahead=True)
    for operation, values in begun:
        worker.execute(operation, values)
    return [orders, commit]


def take_back_both(before: bytes, settled: bytes) -> Callable[[Solo], None]:
    """Whether the step before is settled or not, the one ahead leaves no trace."""

    def check(successor: Solo) -> None:
        successor.execute(RollBackStep(2, updating=False, ahead=True))
        assert successor.state() == settled
        successor.roll_back(1)
        assert successor.state(attributes=False) == before

    return check


def test_a_death_while_a_step_runs_ahead_takes_back_one_or_both(worker: Solo) -> None:
    worker.step(0)
    before = worker.state(attributes=False)
    worker.step(1)
    settled, settled_weights = worker.state(), worker.state(attributes=False)
    instants = Instants(worker.path, take_back_both(before, settled), stride=31)
    with every_line(instants, ours):
        rest = run_ahead(worker, 2)
    assert instants.seen > 200
    take_back_both(before, settled)(revived(worker))
    worker.actor.ordered(2)
    instants = Instants(worker.path, same_rolled_back(2, settled_weights), stride=31)
    with every_line(instants, ours):
        while worker.actor.idle_work():
            pass
        for operation, values in rest:
            worker.execute(operation, values)
    assert revived(worker).state() == worker.state()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_ran_ahead_in_vain_runs_again_on_the_successor(kind: str) -> None:
    worker, straight = solo(kind), solo(kind)
    for one in worker, straight:
        one.step(0)
        one.step(1)
    run_ahead(worker, 2)
    successor = revived(worker)
    successor.execute(RollBackStep(2, updating=False, ahead=True))
    assert successor.state() == straight.state()
    for one in successor, straight:
        one.step(3)
    assert successor.state() == straight.state()


# --- between steps ---


def put_a_new_weight(module: nn.Module) -> None:
    layer = module.get_submodule("1")
    assert isinstance(layer, nn.Linear)
    layer.weight.data = torch.full_like(layer.weight, 2.0)


def put_a_new_layer(module: nn.Module) -> None:
    module.get_submodule("0").add_module("2", nn.Dropout(0.5))


def count(module: nn.Module) -> None:
    module.get_submodule("0").calls = 7  # type: ignore[assignment]


def freeze(module: nn.Module) -> None:
    module.get_submodule("0").requires_grad_(False)


@pytest.mark.parametrize("change", [put_a_new_weight, put_a_new_layer, count, freeze])
def test_what_a_call_has_changed_is_there(change: Callable[[nn.Module], None]) -> None:
    worker = solo("adamw")
    worker.step(0)
    worker.execute(CallModule(0, dumps(change), None))
    successor = revived(worker)
    assert successor.state() == worker.state()
    for one in worker, successor:
        one.step(1)
        one.execute(CallModule(0, dumps(thaw), None))
        one.step(2)
    assert successor.state() == worker.state()


def thaw(module: nn.Module) -> None:
    module.requires_grad_(True)


def test_a_call_that_is_under_way_says_so() -> None:
    worker = solo("adamw")
    kept_at = worker.actor.held.kept_at
    assert kept_at is not None
    seen = worker.execute(CallModule(0, dumps(functools.partial(condition, kept_at.descriptor)), None))
    assert loads(seen) is Condition.CHANGING
    assert look(kept_at.descriptor).condition is Condition.KEPT


def condition(descriptor: int, module: nn.Module) -> Condition:
    return look(descriptor).condition


def test_a_loaded_state_is_there() -> None:
    worker, other = solo("adamw"), solo("adamw")
    worker.step(0)
    other.step(5)
    worker.execute(LoadState(other.execute(GetState())))
    assert revived(worker).state() == worker.state()


def test_metrics_are_there() -> None:
    worker = solo("adamw")
    worker.execute(SetMetrics(dumps({"error": nn.functional.l1_loss})))
    assert revived(worker).actor.held.stages[0].metrics == {"error": nn.functional.l1_loss}


def test_a_death_in_a_move_leaves_the_stages_of_before_or_of_after() -> None:
    worker = solo("adamw")
    worker.step(0)
    names = [list(stage.module._modules) for stage in worker.actor.held.stages.values()]
    after, state = [["0"], ["1"]], worker.state()
    found = []

    def check(successor: Solo) -> None:
        found.append([list(stage.module._modules) for stage in successor.actor.held.stages.values()])
        assert found[-1] in (names, after)
        assert found[-1] == after or successor.state() == state

    instants = Instants(worker.path, check, stride=11)
    with every_line(instants, ours):
        worker.execute(Repartition({0: (["0"], 0), 1: (["1"], 1)}, 1, StageLinks(), {}))
    assert found[0] == names
    successor = revived(worker)
    assert [list(stage.module._modules) for stage in successor.actor.held.stages.values()] == after
    assert successor.state() == worker.state()
