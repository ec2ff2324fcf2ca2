"""Plans: what they say, and that they say it plainly when nothing fits."""

from __future__ import annotations

import time

import pytest

from rpcpipe.errors import PartitionError
from rpcpipe.planning import CostModel, Plan, Search
from rpcpipe.planning.cost_model import Machine
from rpcpipe.planning.gpt import GPT
from rpcpipe.planning.plan import decide
from rpcpipe.planning.search import layouts
from rpcpipe.schedules import optimal_microbatches

GIB = 2**30
GPT3 = GPT(96, 12288, 96, 50257, 2048)


def plan_gpt3(workers: int, memory: float = 80 * GIB, batch: int = 1536, replicas: int | None = None) -> Plan:
    layer_costs = {size: GPT3.layer_costs(size, 0.5 * 312e12) for size in (1, 2, 4)}
    costs = CostModel(layer_costs, Machine(workers, memory, 1e-5, 300e9), 16 * GPT3.sequence)
    return decide(Search(costs, batch, layouts=layouts(workers, 98, replicas)))


def test_gpt3_on_1024_workers() -> None:
    start = time.process_time()
    plan = plan_gpt3(1024)
    assert time.process_time() - start < 4.0  # 1 s on a free core; tests share theirs
    assert plan.replicas * len(plan.balance) // plan.virtual_stages == 1024
    assert sum(plan.balance) == 98
    assert max(plan.memory) <= 80 * GIB
    assert plan.shard_optimizer  # 28 bytes a parameter do not fit otherwise
    # No worker computes less than its share, at half of the peak.
    assert plan.seconds > 6 * GPT3.parameters * 1536 * 2048 / (1024 * 0.5 * 312e12)
    text = repr(plan)
    for words in ("98 layers, more than 24: deep", "memory-bound", "micro-batches", "interleaved", "1f1b"):
        assert words in text
    assert f"{optimal_microbatches(1024 // plan.replicas)} micro-batches bring it to 10%" in text


def test_what_does_not_fit_says_what_would() -> None:
    """8 workers of 80 GiB hold an eighth of what GPT-3's training takes; what is said would do, does."""
    with pytest.raises(PartitionError, match=r"does not fit 8 workers of 80.0 GiB") as caught:
        plan_gpt3(8)
    message = str(caught.value)
    assert "4,569.3 GiB" in message  # 7 copies in single precision
    would = message.partition("What would do: ")[2]
    needed = float(would.split(" GiB")[0].replace(",", ""))
    assert plan_gpt3(8, memory=(needed + 1) * GIB, batch=64).workers == 8
    workers = int(would.partition(", or ")[2].split()[0])
    assert plan_gpt3(workers, batch=2 * workers, replicas=1).workers == workers
    with pytest.raises(PartitionError):
        plan_gpt3(workers - 1, batch=2 * workers, replicas=1)


def test_a_layer_that_is_too_large_is_named() -> None:
    with pytest.raises(PartitionError, match=r"the largest alone takes 47.3 GiB"):
        plan_gpt3(1024, memory=20 * GIB, replicas=1)


def test_no_schedule_is_defined() -> None:
    with pytest.raises(PartitionError, match="leave no schedule"):
        decide(Search(CostModel({1: GPT3.layer_costs(1, 1.0)}, Machine(99)), 8))


def test_without_a_limit_nothing_is_recomputed() -> None:
    plan = plan_gpt3(8, memory=float("inf"), batch=64, replicas=1)
    assert plan.checkpoint == "never"
    assert any("no memory limit" in reason for reason in plan.why)
    assert {estimate.candidate.schedule for estimate in plan.beaten} >= {"1f1b", "gpipe", "zb-v", "dualpipe-v"}
    assert plan.seconds == min(estimate.seconds for estimate in plan.beaten)
    assert "<table>" in plan._repr_html_()


def test_a_small_memory_wants_recomputation() -> None:
    free = plan_gpt3(8, memory=float("inf"), batch=64, replicas=1)
    tight = plan_gpt3(8, memory=max(free.memory) * 0.95, batch=64, replicas=1)
    assert max(tight.memory) <= 0.95 * max(free.memory)
    assert tight.seconds >= free.seconds
