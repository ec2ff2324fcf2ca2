"""Rounds in which workers send what they have restored, beside a sender that only writes down what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pytest

from rpcpipe.driver.sharing import Sharing
from rpcpipe.worker.messages import Port
from rpcpipe.worker.operations import ReportStep, ShareWeights, Task

AWAITS = Task(ReportStep(), (Port(None, "weights"),))


class Notebook:
    """Two workers; ``told``: by worker, what it was sent, and the reply, which nobody gives."""

    def __init__(self) -> None:
        self.workers = ["a", "b"]
        self.told: dict[str, list[tuple[Task, Future[Any]]]] = {worker: [] for worker in self.workers}
        self.cancelled: list[tuple[int, Mapping[str, int]]] = []
        self.ensured: list[str] = []
        self._steps = 10

    def new_step(self) -> int:
        self._steps += 1
        return self._steps - 1

    def places(self) -> dict[str, int]:
        return {worker: len(told) for worker, told in self.told.items()}

    def send(self, worker: str, step: int, task: Task) -> Future[Any]:
        self.told[worker].append((task, Future()))
        return self.told[worker][-1][1]

    def cancel(self, step: int, first: Mapping[str, int]) -> None:
        self.cancelled.append((step, dict(first)))

    def ensure_again(self, worker: str) -> None:
        self.ensured.append(worker)

    def finish(self) -> None:
        for told in self.told.values():
            for _, reply in told:
                if not reply.done():
                    reply.set_result(None)


@pytest.fixture
def sharing() -> Sharing:
    sharing = Sharing()
    sharing.gathers = {"a": [AWAITS], "b": [AWAITS]}
    return sharing


def test_every_worker_sends_and_receives(sharing: Sharing) -> None:
    sender = Notebook()
    sharing.begin(sender)
    expected = [Task(ShareWeights(10)), AWAITS]
    assert {worker: [task for task, _ in told] for worker, told in sender.told.items()} == {
        "a": expected,
        "b": expected,
    }


def test_nothing_is_sent_where_nothing_is_sharded() -> None:
    sender = Notebook()
    Sharing().begin(sender)
    assert sender.places() == {"a": 0, "b": 0}


def test_a_round_that_all_have_finished_is_not_made_again(sharing: Sharing) -> None:
    sender = Notebook()
    sharing.begin(sender)
    sender.finish()
    sharing.again(sender)
    assert sender.places() == {"a": 2, "b": 2}
    assert not sender.cancelled


def test_workers_are_freed_from_the_oldest_round_in_which_they_wait_for_one_that_died(sharing: Sharing) -> None:
    sender = Notebook()
    sharing.begin(sender)
    sender.finish()
    sharing.begin(sender)  # one dies in it, which the next call notices: its failure is rolled back, too
    sharing.begin(sender)
    sharing.again(sender)
    assert sender.cancelled == [(12, {"a": 2, "b": 2})]
    assert sender.ensured == ["a", "b"]
    assert [task for task, _ in sender.told["a"][6:]] == [Task(ShareWeights(13)), AWAITS]
    sender.finish()
    sharing.again(sender)
    assert sender.places() == {"a": 8, "b": 8}


def test_nothing_is_made_again_once_all_state_has_been_replaced(sharing: Sharing) -> None:
    sender = Notebook()
    sharing.begin(sender)
    sharing.end()
    sharing.again(sender)
    assert sender.places() == {"a": 2, "b": 2}
    assert not sender.cancelled
