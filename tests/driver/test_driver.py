"""Order, cancellation and deadlines, over the transport that shuffles every message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import rpcpipe as rp
from rpcpipe.stage.optimizer import LocalOptimizer
from rpcpipe.worker.actor import Actor
from rpcpipe.worker.messages import Route
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.seeds import some


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[rp.schedules.Action]]:
    """Every worker's actions in the order in which they really ran."""
    seen: dict[str, list[rp.schedules.Action]] = {}
    act = Actor._run_action

    def record(self: Actor, route: Route, *more: Any) -> Any:
        seen.setdefault(self.name, []).append(route.action)
        return act(self, route, *more)

    monkeypatch.setattr(Actor, "_run_action", record)
    return seen


def tiny(layers: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, target)


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("schedule", rp.schedules.names())
def test_executed_order_is_the_schedules(
    schedule: str, dispatch: str, executed: dict[str, list[rp.schedules.Action]]
) -> None:
    """3 pipelines × 4 steps × 11 schedules × 2 dispatch modes: 264 shuffles, over 1,000 if deep; what is drawn runs."""
    virtual = rp.schedules.fewest_virtual_stages(schedule)
    planned = rp.schedules.get(schedule, 3, 6, virtual)
    for seed in some(range(12), 3):
        pipe = rp.Pipeline(
            tiny(planned.stages), LocalCluster(3, seed), loss=mse, optimizer=sgd, schedule=schedule, chunks=6,
            virtual_stages=virtual, dispatch=dispatch,
        )  # fmt: skip
        for _ in range(4):
            executed.clear()
            result = pipe.train_step(torch.randn(6, 2), torch.randn(6, 2))
            assert tuple(tuple(executed[f"worker{index}"]) for index in range(3)) == planned.actions
            if virtual == 1:
                assert result.peak_in_flight == planned.simulate().peak_in_flight


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(rp.schedules.names()), st.integers(1, 4), st.integers(1, 9), st.integers(0, 1), st.integers(0, 999)
)
def test_validator_simulator_and_executor_agree(
    executed: dict[str, list[rp.schedules.Action]], name: str, workers: int, chunks: int, more: int, seed: int
) -> None:
    virtual = rp.schedules.fewest_virtual_stages(name) + more
    try:
        planned = rp.schedules.get(name, workers, chunks, virtual).validate()
    except rp.ScheduleError:
        assume(False)
    executed.clear()
    pipe = rp.Pipeline(
        tiny(planned.stages), LocalCluster(workers, seed), loss=mse, optimizer=sgd, schedule=name, chunks=chunks,
        virtual_stages=virtual,
    )  # fmt: skip
    timeline = pipe.train_step(torch.randn(chunks, 2), torch.randn(chunks, 2)).timeline
    rows = tuple(tuple(executed.get(f"worker{index}", ())) for index in range(workers))
    assert rows == planned.actions
    for spans in (timeline.spans, planned.simulate().spans):
        traced = [[s for s in sorted(spans, key=lambda s: s.start) if s.worker == w] for w in range(workers)]
        assert tuple(tuple(rp.schedules.Action(s.kind, s.stage, s.chunk) for s in row) for row in traced) == rows  # type: ignore[arg-type]


def fail_on_nan(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].isnan().any():
        raise ArithmeticError("NaN in the input")


@pytest.mark.parametrize("seed", some(range(50), 12))
def test_a_failed_step_is_dropped_and_the_next_one_is_right(seed: int) -> None:
    def model() -> nn.Sequential:
        layers = mlp(6)
        layers[3].register_forward_pre_hook(fail_on_nan)
        return layers

    bad, good = (rp.Pipeline(model(), LocalCluster(3, seed), loss=cross_entropy, optimizer=sgd, chunks=5)
                 for _ in range(2))  # fmt: skip
    (x, y), (x2, y2) = batches(2)
    poisoned = x.clone()
    poisoned[6] = float("nan")  # micro-batch 3
    with pytest.raises(rp.StageError, match="NaN in the input") as caught:
        bad.train_step(poisoned, y)
    assert (caught.value.stage, caught.value.chunk, caught.value.action) == (1, 3, "forward")
    bad.train_step(x2, y2)
    good.train_step(x2, y2)
    for name, value in good.state_dict().items():
        assert torch.equal(bad.state_dict()[name], value)


def test_a_lost_message_runs_into_the_deadline_which_names_the_action() -> None:
    lost = iter([False] * 3 + [True])

    def drop(to: str, verb: str) -> bool:
        return verb.startswith("deliver") and next(lost, False)

    pipe = rp.Pipeline(
        mlp(), LocalCluster(3, drop=drop, timeout=0.2), loss=cross_entropy, optimizer=sgd, schedule="gpipe", chunks=4
    )
    x, y = next(batches(1))
    with pytest.raises(rp.DeadlineExceeded, match=r"worker2 waits for the input of forward of stage 2, micro-batch"):
        pipe.train_step(x, y)
    pipe.train_step(x, y)


def test_a_step_changes_no_weight_before_all_stages_are_done(
    executed: dict[str, list[rp.schedules.Action]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done_at_update = []
    step = LocalOptimizer.step

    def record(self: LocalOptimizer, *args: Any) -> None:
        done_at_update.append({worker: len(actions) for worker, actions in executed.items()})
        step(self, *args)

    monkeypatch.setattr(LocalOptimizer, "step", record)
    pipe = rp.Pipeline(tiny(2), LocalCluster(2, 7), loss=mse, optimizer=sgd, chunks=4)
    pipe.train_step(torch.randn(4, 2), torch.randn(4, 2))
    assert done_at_update == [{"worker0": 8, "worker1": 8}] * 2
