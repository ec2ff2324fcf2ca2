"""What a view collects of a run, without a server."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import rpcpipe as rp
from rpcpipe.cluster.liveness import ClusterEvent
from rpcpipe.driver.events import PipelineEvent
from rpcpipe.view.file_source import FileSource
from rpcpipe.view.history import History, Point
from rpcpipe.view.recorder import Recorder, events, plan_of
from rpcpipe.view.source import SPANS, message, packed, unpacked
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

recording = importlib.import_module("rpcpipe.view.recorder")


def point(step: int) -> Point:
    return Point(step, 1.0 / (step + 1), 1.0, 0.1, 0.5, 10.0, 0.0)


def local(workers: int = 2, **arguments: Any) -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(workers), loss=cross_entropy, optimizer=sgd, **{"chunks": 2, **arguments})


def steps(history: History, cursor: int = 0) -> list[int]:
    return [one.step for one in history.since(cursor)[0]]


def test_a_reader_gets_what_is_new() -> None:
    history = History()
    assert history.since(0) == ([], 0)
    for step in range(3):
        history.add(point(step))
    found, cursor = history.since(0)
    assert found == [point(0), point(1), point(2)]
    history.add(point(3))
    assert history.since(cursor) == ([point(3)], 4)
    assert history.since(4) == ([], 4)


def test_a_step_that_is_done_again_counts_alone() -> None:
    """As after a checkpoint was loaded."""
    history = History()
    for step in range(5):
        history.add(point(step))
    cursor = history.since(0)[1]
    history.add(point(2))
    assert steps(history) == [0, 1, 2]
    assert steps(history, cursor) == [2]


def test_of_many_points_every_second_is_dropped() -> None:
    history = History()
    for step in range(10_000):
        history.add(point(step))
    found = steps(history)
    assert 2000 <= len(found) <= 4000
    assert found[0] == 0
    assert found[-1] == 9999


def test_a_recorder_has_figures_timelines_workers_and_stages() -> None:
    pipe = local(3, chunks=4)
    recorder = Recorder(pipe)
    assert recorder.timelines() == []
    pipe.on_step(recorder.add)
    results = [pipe.train_step(*batch) for batch in batches(3, size=8)]
    content = json.loads(message(recorder)[0])
    assert content["title"].startswith("Pipeline(1f1b, 3 stages, 4 micro-batches, 3 steps")
    assert content["state"] == "live"
    assert [one[:3] for one in content["points"]] == [[r.step, r.loss, r.grad_norm] for r in results]
    assert content["points"][-1][5] == pytest.approx(8 / results[-1].seconds)
    assert [one["stages"] for one in content["workers"]] == [[0], [1], [2]]
    assert all(0 < one["busy"] < 1 for one in content["workers"])
    assert [row[:2] for row in content["stages"]["rows"]] == [[str(k), f"worker{k}"] for k in range(3)]
    planned, measured = content["timelines"]
    assert (planned["name"], measured["name"]) == ("planned", "measured")
    assert sorted(span[:4] for span in planned["spans"]) == sorted(span[:4] for span in measured["spans"])
    assert measured["makespan"] == results[-1].timeline.makespan
    assert planned["makespan"] <= measured["makespan"] * (1 + 1e-9)


def test_a_step_by_hand_is_a_step_like_others() -> None:
    pipe = local(chunks=4)
    recorder = Recorder(pipe)
    pipe.on_step(recorder.add)
    [first, second] = batches(2, size=8)
    pipe.train_step(*first)
    with pipe.step() as step:
        loss = step.forward_backward(*second)
        step.optimize()
        assert [one[0] for one in json.loads(message(recorder)[0])["points"]] == [0]
    content = json.loads(message(recorder)[0])
    assert "2 steps trained" in content["title"]
    assert [one[0] for one in content["points"]] == [0, 1]
    assert content["figures"]["loss"] == loss
    planned, measured = content["timelines"]
    assert sorted(span[:4] for span in planned["spans"]) == sorted(span[:4] for span in measured["spans"])
    pipe.stages[0].call(len)  # is no step
    assert json.loads(message(recorder)[0])["points"] == content["points"]


def test_what_a_client_has_is_not_sent_again() -> None:
    pipe = local()
    recorder = Recorder(pipe)
    pipe.on_step(recorder.add)
    [first, second] = batches(2)
    pipe.train_step(*first)
    text, cursor, version = message(recorder)
    assert json.loads(text)["full"]
    later = json.loads(message(recorder, cursor, version)[0])
    assert not later["full"]
    assert later["points"] == []
    assert "timelines" not in later
    pipe.train_step(*second)
    later = json.loads(message(recorder, cursor, version)[0])
    assert [one[0] for one in later["points"]] == [1]
    assert len(later["timelines"]) == 2


def test_replicas_have_the_rows_of_their_own_workers() -> None:
    pipe = local(4, replicas=2)
    [batch] = batches(1, size=8)
    measured = pipe.train_step(*batch).timeline
    planned = plan_of(measured, pipe.schedule)
    assert planned is not None
    assert sorted(span[:4] for span in planned.spans) == sorted(span[:4] for span in measured.spans)


def test_a_stream_and_a_smaller_batch_have_no_plan() -> None:
    pipe = local(schedule="pipedream")
    recorder = Recorder(pipe)
    pipe.on_step(recorder.add)
    [batch] = batches(1)
    result = pipe.train_step(*batch)
    assert [one.name for one in recorder.timelines()] == ["measured"]
    assert result.samples == 10
    pipe.schedule = "1f1b"
    one = pipe.train_step(batch[0][:1], batch[1][:1])  # one sample, so one micro-batch
    assert plan_of(one.timeline, pipe.schedule) is None
    assert one.samples == 1


def test_checkpoints_resizes_and_schedules_are_events(tmp_path: Path) -> None:
    pipe = local(3, balance=[4, 4])
    [batch] = batches(1)
    pipe.train_step(*batch)
    folder = pipe.save(tmp_path)
    pipe.load(tmp_path)
    pipe.schedule = "gpipe"
    pipe.resize(3)
    assert [(one.kind, one.step) for one in pipe.events] == [
        ("saved", 1), ("loaded", 1), ("schedule", 1), ("resized", 1),
    ]  # fmt: skip
    found = json.loads(message(Recorder(pipe))[0])["events"]
    assert [(one["kind"], one["what"]) for one in found] == [
        ("saved", f"after step 1: {folder}"), ("loaded", f"after step 1: {folder}"),
        ("schedule", "after step 1: 1f1b → gpipe"), ("resized", "after step 1: 2 → 3 workers, 3 stages"),
    ]  # fmt: skip


def test_events_of_cluster_and_pipeline_are_in_order_of_time() -> None:
    died = ClusterEvent("died", "worker1", "host", 7, "was killed by SIGKILL.\nMore", time=2.0)
    replaced = ClusterEvent("replaced", "worker1", "host", 8, "was killed by SIGKILL.", 0.25, time=3.0)
    saved = [PipelineEvent("saved", 4, "run/1", time=1.0), PipelineEvent("saved", 9, "run/2", time=4.0)]
    assert [(one["kind"], one["what"]) for one in events([died, replaced], saved)] == [
        ("saved", "after step 4: run/1"),
        ("died", "worker1 (host:7) was killed by SIGKILL."),
        ("replaced", "worker1 (host:8) was killed by SIGKILL., in 0.25 s"),
        ("saved", "after step 9: run/2"),
    ]


def test_a_fault_of_the_view_does_not_reach_training(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = local()
    recorder = Recorder(pipe)
    pipe.on_step(recorder.add)
    monkeypatch.setattr(recording, "record", lambda result: 1 // 0)
    [first, second] = batches(2)
    pipe.train_step(*first)
    monkeypatch.undo()
    assert pipe.train_step(*second).step == 1
    assert steps(recorder.history) == [1]


def test_results_tensors_are_not_kept() -> None:
    pipe = local()
    recorder = Recorder(pipe)
    pipe.on_step(recorder.add)
    [batch] = batches(1)
    pipe.train_step(*batch, outputs=True)
    assert "outputs" not in json.loads(message(recorder)[0])["figures"]


def test_a_timeline_travels_as_it_is() -> None:
    timeline = rp.schedules.get("zb-h1", 4, 8).simulate()
    again = unpacked(json.loads(json.dumps(packed(timeline))))
    assert again.to_text() == timeline.to_text()


def test_of_a_long_timeline_the_beginning_travels() -> None:
    timeline = rp.schedules.get("gpipe", 8, 300).simulate()
    content = packed(timeline)
    assert content["count"] == 4800
    assert len(content["spans"]) == SPANS
    assert content["makespan"] == timeline.makespan
    assert content["spans"][0][4] == 0


# --- files ---


def test_a_file_is_read_as_it_grows(tmp_path: Path) -> None:
    pipe, path = local(), tmp_path / "run.jsonl"
    pipe.on_step(path)
    [first, second] = batches(2)
    result = pipe.train_step(*first)
    source = FileSource(path)
    content = json.loads(message(source)[0])
    assert (content["title"], content["state"]) == ("run.jsonl", "file")
    assert content["figures"]["loss"] == result.loss
    assert content["points"][0][5] == pytest.approx(10 / result.seconds)
    assert content["timelines"] == content["workers"] == content["events"] == []
    with path.open("ab") as file:
        file.write(b'{"step": 1, "lo')  # torn, as while a line is being written
    assert json.loads(message(source, 1)[0])["points"] == []
    path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n")
    pipe.train_step(*second)
    assert [one[0] for one in json.loads(message(source, 1)[0])["points"]] == [1]


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [
        '{"step": 0, "loss": NaN, "grad_norm": 1.0, "seconds": 0.1}', "[]", '{"step": "x"}', "", "{", "null",
        '{"step": 1, "loss": "x", "grad_norm": 1, "seconds": 1}',
        '{"step": 2, "loss": 1e999, "grad_norm": 1, "seconds": 1}',
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    source = FileSource(path)
    assert source.state()["title"] == "run.jsonl, 6 lines are no records"
    assert source.history.since(0)[0] == [Point(0, None, 1.0, 0.1, None, None, None)]
    json.loads(message(source)[0])


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(rp.ArgumentError, match=r"notes\.txt was not written by rp\.callbacks\.JsonLines"):
        FileSource(path)
    path.write_text("")
    assert FileSource(path).history.since(0)[0] == []
    with pytest.raises(OSError, match="gone"):
        FileSource(tmp_path / "gone")
