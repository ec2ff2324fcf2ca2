"""No schedule takes longer, or keeps more activations on any worker, than torch.distributed.pipelining's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as theirs

import rpcpipe as rp
from rpcpipe.schedules import Action

# (ours, torch's, stages per worker); torch's last with two or more has no counterpart here.
PAIRS = [
    ("gpipe", "ScheduleGPipe", (1,)),
    ("gpipe", "ScheduleLoopedBFS", (1,)),
    ("1f1b", "Schedule1F1B", (1,)),
    ("eager-1f1b", "ScheduleInterleaved1F1B", (1,)),
    ("interleaved", "ScheduleInterleaved1F1B", (2, 3, 4)),
    ("looped-bfs", "ScheduleLoopedBFS", (2, 3, 4)),
    ("zb-v", "ScheduleZBVZeroBubble", (2,)),
    ("dualpipe-v", "ScheduleDualPipeV", (2,)),
    ("zb-h1", "ScheduleInterleavedZeroBubble", (1,)),
]
# Of the 256 sizes for each number of stages per worker, those that torch accepts, where it refuses some.
ACCEPTED = {
    "Schedule1F1B": 228, "ScheduleDualPipeV": 192,
    "ScheduleInterleaved1F1B": 163, "ScheduleInterleavedZeroBubble": 163,
}  # fmt: skip


class Recorded(theirs.Schedule1F1B):
    """Torch's 1F1B as it runs: the order that it lists begins, on the last worker, with micro-batch 1."""

    def row(self) -> list[Action]:
        done: list[Action] = []
        stage: Any = self._stage
        stage.forward_one_chunk = lambda chunk, *_, **__: done.append(Action("F", stage.stage_index, chunk))
        stage.backward_one_chunk = lambda chunk, **_: done.append(Action("B", stage.stage_index, chunk))
        for operations in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            setattr(stage, operations, lambda chunk: [])
        stage.perform_reduce_grad = lambda scale: None
        self._step_microbatches()
        return done

    def _initialize_stage(self, *_: object) -> None:
        pass


def stages_of(placement: tuple[int, ...], rank: int) -> list[Any]:
    last = len(placement) - 1
    about = {"num_stages": last + 1, "group_rank": rank, "group_size": max(placement) + 1, "has_backward": False}
    return [
        SimpleNamespace(stage_index=stage, is_first=stage == 0, is_last=stage == last, submod=None, **about)
        for stage, worker in enumerate(placement)
        if worker == rank
    ]


def flat(row: list[Any]) -> Iterator[Action]:
    """The compute actions of torch's row, an overlap as its two."""
    for part in (part for action in row if action for part in action.sub_actions or (action,)):
        if part.is_compute_op:
            yield Action(part.computation_type.value, part.stage_index, part.microbatch_index)


def torchs_rows(kind: str, placement: tuple[int, ...], chunks: int) -> list[list[Action]]:
    """Torch's rows; raises ValueError for sizes that torch refuses."""
    make = getattr(theirs, kind)
    if make is theirs.Schedule1F1B:
        return [Recorded(*stages_of(placement, rank), chunks).row() for rank in placement]
    stages = stages_of(placement, 0)
    # Sends and receives, which take most of the time, follow from the order.
    computed = type(kind, (make,), {"_prepare_schedule_with_comms": lambda self, order: None})
    order = computed(stages[0] if make is theirs.ScheduleGPipe else stages, chunks).pipeline_order
    return [list(flat(row)) for row in order.values()]


def simulated(
    name: str, kind: str, workers: int, chunks: int, virtual: int
) -> tuple[rp.schedules.Timeline, rp.schedules.Timeline] | None:
    """Ours and torch's at F = I = W = 1; None where torch refuses the sizes."""
    placement = rp.schedules.placement(name, workers, virtual)
    try:
        rows = torchs_rows(kind, placement, chunks)
    except ValueError:
        return None
    # Not validated: torch's breadth-first order sums gradients in descending order of micro-batches.
    torchs = rp.Schedule(kind, chunks, placement, tuple(map(tuple, rows)))
    return rp.schedules.get(name, workers, chunks, virtual).simulate(), torchs.simulate()


@pytest.mark.parametrize(("name", "kind", "virtuals"), PAIRS)
def test_none_is_worse_than_torchs_in_time_or_memory(name: str, kind: str, virtuals: tuple[int, ...]) -> None:
    worse, compared = [], 0
    for workers, chunks, virtual in product(range(1, 9), range(1, 33), virtuals):
        if pair := simulated(name, kind, workers, chunks, virtual):
            compared += 1
            (time, held), (their_time, they_held) = ((one.makespan, one.peak_in_flight) for one in pair)
            if time > their_time or any(a > b for a, b in zip(held, they_held, strict=True)):
                worse.append((workers, chunks, virtual, time, their_time, held, they_held))
    assert not worse
    assert compared == len(virtuals) * ACCEPTED.get(kind, 8 * 32)
