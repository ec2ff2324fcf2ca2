"""torch.distributed.pipelining's schedules, as its own ``_dump_csv`` writes them, read and run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as theirs

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights

FORMATS = ("compute_only", "compute_comms")
KINDS = {
    "interleaved": (theirs.ScheduleInterleaved1F1B, (0, 2)),
    "interleaved, zero bubble": (theirs.ScheduleInterleavedZeroBubble, (0, 2)),
    "zero bubble in a V": (theirs.ScheduleZBVZeroBubble, (0, 3)),
    "dualpipe in a V": (theirs.ScheduleDualPipeV, (0, 3)),
    "breadth first": (theirs.ScheduleLoopedBFS, (0, 2)),
}


def dumped(kind: str, layout: str, folder: Path) -> tuple[str, Any]:
    """(torch's CSV for 2 workers, 4 stages and 6 micro-batches, its rows of actions)."""
    make, own = KINDS[kind]
    about = {"num_stages": 4, "group_rank": 0, "group_size": 2, "has_backward": False, "submod": None, "device": "cpu"}
    stages = [SimpleNamespace(stage_index=index, is_first=index == 0, is_last=index == 3, **about) for index in own]
    schedule: Any = make(stages, 6, loss_fn=lambda output, target: output)  # type: ignore[arg-type]
    schedule._dump_csv(folder / "rows.csv", layout)
    return (folder / "rows.csv").read_text(), schedule.pipeline_order.values()


def flat(row: Any) -> list[str]:
    """The compute actions of torch's row, an overlap as its two."""
    parts = [part for action in row if action for part in action.sub_actions or (action,)]
    return [str(part) for part in parts if part.is_compute_op]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "breadth first"])
def test_a_dump_is_read_and_trains_as_the_plain_loop(kind: str, layout: str, tmp_path: Path) -> None:
    text, order = dumped(kind, layout, tmp_path)
    schedule = rp.Schedule.from_csv(text)
    assert [list(map(str, row)) for row in schedule.actions] == [flat(row) for row in order]
    assert rp.Schedule.from_csv(schedule.to_csv()).actions == schedule.actions
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, schedule=schedule)  # type: ignore[arg-type]
    loop = Oracle(mlp(), sgd, cross_entropy, 6)
    for inputs, targets in batches(2, 12):
        assert pipe.train_step(inputs, targets).loss == loop.train_step(inputs, targets)
    assert_same_weights(pipe, loop.model)


@pytest.mark.parametrize("layout", FORMATS)
def test_backwards_in_descending_order_are_refused(layout: str, tmp_path: Path) -> None:
    text, _ = dumped("breadth first", layout, tmp_path)
    with pytest.raises(rp.ScheduleError, match=r"worker 0 does 2B4 after 2B5: .* ascending order of micro-batches"):
        rp.Schedule.from_csv(text)


OVERLAPS = ("(0F1;0B0)OVERLAP_F_B", " ( 0F1 ; 0B0 )OVERLAP_F_B ")
IMPLIED = ("0UNSHARD", "0RESHARD", "0REDUCE_GRAD", "0SEND_F0", "1RECV_F12", "0SEND_B0", " 0RECV_B0", "", " ")
NONSENSE = (
    "(0F1)OVERLAP_F",
    "(0F1;;0B0)OVERLAP_F_B",
    "()OVERLAP_F_B",
    "0F1;0B0",
    "0SEND",
    "UNSHARD",
    "0SEND_F0x",
    "0F",
)


def test_every_cell_of_torchs_notation_has_its_meaning() -> None:
    for cell in OVERLAPS:
        assert list(map(str, rp.Schedule.from_csv(f"0F0,{cell},0B1\n").actions[0])) == ["0F0", "0F1", "0B0", "0B1"]
    for cell in IMPLIED:
        assert list(map(str, rp.Schedule.from_csv(f"0F0,{cell},0B0\n").actions[0])) == ["0F0", "0B0"]
    for cell in NONSENSE:
        with pytest.raises(rp.ScheduleError, match="is no action"):
            rp.Schedule.from_csv(f"0F0,0B0,{cell}\n")
