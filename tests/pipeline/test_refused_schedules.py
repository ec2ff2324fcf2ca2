"""Schedules that would train something else than the plain loop, or nothing, are refused before anything trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.schedules import Action
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

GPIPE = rp.schedules.get("gpipe", 2, 2)


def own(*rows: str, chunks: int = 2, name: str = "own") -> rp.Schedule:
    """A schedule that nothing has looked at yet."""
    actions = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return rp.Schedule(name, chunks, tuple(range(len(rows))), actions)


REFUSED: dict[str, tuple[Any, str]] = {
    "forwards alone": (own("0F0 0F1", "1F0 1F1"), "has forwards alone and would train nothing: give every stage"),
    "an input gradient without weights'": (own("0F0 0I0", "1F0 1B0", chunks=1), r"stage 0, .* has \['F', 'I'\]"),
    "a weight gradient alone": (own("0F0 0W0", "1F0 1B0", chunks=1), r"has \['F', 'W'\]; it needs F and either"),
    "a backward for some micro-batches": (own("0F0 0F1 0B0", "1F0 1B0 1F1 1B1"), r"stage 0, micro-batch 1 has \['F'\]"),
    "a backward on some stages": (own("0F0", "1F0 1B0", chunks=1), r"stage 0, micro-batch 0 has \['F'\]"),
    "a backward twice": (own("0F0 0B0 0B0", "1F0 1B0", chunks=1), "does 0B0 more than once"),
    "a backward, whole and split": (own("0F0 0B0 0I0 0W0", "1F0 1B0", chunks=1), "it needs F and either B or I and W"),
    "a micro-batch left out": (own("0F0 0B0", "1F0 1B0"), "stage 0, micro-batch 1 has nothing"),
    "a micro-batch too many": (
        own("0F0 0B0 0F1 0B1", "1F0 1B0 1F1 1B1", chunks=1),
        "outside 2 stages × 1 micro-batches",
    ),
    "a stage left out": (dataclasses.replace(GPIPE, placement=(0, 1, 1)), "stage 2, micro-batch 0 has nothing"),
    "a worker left idle": (dataclasses.replace(own("0F0 0B0", chunks=1), actions=((), ())), "worker 0 nothing to do"),
    "a kind of one's own": (
        dataclasses.replace(GPIPE, actions=(*GPIPE.actions[:1], (*GPIPE.actions[1], Action("X", 1, 0)))),  # type: ignore[arg-type]
        "on worker 1 is no action",
    ),
    "text for actions": (dataclasses.replace(GPIPE, actions=(("0F0",), ("1F0",))), "'0F0' on worker 0 is no action"),
    "updates in an order of one's own": (own("0F0 0B0 0U0", "1F0 1B0 1U0", chunks=1), "leave U out"),
    "the name of a stream": (dataclasses.replace(GPIPE, name="pipedream"), "give the schedule another one"),
    "backwards out of order": (own("0F0 0F1 0B1 0B0", "1F0 1F1 1B1 1B0"), "ascending order of micro-batches"),
}


def pipeline(schedule: Any) -> rp.Pipeline:
    return rp.Pipeline(mlp(4), LocalCluster(2), loss=cross_entropy, optimizer=sgd, schedule=schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_at_construction_and_when_set(kind: str) -> None:
    schedule, message = REFUSED[kind]
    with pytest.raises(rp.ScheduleError, match=message):
        pipeline(schedule)
    pipe, [batch] = pipeline("1f1b"), batches(1)
    with pytest.raises(rp.ScheduleError, match=message):
        pipe.schedule = schedule
    assert pipe.schedule.name == "1f1b"
    assert pipe.train_step(*batch).applied


@pytest.mark.parametrize("rows", [[["0F0"]], [[("F", 0, 0)]], [[Action("F", 0.0, 0)]], [[Action("F", 0, True)]]])  # type: ignore[arg-type]
def test_what_is_no_action_makes_no_schedule(rows: Any) -> None:
    with pytest.raises(rp.ScheduleError, match="on worker 0 is no action: make it"):
        rp.Schedule.from_actions(rows)


def test_a_schedule_object_of_a_known_name_streams_as_the_name_does() -> None:
    losses = {}
    for schedule in ("pipedream", rp.schedules.get("pipedream", 2, 8)):
        losses[type(schedule)] = [result.loss for result in pipeline(schedule).train(batches(3))]
    assert losses[str] == losses[rp.Schedule]
    assert torch.isfinite(torch.tensor(losses[str])).all()
