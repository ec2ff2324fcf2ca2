"""How inputs and targets say what a micro-batch gets of them, and the gradients of inputs that require one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import sgd
from support.oracle import assert_same_weights

Tensor = torch.Tensor


class Masked(nn.Module):
    """Takes (batch, 4), or a dict of ``x`` and what each case adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, d: Any) -> Tensor:
        if not isinstance(d, dict):
            return self.linear(d)
        h = self.linear(d["x"])
        if "mask" in d:
            h = h * d["mask"]
        return h + d["time"].mean(0) if "time" in d else h


def mse(output: Tensor, target: Any) -> Tensor:
    return nn.functional.mse_loss(output, target["y"] if isinstance(target, dict) else target)


def tensors(seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {"x": draw(8, 4), "y": draw(8, 4), "mask": draw(4), "table": draw(8, 4), "time": draw(3, 8, 4)}


def layers() -> list[nn.Module]:
    torch.manual_seed(2)
    return [Masked(), nn.Linear(4, 4)]


Parts = list[tuple[Any, Any, float]]


def halves(make: Callable[[slice], Any], target: Callable[[slice], Any], weight: float = 0.5) -> Parts:
    return [(make(part), target(part), weight) for part in (slice(0, 4), slice(4, 8))]


# By name: the inputs, the targets, and (inputs, target, weight) of each micro-batch.
CASES: dict[str, Callable[[dict[str, Tensor]], tuple[Any, Any, Parts]]] = {
    "replicated": lambda t: (
        {"x": t["x"], "mask": rp.Replicated(t["mask"])}, t["y"],
        halves(lambda s: {"x": t["x"][s], "mask": t["mask"]}, lambda s: t["y"][s]),
    ),
    "replicated of the batch's size": lambda t: (
        {"x": t["x"][:, :4], "mask": rp.Replicated(t["table"][:1])}, t["y"],
        halves(lambda s: {"x": t["x"][s], "mask": t["table"][:1]}, lambda s: t["y"][s]),
    ),
    "batched in dimension 1": lambda t: (
        {"x": t["x"], "time": rp.Batched(t["time"], dim=1)}, t["y"],
        halves(lambda s: {"x": t["x"][s], "time": t["time"][:, s]}, lambda s: t["y"][s]),
    ),
    "batched in the dimension before last": lambda t: (
        {"x": t["x"], "time": rp.Batched([t["time"]], dim=-2)}, t["y"],
        halves(lambda s: {"x": t["x"][s], "time": t["time"][:, s]}, lambda s: t["y"][s]),
    ),
    "targets": lambda t: (
        t["x"], {"y": rp.Batched(t["y"].T.contiguous().T, dim=0), "all": rp.Replicated(t["table"])},
        halves(lambda s: t["x"][s], lambda s: {"y": t["y"][s]}),
    ),
    "cut by the caller": lambda t: (
        rp.MicroBatches([t["x"][:3], t["x"][3:]]), rp.MicroBatches([t["y"][:3], t["y"][3:]]),
        [(t["x"][:3], t["y"][:3], 3 / 8), (t["x"][3:], t["y"][3:], 5 / 8)],
    ),
    "cut by the caller, weighted": lambda t: (
        rp.MicroBatches([t["x"][:3], t["x"][3:]], weights=[3, 1]), rp.MicroBatches([t["y"][:3], t["y"][3:]]),
        [(t["x"][:3], t["y"][:3], 0.75), (t["x"][3:], t["y"][3:], 0.25)],
    ),
    "cut by the caller, of no common size": lambda t: (
        {"x": rp.MicroBatches([t["x"][:2], t["x"][2:]]), "mask": rp.MicroBatches([t["mask"], t["mask"]])},
        rp.MicroBatches([t["y"][:2], t["y"][2:]]),
        [({"x": t["x"][s], "mask": t["mask"]}, t["y"][s], 0.5) for s in (slice(0, 2), slice(2, 8))],
    ),
    "cut by the caller, with what all share": lambda t: (
        {"x": rp.MicroBatches([t["x"][:3], t["x"][3:]]), "mask": rp.Replicated(t["mask"])},
        rp.MicroBatches([t["y"][:3], t["y"][3:]]),
        [({"x": t["x"][s], "mask": t["mask"]}, t["y"][s], w) for s, w in ((slice(0, 3), 3 / 8), (slice(3, 8), 5 / 8))],
    ),
    "cut by the caller, with what all share inside": lambda t: (
        rp.MicroBatches([{"x": x, "mask": rp.Replicated(t["mask"])} for x in (t["x"][:3], t["x"][3:])]),
        rp.MicroBatches([t["y"][:3], t["y"][3:]]),
        [({"x": t["x"][s], "mask": t["mask"]}, t["y"][s], w) for s, w in ((slice(0, 3), 3 / 8), (slice(3, 8), 5 / 8))],
    ),
    "the same weights twice": lambda t: (
        rp.MicroBatches([t["x"][:3], t["x"][3:]], weights=[3, 1]),
        rp.MicroBatches([t["y"][:3], t["y"][3:]], weights=[3, 1]),
        [(t["x"][:3], t["y"][:3], 0.75), (t["x"][3:], t["y"][3:], 0.25)],
    ),
    "one micro-batch": lambda t: (
        {"x": rp.MicroBatches([t["x"]]), "mask": rp.Replicated(t["mask"])}, rp.MicroBatches([t["y"]]),
        [({"x": t["x"], "mask": t["mask"]}, t["y"], 1.0)],
    ),
}  # fmt: skip


def unlisted(take: Any) -> Any:
    """``rp.Batched([tensor])`` gives a list of one."""
    return {k: v[0] if isinstance(v, list) else v for k, v in take.items()} if isinstance(take, dict) else take


class Unlist(Masked):
    def forward(self, d: Any) -> Tensor:
        return super().forward(unlisted(d))


def pipe_of(model: Any, **arguments: Any) -> rp.Pipeline:
    options: dict[str, Any] = {"loss": mse, "optimizer": sgd, "chunks": 2, "balance": [1, 1]} | arguments
    cluster = LocalCluster(len(options["balance"]) * options.get("replicas", 1))
    return rp.Pipeline(model, cluster, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind", CASES)
def test_each_micro_batch_gets_its_part(kind: str, replicas: int) -> None:
    torch.manual_seed(2)
    model: list[nn.Module] = [Unlist(), nn.Linear(4, 4)]
    inputs, targets, parts = CASES[kind](tensors())
    reference = nn.Sequential(*copy.deepcopy(model))
    optimizer = sgd(list(reference.parameters()))
    loss = 0.0
    for x, y, weight in parts:
        value = mse(reference(x), y)
        (value * weight).backward()
        loss += value.item() * weight
    optimizer.step()
    pipe = pipe_of(model) if replicas == 1 else pipe_of(model, balance=[2], replicas=2, chunks=1)
    assert pipe.evaluate([(inputs, targets)]) == pytest.approx(loss, rel=1e-6)
    assert len(list(pipe.predict([inputs, inputs]))) == 2
    [result] = list(pipe.train([(inputs, targets)]))
    assert result.loss == loss
    assert_same_weights(pipe, reference)
    with torch.no_grad():
        expected = torch.cat([reference(x) for x, _, _ in parts])
    assert torch.equal(pipe(inputs), expected)


def test_evaluate_weighs_batches_by_their_samples() -> None:
    t, pipe = tensors(), pipe_of(layers())
    whole = pipe.evaluate([(t["x"], t["y"])])
    assert pipe.evaluate(
        [(rp.MicroBatches([t["x"][:3]]), rp.MicroBatches([t["y"][:3]])), (t["x"][3:], t["y"][3:])]
    ) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw"])
def test_streams_take_what_the_caller_has_cut(schedule: str) -> None:
    t = tensors()
    losses = []
    for wrapped in (False, True):
        pipe = pipe_of(layers(), schedule=schedule)
        x, y = ({"x": t["x"], "mask": t["mask"].expand(8, 4)}, t["y"])
        if wrapped:
            x = {"x": rp.MicroBatches(list(t["x"].chunk(2))), "mask": rp.Replicated(t["mask"].expand(4, 4))}  # type: ignore[dict-item]
            y = rp.MicroBatches(list(t["y"].chunk(2)))  # type: ignore[assignment]
        losses.append([result.loss for result in pipe.train([(x, y)] * 3)])
    assert losses[0] == losses[1]


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], tuple[Any, Any]], str]] = {
    "inputs alone": (lambda t: (rp.MicroBatches([t["x"]]), t["y"]), "pass both as rp.MicroBatches"),
    "targets alone": (lambda t: (t["x"], rp.MicroBatches([t["y"]])), "pass both as rp.MicroBatches"),
    "too many": (lambda t: (rp.MicroBatches([t["x"]] * 3), rp.MicroBatches([t["y"]] * 3)), "runs at most 2"),
    "another number of targets": (
        lambda t: (rp.MicroBatches([t["x"]] * 2), rp.MicroBatches([t["y"]])), "inputs make 2 micro-batches and targets",
    ),
    "uncut beside cut": (
        lambda t: ({"x": rp.MicroBatches([t["x"]]), "mask": t["table"]}, rp.MicroBatches([t["y"]])), "not cut",
    ),
    "two numbers": (
        lambda t: ({"x": rp.MicroBatches([t["x"]]), "mask": rp.MicroBatches([t["x"]] * 2)}, t["y"]), r"have \[1, 2\]",
    ),
    "sizes that differ": (lambda t: ({"x": t["x"], "mask": t["mask"]}, t["y"]), r"rp\.Replicated\(value\)"),
    "sizes that differ, batched": (lambda t: ({"x": t["x"], "t": rp.Batched(t["time"], 0)}, t["y"]), r"\[3, 8\]"),
    "weights of the targets": (
        lambda t: (rp.MicroBatches(t["x"].chunk(2)), rp.MicroBatches(t["y"].chunk(2), weights=[3, 1])),
        r"weights \[3.0, 1.0\], and the inputs' say \[0.5, 0.5\]",
    ),
    "two weights": (
        lambda t: (
            {"x": rp.MicroBatches(t["x"].chunk(2), [3, 1]), "mask": rp.MicroBatches(t["x"].chunk(2), [1, 1])},
            rp.MicroBatches(t["y"].chunk(2)),
        ),
        r"different weights, \[\[3.0, 1.0\], \[1.0, 1.0\]\]",
    ),
    "nothing but shared": (lambda t: (rp.Replicated(t["x"]), t["y"]), "a batch needs tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_cuts_that_do_not_fit_are_refused(kind: str) -> None:
    make, words = REFUSED[kind]
    pipe = pipe_of(layers())
    with pytest.raises(rp.ArgumentError, match=words):
        pipe.train_step(*make(tensors()))
    with pytest.raises(rp.ArgumentError, match=words):
        pipe.evaluate([make(tensors())])


def test_the_wrappers_check_what_they_are_given() -> None:
    t = tensors()
    with pytest.raises(rp.ArgumentError, match=r"dim=2\) has a tensor of shape \(8, 4\)"):
        rp.Batched(t["x"], dim=2)
    with pytest.raises(rp.ArgumentError, match="at least one micro-batch"):
        rp.MicroBatches([])
    with pytest.raises(rp.ArgumentError, match="pass one for each"):
        rp.MicroBatches([t["x"]], weights=[1, 2])
    with pytest.raises(rp.ArgumentError, match="all finite"):
        rp.MicroBatches([t["x"]], weights=[float("inf")])
    assert repr(rp.Replicated(3)) == "Replicated(3)"
    assert repr(rp.Batched([], dim=1)) == "Batched([], dim=1)"
    assert repr(rp.MicroBatches([1])) == "MicroBatches([1])"


# --- gradients of inputs ---

GRADIENTS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "batched": {"dispatch": "batched"},
    "split backward": {"schedule": "zb-h1"},
    "recomputed": {"checkpoint": "always"},
    "looped": {"schedule": "interleaved", "virtual_stages": 2, "balance": [1, 1, 1, 1]},
    "clipped": {"clip_grad_norm": 1e-3},
    "replicas": {"balance": [4], "replicas": 2, "chunks": 1},
}


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) * mask


class Start(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, d: dict[str, Any]) -> Tensor:
        return self.linear(d["x"]) * d["mask"] + d["scale"]


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_inputs_are_those_of_the_plain_loop(kind: str) -> None:
    """``mask`` is used by three layers, ``unused`` by none."""
    torch.manual_seed(2)
    model = [Start(), rp.Wired(Uses(), takes="mask"), nn.Linear(4, 4), rp.Wired(Uses(), takes="mask")]
    reference = rp.layers.Sequential(copy.deepcopy(model))
    t = tensors()

    def batch() -> dict[str, Any]:
        inputs = {"x": t["x"], "mask": t["table"], "scale": torch.tensor(2.0), "unused": t["y"]}
        return {name: value.clone().requires_grad_() for name, value in inputs.items()} | {
            "ids": torch.arange(8),
            "n": 3,
        }

    expected = batch()
    for part in (slice(0, 4), slice(4, 8)):
        micro_batch = {name: expected[name][part] for name in ("x", "mask")} | {"scale": expected["scale"]}
        (mse(reference(micro_batch), t["y"][part]) * 0.5).backward()
    balance = GRADIENTS[kind].get("balance", [2, 2])
    pipe = pipe_of(model, **(GRADIENTS[kind] | {"balance": balance})) if kind != "looped" else rp.Pipeline(
        model, LocalCluster(2), loss=mse, optimizer=sgd, chunks=2, schedule="interleaved", virtual_stages=2
    )  # type: ignore[arg-type]  # fmt: skip
    inputs = batch()
    target = nn.Linear(4, 4)(t["y"]) * 0 + t["y"]  # of a teacher: a gradient is wanted, and none comes
    assert target.requires_grad
    found = pipe.train_step(inputs, target).input_grads
    assert list(found) == list(inputs)
    for name in ("x", "mask", "scale"):
        assert torch.equal(found[name], expected[name].grad), name
        assert inputs[name].grad is None
    assert [found[name] for name in ("unused", "ids", "n")] == [None, None, None]
    assert (
        pipe.train_step(
            {**inputs, **{k: inputs[k].detach() for k in ("x", "mask", "scale", "unused")}}, t["y"]
        ).input_grads
        is None
    )


def test_gradients_of_inputs_follow_the_normalisation_of_the_loss() -> None:
    t = tensors()
    x = t["x"].clone().requires_grad_()
    reference = nn.Sequential(*layers())
    mse(reference(x), t["y"]).backward()

    def summed(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.mse_loss(output, target, reduction="sum"), torch.tensor(float(target.numel()))

    for options in ({"loss": summed}, {"autocast": torch.float16}):
        found = pipe_of(layers(), **options).train_step(t["x"].clone().requires_grad_(), t["y"]).input_grads
        torch.testing.assert_close(found, x.grad, rtol=2e-2, atol=1e-3)


def test_gradients_come_back_as_the_inputs_were_cut() -> None:
    t = tensors()
    x, mask, time = (t[name].clone().requires_grad_() for name in ("x", "mask", "time"))
    inputs = {"x": x, "mask": rp.Replicated(mask), "time": rp.Batched(time, dim=1)}
    found = pipe_of(layers()).train_step(inputs, t["y"]).input_grads
    reference = nn.Sequential(*layers())
    for s in (slice(0, 4), slice(4, 8)):
        (mse(reference({"x": x[s], "mask": mask, "time": time[:, s]}), t["y"][s]) * 0.5).backward()
    for name, value in (("x", x), ("mask", mask), ("time", time)):
        assert torch.equal(found[name], value.grad), name  # type: ignore[arg-type]
    parts = [t["x"][:3].clone().requires_grad_(), t["x"][3:].clone()]
    found = pipe_of(layers()).train_step(
        rp.MicroBatches(parts), rp.MicroBatches([t["y"][:3], t["y"][3:]])
    ).input_grads  # fmt: skip
    (mse(nn.Sequential(*layers())(parts[0]), t["y"][:3]) * (3 / 8)).backward()
    assert torch.equal(found[0], parts[0].grad)  # type: ignore[arg-type]
    assert found[1] is None


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw"])
def test_a_stream_detaches_its_inputs(schedule: str) -> None:
    t = tensors()
    x = t["x"].clone().requires_grad_()
    result = pipe_of(layers(), schedule=schedule).train_step(x, nn.Linear(4, 4)(t["y"]))
    assert result.input_grads is None
    assert x.grad is None


def test_gradients_of_inputs_come_through_rpc(cluster: rp.Cluster) -> None:
    t = tensors()
    pipe = rp.Pipeline(layers(), cluster, loss=mse, optimizer=sgd, chunks=2, balance=[1, 1])
    x = t["x"].clone().requires_grad_()
    reference = nn.Sequential(*layers())
    for s in (slice(0, 4), slice(4, 8)):
        (mse(reference(x[s]), t["y"][s]) * 0.5).backward()
    found = pipe.train_step(t["x"].clone().requires_grad_(), nn.Linear(4, 4)(t["y"]) * 0 + t["y"]).input_grads
    assert torch.equal(found, x.grad)  # type: ignore[arg-type]
    assert pipe.evaluate([(x, nn.Linear(4, 4)(t["y"]))]) > 0
    assert pipe(x).requires_grad is False
    pipe.close()
