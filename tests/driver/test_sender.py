"""A program's tasks travel once."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.driver.layout import Layout
from rpcpipe.driver.program import StepProgram
from rpcpipe.driver.sender import Issue, Sender
from rpcpipe.stage.context import StepContext
from rpcpipe.transport.message_pickling import MessagePickler
from rpcpipe.worker.operations import ReportStep, Task
from rpcpipe.worker.programs import KEPT_PROGRAMS, Keep, Kept, places
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle
from support.sent import Sent


def pipeline(cluster: Any, dispatch: str) -> rp.Pipeline:
    return rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=4, dispatch=dispatch)


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_a_step_refers_to_what_workers_keep(dispatch: str) -> None:
    cluster: Any = LocalCluster(2, 5)
    messages, pipe = Sent(cluster), pipeline(cluster, dispatch)
    (x, y), *_ = batches(1)
    parts = 2 if dispatch == "batched" else 2 * 2 * 4
    pipe.train_step(x, y)
    assert (messages.kinds[Keep], messages.kinds[Kept]) == (parts, 0)
    for count in (1, 2):
        pipe.train_step(x, y)
        assert (messages.kinds[Keep], messages.kinds[Kept]) == (parts, count * parts)


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_a_failed_step_is_sent_anew(dispatch: str) -> None:
    cluster: Any = LocalCluster(2, 5)
    messages, pipe = Sent(cluster), pipeline(cluster, dispatch)
    (x, y), *_ = batches(1)
    pipe.train_step(x, y)
    kept = messages.kinds[Keep]
    with pytest.raises(rp.StageError):
        pipe.train_step(x[:, :3], y)
    pipe.train_step(x, y)
    assert messages.kinds[Keep] == 2 * kept
    pipe.train_step(x, y)
    assert messages.kinds[Keep] == 2 * kept


def test_passes_under_way_in_any_order_need_no_kept_program() -> None:
    """More sizes of batches than workers keep, several under way, messages in any order."""
    sizes = [
        *range(1, KEPT_PROGRAMS + 1),
        *(size for pair in zip(range(1, 8), range(33, 40), strict=True) for size in pair),
    ]
    inputs = [torch.randn(size, 12) for size in sizes]
    for seed in range(3):
        pipe = rp.Pipeline(mlp(2), LocalCluster(2, seed), loss=cross_entropy, optimizer=sgd, chunks=40)
        outputs = list(pipe.predict(inputs))
        assert [len(output) for output in outputs] == sizes


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
def test_more_kinds_of_batches_than_workers_keep(dispatch: str) -> None:
    """Programs go from the workers and come again; the bits stay."""
    pipe = rp.Pipeline(
        mlp(2), LocalCluster(2, 7), loss=cross_entropy, optimizer=sgd, chunks=KEPT_PROGRAMS + 8, dispatch=dispatch
    )  # fmt: skip
    oracle = Oracle(mlp(2), sgd, cross_entropy, KEPT_PROGRAMS + 8)
    (x, y), *_ = batches(1, KEPT_PROGRAMS + 8)
    sizes = [*range(1, KEPT_PROGRAMS + 9), 3, 2, 1, KEPT_PROGRAMS, 3]
    for size in sizes:
        assert pipe.train_step(x[:size], y[:size]).loss == oracle.train_step(x[:size], y[:size])
    for name, value in pipe.state_dict().items():
        assert torch.equal(value, oracle.model.state_dict()[name])


def test_places() -> None:
    task = Task(None)  # type: ignore[arg-type]
    assert places([task, Keep(1, 0, (task, task)), Kept(1, 2, 7), task]) == 9


class Wire:
    """Pickles calls, and counts their bytes; values go another way."""

    def __init__(self) -> None:
        self.bytes = 0

    def _pickle(self, *args: Any, **_: Any) -> None:
        buffer = io.BytesIO()
        MessagePickler(buffer).dump(args)
        self.bytes += len(buffer.getbuffer())

    call = _pickle

    def send(self, *_: Any) -> None:
        pass

    def is_near(self, to: str) -> bool:
        return True


@pytest.mark.alone
def test_64_workers_are_issued_512_micro_batches_in_a_tenth_of_a_second() -> None:
    names = tuple(f"worker{number}" for number in range(64))
    step = StepProgram(rp.schedules.get("1f1b", 64, 512), Layout(names), [], [], shard=False)
    wire: Any = Wire()
    sender = Sender(wire, "pipeline", names, before=lambda step: None)
    inputs, targets = torch.zeros(512, 8), torch.zeros(512, 8)
    seconds, sizes = [], []
    for number in range(4):
        start, wire.bytes = time.perf_counter(), 0
        batch = step.cut(inputs)
        values = step.given(batch.parts, step.cut_targets(targets, batch))
        program = step.train(batch.counts, updates=True)
        plan = StepContext(number, number, True, batch.weights)
        ends = {name: [Task(ReportStep())] for name in names}
        sender.issue_batched(Issue(program, plan, values, ends, keep=True))
        sender.confirm(program)
        seconds.append(time.perf_counter() - start)
        sizes.append(wire.bytes)
    assert min(seconds[1:]) < 0.1
    assert max(sizes[1:]) < sizes[0] / 5
