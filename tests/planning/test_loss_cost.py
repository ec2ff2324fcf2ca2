"""What a worker's loss costs, as a plan says it."""

from __future__ import annotations

import math

import pytest

from rpcpipe.planning.cost_model import CostModel, Machine
from rpcpipe.planning.layer_cost import LayerCost
from rpcpipe.planning.loss_cost import REPLACEMENT_SECONDS, LossCost
from rpcpipe.planning.plan import decide
from rpcpipe.planning.search import Search


def test_a_workers_keeper_has_its_snapshot_beside_its_own() -> None:
    cost = LossCost.of(2.0, [10.0, 20.0, 40.0], latency=0.5, bandwidth=80.0)
    assert cost.snapshot_bytes == (50.0, 30.0, 60.0)
    assert cost.worker_seconds == REPLACEMENT_SECONDS + 2.0
    # 1 s of transfer, then 50 s until the next is due, which takes another; and the step under way.
    assert cost.host_seconds == pytest.approx(REPLACEMENT_SECONDS + 1.0 + 50.0 + 1.0 + 2.0)


def test_without_a_bandwidth_nobody_knows_how_far_apart_snapshots_are() -> None:
    cost = LossCost.of(2.0, [10.0, 20.0], latency=0.0, bandwidth=math.inf)
    assert (cost.host_seconds, cost.snapshot_bytes) == (math.inf, (30.0, 30.0))


def test_a_plan_says_what_a_loss_costs() -> None:
    layers = [LayerCost(str(size), 1.0, 2.0, 1.0, 1.0, 8, size << 20, 4) for size in (1, 1, 2)]
    plan = decide(Search(CostModel({1: layers}, Machine(2, bandwidth=float(1 << 30))), 4))
    assert plan.balance == (2, 1)
    # Weights and two moments of 2 MiB on each worker.
    assert plan.loss.snapshot_bytes == (12 << 20, 12 << 20)
    assert plan.loss.worker_seconds == REPLACEMENT_SECONDS + plan.seconds
    assert f"sets training back by {plan.loss.worker_seconds:.3g} s at most" in repr(plan)
    assert "snapshots take 12.0 MiB more a worker" in repr(plan)
