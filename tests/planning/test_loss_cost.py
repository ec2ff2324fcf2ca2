"""What a worker's loss costs, as a plan says it."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from rpcpipe.errors import PartitionError
from rpcpipe.planning.cost_model import CostModel
from rpcpipe.planning.layer_cost import LayerCost
from rpcpipe.planning.loss_cost import REPLACEMENT_SECONDS, Healing, LossCost, host_names, keepers, snapshot_bytes
from rpcpipe.planning.machine import Machine
from rpcpipe.planning.plan import Plan, decide
from rpcpipe.planning.search import Search


def test_a_workers_keeper_has_its_snapshot_beside_its_own() -> None:
    """The one before is there, too, until the next is whole on all workers."""
    snapshots = snapshot_bytes([10.0, 20.0, 40.0], ["a", "b", "c"])
    assert snapshots == [2 * 50.0, 2 * 30.0, 2 * 60.0]
    assert snapshot_bytes([10.0, 20.0], ["a", "a"]) == [0.0, 0.0]
    cost = LossCost.of(2.0, [10.0, 20.0, 40.0], snapshots, latency=0.5, bandwidth=80.0)
    assert cost.snapshot_bytes == (100.0, 60.0, 120.0)
    assert cost.worker_seconds == REPLACEMENT_SECONDS + 2.0
    # 1 s of transfer, then 50 s until the next is due, which takes another; and the step under way.
    assert cost.host_seconds == pytest.approx(REPLACEMENT_SECONDS + 1.0 + 50.0 + 1.0 + 2.0)


def test_without_a_bandwidth_nobody_knows_how_far_apart_snapshots_are() -> None:
    cost = LossCost.of(2.0, [10.0, 20.0], [60.0, 60.0], latency=0.0, bandwidth=math.inf)
    assert (cost.host_seconds, cost.snapshot_bytes) == (math.inf, (60.0, 60.0))


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [1, 2, 3], [3, 1, 2], [1, 1, 1, 5], [5, 1], [1, 4]])
def test_a_keeper_is_on_another_host_and_none_has_more_than_it_must(sizes: list[int]) -> None:
    hosts = [str(host) for host, size in enumerate(sizes) for _ in range(size)]
    for order in (hosts, hosts[::-1], random.Random(1).sample(hosts, len(hosts))):
        found = keepers(order)
        assert all(order[worker] != order[keeper] for worker, keeper in enumerate(found))
        others = len(hosts) - max(sizes)
        assert max(Counter(found).values()) == max(1, -(-max(sizes) // others))


def test_a_plan_says_what_a_loss_costs() -> None:
    layers = [LayerCost(str(size), 1.0, 2.0, 1.0, 1.0, 8, size << 20, 4) for size in (1, 1, 2)]
    plan = decide(Search(CostModel({1: layers}, Machine(2, bandwidth=float(1 << 30))), 4))
    assert plan.balance == (2, 1)
    # Weights and two moments of 2 MiB on each worker, its own and the other's, each twice.
    assert plan.loss.snapshot_bytes == (24 << 20, 24 << 20)
    assert [part.snapshots for part in plan.parts] == [0, 0]  # all workers are on one host
    assert plan.loss.worker_seconds == REPLACEMENT_SECONDS + plan.seconds
    assert f"sets training back by {plan.loss.worker_seconds:.3g} s at most" in repr(plan)
    assert "snapshots take 24.0 MiB more a worker" in repr(plan)


def test_a_plan_for_several_hosts_counts_the_snapshots_and_shows_them() -> None:
    layers = [LayerCost(str(size), 1.0, 2.0, 1.0, 1.0, 8, size << 20, 4) for size in (1, 1, 2)]

    def plan(limit: float, hosts: int) -> Plan:
        machine = Machine(2, limit, healing=Healing(hosts=host_names(2, hosts)))
        return decide(Search(CostModel({1: layers}, machine), 4))

    # Weights, gradients, two moments and a copy: 7 × 2 MiB; snapshots: 2 × 2 × 6 MiB.
    spread = plan(39 << 20, 2)
    assert [part.snapshots for part in spread.parts] == [24 << 20, 24 << 20]
    assert max(spread.memory) - max(plan(39 << 20, 1).memory) == 24 << 20
    text, picture = repr(spread), spread.memory_svg()
    assert "snapshots take 24.0 MiB at most, which is counted" in text
    assert "  snapshots" in text.partition("memory of a worker")[2].partition("what would take")[0]
    assert "<title>worker 1: snapshots 24.0 MiB</title>" in picture
    assert "snapshots" not in plan(39 << 20, 1).memory_svg()
    with pytest.raises(PartitionError, match="snapshots for the loss of a host, everything recomputed"):
        plan(30 << 20, 2)
