"""Figures out: a callback per step, JSON lines, TensorBoard."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.driver.callbacks import record
from rpcpipe.driver.result import StreamResult
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle


def local(**arguments: Any) -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(3), loss=cross_entropy, optimizer=sgd, chunks=3, **arguments)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_every_step_is_told_once_in_order(schedule: str) -> None:
    pipe, seen = local(schedule=schedule), list[rp.StepResult]()
    pipe.on_step(seen.append)
    results = [pipe.train_step(*batch) for batch in batches(2)]
    results += pipe.train(batches(4))
    assert seen == results
    for _ in pipe.train(batches(4)):  # left at once: what was fed is trained, so it is told
        break
    assert [result.step for result in seen] == sorted({result.step for result in seen})
    assert pipe.trained == seen[-1].step + (1 if schedule == "1f1b" else 3)


@pytest.mark.parametrize(("schedule", "ahead"), [("1f1b", 0), ("1f1b", 1), ("pipedream", 0)])
def test_results_say_how_many_samples_they_are_of(schedule: str, ahead: int) -> None:
    pipe = local(schedule=schedule)
    given = [next(batches(1, size)) for size in (10, 7, 2)]
    assert [result.samples for result in pipe.train(given, ahead=ahead)] == [10, 7, 2]
    read = rp.RemoteBatches(lambda: batches(2, 6))
    assert [record(result)["samples"] for result in pipe.train(read, ahead=ahead)] == [6, 6]


@pytest.mark.parametrize(("schedule", "ahead"), [("1f1b", 0), ("1f1b", 1), ("pipedream", 0)])
def test_results_of_token_ids_say_how_many_tokens_they_are_of(schedule: str, ahead: int) -> None:
    pipe = rp.Pipeline(
        nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 4), nn.Flatten(0, 1)), LocalCluster(2), chunks=3,
        loss=lambda output, target: cross_entropy(output, target.flatten()), optimizer=sgd, schedule=schedule,
    )  # fmt: skip
    given = [(torch.ones(size, 5, dtype=torch.long), torch.ones(size, 5, dtype=torch.long)) for size in (6, 2)]
    results = [*pipe.train(given, ahead=ahead), *pipe.train(rp.RemoteBatches(lambda: iter(given)), ahead=ahead)]
    assert [(one.samples, one.tokens) for one in results] == [(6, 30), (2, 10)] * 2
    assert [one.throughput for one in results] == [one.tokens / one.seconds for one in results]
    assert record(results[0])["throughput"] == results[0].throughput


@pytest.mark.parametrize("undo", ["copy", "off"])
def test_a_step_by_hand_is_told_at_the_end_of_its_block(undo: str, tmp_path: Path) -> None:
    pipe, seen = local(undo=undo), list[rp.StepResult]()
    pipe.on_step(seen.append)
    pipe.on_step(tmp_path / "run.jsonl")
    [first, second] = batches(2)
    pipe.train_step(*first)
    with pipe.step() as step:
        loss = step.forward_backward(*second)
        step.optimize()
        assert len(seen) == 1
    assert (seen[1].step, seen[1].loss, seen[1].applied, seen[1].samples) == (1, loss, True, 10)
    assert seen[1].seconds > 0
    assert [line["loss"] for line in lines(tmp_path / "run.jsonl")] == [one.loss for one in seen]
    step.__exit__(None, None, None)
    assert len(seen) == pipe.trained == 2


def test_a_step_by_hand_that_does_not_count_is_told_to_nobody() -> None:
    pipe, seen = local(), list[rp.StepResult]()
    pipe.on_step(seen.append)
    with pipe.step():
        pass
    with pytest.raises(ZeroDivisionError), pipe.step() as step:  # noqa: PT012
        step.forward_backward(*next(batches(1)))
        raise ZeroDivisionError
    assert pipe.trained == 0
    assert seen == []


def test_what_a_callback_raises_of_a_step_by_hand_comes_out_of_its_block() -> None:
    pipe = local()
    pipe.on_step(lambda result: 1 // 0)
    with pytest.raises(ZeroDivisionError) as caught, pipe.step() as step:  # noqa: PT012
        step.forward_backward(*next(batches(1)))
        step.optimize()
    assert "after step 0, which is done and counted" in caught.value.__notes__[0]
    assert pipe.trained == 1
    pipe.callbacks.clear()
    assert pipe.train_step(*next(batches(1))).step == 1


def test_other_results_have_samples_per_second() -> None:
    result = local().train_step(*next(batches(1)))
    assert (result.tokens, result.throughput) == (0, 10 / result.seconds)


def test_json_lines_hold_the_figures(tmp_path: Path) -> None:
    pipe, path = local(), tmp_path / "run.jsonl"
    pipe.on_step(path)
    scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 1, gamma=0.5)
    results = []
    for batch in batches(3):
        results.append(pipe.train_step(*batch))
        assert len(lines(path)) == len(results)  # at once
        scheduler.step()
    for line, result in zip(lines(path), results, strict=True):
        assert (line["step"], line["loss"], line["grad_norm"]) == (result.step, result.loss, result.grad_norm)
        assert (line["seconds"], line["bubble"], line["applied"]) == (result.seconds, result.bubble, True)
        assert line["peak_in_flight"] == list(result.peak_in_flight)
        assert line["peak_activation_bytes"] == list(result.peak_activation_bytes)
    assert [line["lr"] for line in lines(path)] == [[0.1], [0.05], [0.025]]
    assert line["time"] > 1.6e9
    assert line["metrics"] == {}
    pipe.train_step(*batch, metrics={"one": lambda output, target: (2, 2), "none": lambda output, target: (0, 0)})
    assert lines(path)[-1]["metrics"] == {"one": 1.0, "none": None}


def test_a_record_holds_every_figure_and_has_the_same_keys_under_all_schedules() -> None:
    sync, streamed = (local(schedule=schedule).train_step(*next(batches(1))) for schedule in ("1f1b", "pipedream"))
    assert list(record(sync)) == list(record(streamed))
    fields = {field.name for field in dataclasses.fields(StreamResult)}
    figures = fields - {"timeline", "idle", "outputs", "input_grads"} | {"bubble", "throughput"}
    assert set(record(streamed)) == figures
    assert type(sync) is rp.StepResult
    assert type(streamed) is StreamResult
    assert record(sync)["versions"] == []
    assert record(streamed)["versions"] != []


def test_nan_is_null(tmp_path: Path) -> None:
    pipe = local()
    pipe.on_step(str(tmp_path / "run.jsonl"))
    pipe.train_step(torch.full((6, 12), torch.nan), torch.zeros(6, dtype=torch.long))
    (line,) = lines(tmp_path / "run.jsonl")
    assert (line["loss"], line["grad_norm"], line["applied"]) == (None, None, False)


@pytest.mark.parametrize("torn", [b"", b'{"step": 1, "lo', b"x" * 200_000])
def test_a_resumed_run_appends_to_whole_lines(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step": 0}\n' + torn)
    pipe = local()
    pipe.on_step(path)
    pipe.train_step(*next(batches(1)))
    pipe.train_step(*next(batches(1)))
    assert [line["step"] for line in lines(path)] == [0, 0, 1]
    path.write_bytes(torn)
    rp.callbacks.JsonLines(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_a_callback_that_raises_tears_nothing(schedule: str) -> None:
    pipe, told = local(schedule=schedule), list[int]()

    def full(result: rp.StepResult) -> None:
        if result.step == 0:
            raise OSError("no space left")

    pipe.on_step(full)
    pipe.on_step(full)
    pipe.on_step(lambda result: told.append(result.step))
    first, second = batches(2)
    with pytest.raises(OSError, match="no space left") as caught:
        pipe.train_step(*first)
    assert any("step 0, which is done and counted" in note for note in caught.value.__notes__)
    assert told == [0]
    assert pipe.trained == (1 if schedule == "1f1b" else 3)
    loss = pipe.train_step(*second).loss
    if schedule == "1f1b":
        oracle = Oracle(mlp(), sgd, cross_entropy, 3)
        assert [oracle.train_step(*batch) for batch in (first, second)][1] == loss


def test_close_closes_them(tmp_path: Path) -> None:
    pipe = local()
    written = pipe.on_step(tmp_path / "run.jsonl")
    pipe.on_step(print)
    result = pipe.train_step(*next(batches(1)))
    pipe.close()
    with pytest.raises(ValueError, match="closed"):
        written(result)


def test_tensorboard_reads_the_figures_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pipe = local()
    board = pipe.on_step(rp.callbacks.TensorBoard(tmp_path))
    results = [pipe.train_step(*batch, metrics={"one": lambda output, target: (2, 2)}) for batch in batches(3)]
    pipe.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([result.loss for result in results])
    assert {"bubble", "lr/0", "peak_in_flight/2", "applied", "metrics/one"} <= set(events.Tags()["scalars"])
    resumed = rp.callbacks.TensorBoard(tmp_path)
    resumed(dataclasses.replace(results[1], loss=7.0))
    resumed.close()
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")][1:] == [(1, 7.0)]
    assert str(tmp_path) in repr(board)


def test_tensorboard_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(rp.DependencyError, match=r"pip install '\.\[track\]'"):
        rp.callbacks.TensorBoard(tmp_path)
