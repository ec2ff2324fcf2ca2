"""Plans: what they say, and that they say it plainly when nothing fits."""

from __future__ import annotations

import time
from xml.etree import ElementTree

import pytest

from rpcpipe.errors import PartitionError
from rpcpipe.planning import CostModel, Plan, Search
from rpcpipe.planning.gpt import GPT
from rpcpipe.planning.machine import Machine
from rpcpipe.planning.plan import decide
from rpcpipe.planning.search import layouts
from rpcpipe.schedules import optimal_microbatches

GIB = 2**30
GPT3 = GPT(96, 12288, 96, 50257, 2048)


def plan_gpt3(
    workers: int, memory: float = 80 * GIB, batch: int = 1536, replicas: int | None = None, undo: str | None = None
) -> Plan:
    layer_costs = {size: GPT3.layer_costs(size, 0.5 * 312e12) for size in (1, 2, 4)}
    costs = CostModel(layer_costs, Machine(workers, memory, 1e-5, 300e9), 16 * GPT3.sequence)
    return decide(Search(costs, batch, layouts=layouts(workers, 98, replicas)), undo)


def test_gpt3_on_1024_workers() -> None:
    start = time.process_time()
    plan = plan_gpt3(1024, undo="copy")
    assert time.process_time() - start < 4.0  # 1 s on a free core; tests share theirs
    assert plan.replicas * len(plan.balance) // plan.virtual_stages == 1024
    assert sum(plan.balance) == 98
    assert max(plan.memory) <= 80 * GIB
    assert plan.shard_optimizer  # 28 bytes a parameter do not fit otherwise
    # No worker computes less than its share, at half of the peak.
    assert plan.seconds > 6 * GPT3.parameters * 1536 * 2048 / (1024 * 0.5 * 312e12)
    text = repr(plan)
    for words in ("98 layers, more than 24: deep", "memory-bound", "micro-batches", "interleaved", "undo='off'"):
        assert words in text
    # Each worker copies what it owns of its weights, a 32nd, so that doing without copies would make nothing faster.
    assert (plan.replicas, plan.without_copy) == (32, None)
    assert plan_gpt3(1024).arguments == plan.arguments == plan_gpt3(1024, undo="off").arguments | {"undo": "copy"}
    assert f"{optimal_microbatches(1024 // plan.replicas)} micro-batches bring it to 10%" in text


def test_a_plan_with_a_copy_says_what_would_be_faster_without() -> None:
    plan, without = plan_gpt3(128), plan_gpt3(128, undo="off")
    assert (plan.undo, plan.replicas, without.replicas) == ("copy", 2, 4)
    assert without.seconds < 0.8 * plan.seconds
    assert plan.without_copy is not None
    assert (plan.without_copy.candidate, plan.without_copy.seconds) == (without.best.candidate, without.seconds)
    assert (
        repr(plan)
        .partition("next cheaper choice\n  - ")[2]
        .startswith(
            f"undo='off': {without.seconds:.4g} s a step instead of {plan.seconds:.4g},"
            f" at most {max(without.memory) / GIB:.1f} GiB a worker (1f1b, 4 replicas of 32 workers"
        )
    )
    asked = plan_gpt3(128, undo="copy")
    assert (asked.arguments, asked.without_copy) == (plan.arguments, None)  # nobody has asked


def test_what_does_not_fit_says_what_would() -> None:
    """8 workers of 80 GiB hold an eighth of what GPT-3's training takes; what is said would do, does."""
    with pytest.raises(PartitionError, match=r"does not fit 8 workers of 80.0 GiB") as caught:
        plan_gpt3(8)
    message = str(caught.value)
    assert "2,611.0 GiB" in message  # 4 copies in single precision: none to take an update back from
    would = message.partition("What would do: ")[2]
    needed = float(would.split(" GiB")[0].replace(",", ""))
    assert plan_gpt3(8, memory=(needed + 1) * GIB, batch=64).workers == 8
    workers = int(would.partition(", or ")[2].split()[0])
    assert plan_gpt3(workers, batch=2 * workers, replicas=1).workers == workers
    with pytest.raises(PartitionError):
        plan_gpt3(workers - 1, batch=2 * workers, replicas=1)


def test_a_layer_that_is_too_large_is_named() -> None:
    with pytest.raises(PartitionError, match=r"the largest alone takes 27.0 GiB"):
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


def test_without_a_copy_nothing_is_faster_where_memory_does_not_bind() -> None:
    for memory in (1e4 * GIB, float("inf")):
        plan = plan_gpt3(8, memory=memory, batch=64, replicas=1)
        assert (plan.undo, plan.without_copy) == ("copy", None)
        assert "next cheaper choice" not in repr(plan)


def test_a_small_memory_wants_recomputation() -> None:
    free = plan_gpt3(8, memory=float("inf"), batch=64, replicas=1)
    tight = plan_gpt3(8, memory=max(free.memory) * 0.95, batch=64, replicas=1)
    assert max(tight.memory) <= 0.95 * max(free.memory)
    assert tight.seconds >= free.seconds


def machine(workers: int, memory: float = 80 * GIB) -> Machine:
    return Machine(workers, memory, 1e-5, 300e9)


def test_gpt3_fits_64_workers_of_80_gib_without_a_copy() -> None:
    """By hand, after Narayanan et al. (2021), section 5, and Korthikanti et al. (2022), equation 1.

    12 h² + 13 h parameters a block; 4 bytes each of weights, gradients and Adam's two moments; with everything
    recomputed a stage keeps s b h values of 2 bytes for each micro-batch under way, and of one micro-batch 34 s b h
    bytes and 12 h² cast weights.
    """
    plan = plan_gpt3(64, replicas=1)
    h, s, b = 12288, 2048, plan.micro_batch
    assert plan.undo == "off"
    assert "no plan fits with a copy" in repr(plan)
    assert max(plan.memory) <= 80 * GIB
    costs = CostModel({1: GPT3.layer_costs(1, 0.5 * 312e12)}, machine(64), 16 * s)
    with pytest.raises(PartitionError, match="copy that takes back a failed update"):
        decide(Search(costs, 1536, layouts=[(64, 1)]), "copy")
    ends = [0]
    for size in plan.balance:
        ends.append(ends[-1] + size)
    stage = 10
    blocks = ends[stage + 1] - ends[stage]
    part = plan.parts[stage]
    parameters = blocks * (12 * h**2 + 13 * h)
    assert part.weights == part.gradients == 4 * parameters
    assert part.optimizer == 2 * 4 * parameters
    assert part.copy == 0
    assert (plan.schedule, plan.checkpoint) == ("1f1b", "except_last")
    inputs, block = 2 * s * b * h, 34 * s * b * h + 2 * 12 * h**2
    assert part.activations == pytest.approx((64 - stage - 1) * inputs + blocks * block)
    assert sum(part.weights for part in plan.parts) == pytest.approx(4 * 175e9, rel=0.01)


def test_weights_of_16_bits_take_half_and_a_copy_fits() -> None:
    """16 bytes a parameter in single precision with the copy's 12: 28; half of that in bfloat16."""
    half = GPT(96, 12288, 96, 50257, 2048, "bfloat16", None)
    costs = CostModel({1: half.layer_costs(1, 0.5 * 312e12)}, machine(64), 16 * 2048)
    plan = decide(Search(costs, 1536, layouts=layouts(64, 98, 1)))
    assert plan.undo == "copy"
    assert plan.arguments["undo"] == "copy"
    held = sum(part.weights + part.gradients + part.optimizer + part.copy for part in plan.parts)
    assert held == pytest.approx(14 * half.parameters)
    assert any(one.startswith("undo='off'") for one in plan.cheaper)


@pytest.mark.parametrize("scores", [False, True])
def test_a_blocks_activations_are_those_of_korthikanti(scores: bool) -> None:
    """s b h (34 + 5 a s / h) bytes; without the scores, which one kernel for attention does not keep, 34 s b h."""
    h, s, a, b = 12288, 2048, 96, 3
    model = GPT(96, h, a, 50257, s, "bfloat16", None, scores)
    block = model.layer_costs(b, 1.0)[1]
    assert block.activation_bytes == s * b * h * (34 + (5 * a * s / h if scores else 0))


def test_a_table_and_a_picture_of_the_workers_memory() -> None:
    plan = plan_gpt3(64, replicas=1)
    text = repr(plan)
    for words in ("optimizer state", "activations", "working", "messages", "at most", "take less memory"):
        assert words in text
    assert "  copy" not in text.partition("memory of a worker")[2].partition("what would take")[0]
    svg = plan.memory_svg()
    assert svg.startswith("<svg ")
    root = ElementTree.fromstring(svg)
    bars = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if len(one)]
    assert len(bars) == 64 * 6
    widths = [float(bar.attrib["width"]) for bar in bars[:6]]
    parts = plan.parts[0]
    assert widths[2] / widths[0] == pytest.approx(parts.optimizer / parts.weights, rel=0.01)
    assert "limit 80.0 GiB" in svg
