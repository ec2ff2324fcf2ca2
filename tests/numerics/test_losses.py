"""Losses and layers that would train something else in silence are refused; losses of NaN change no weight."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd, summed
from support.oracle import Natural, assert_same_run

F = nn.functional


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.scale * F.cross_entropy(output, target)

    def other(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self(output, target)


class Holder:
    def __init__(self, head: Any) -> None:
        self.head = head

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(output), target)


class SumAndCount(nn.CrossEntropyLoss):
    def forward(self, output: torch.Tensor, target: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(output, target), len(target)


def scaled(output: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output * scale, target)


PARAMETERS: dict[str, tuple[Any, str]] = {
    "module": (Weighted(), "'scale'"),
    "nested": (nn.Sequential(Weighted()), "'0.scale'"),
    "bound method": (Weighted().other, "'scale'"),
    "partial": (functools.partial(Weighted()), "'scale'"),
    "partial of a method": (functools.partial(Weighted().other), "'scale'"),
    "partial with a tensor": (functools.partial(scaled, scale=nn.Parameter(torch.ones(()))), "'scale'"),
    "partial with a module": (functools.partial(scaled, scale=nn.Linear(1, 1)), "'scale.weight'"),
    "object": (Holder(nn.Linear(4, 4)), "'head.weight'"),
    "method of an object": (Holder(nn.Linear(4, 4)).__call__, "'head.weight'"),
}
SUMS: dict[str, Any] = {
    "CrossEntropyLoss": nn.CrossEntropyLoss(reduction="sum"),
    "MSELoss": nn.MSELoss(reduction="sum"),
    "BCEWithLogitsLoss": nn.BCEWithLogitsLoss(size_average=False),
    "NLLLoss": nn.NLLLoss(reduction="sum").forward,
    "cross_entropy": functools.partial(F.cross_entropy, reduction="sum"),
    "mse_loss": functools.partial(functools.partial(F.mse_loss), reduction="sum"),
    "nll_loss": functools.partial(functools.partial(F.nll_loss, reduction="sum"), ignore_index=-1),
}
GOOD: dict[str, Any] = {
    "frozen": Weighted().requires_grad_(False),
    "buffers": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 0.5])),
    "sum and count": SumAndCount(reduction="sum"),
    "the mean again": functools.partial(functools.partial(F.cross_entropy, reduction="sum"), reduction="mean"),
    "smoothed": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "function": cross_entropy,
    "object": Holder(nn.Identity()),
}


def pipeline(loss: Any, **options: Any) -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(2), loss=loss, optimizer=sgd, **{"chunks": 2, "balance": [3, 5]} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PARAMETERS)
def test_trainable_parameters_of_a_loss_are_refused_by_name(kind: str) -> None:
    loss, name = PARAMETERS[kind]
    with pytest.raises(rp.ModelError, match=f"the loss has a trainable parameter, {name}, .*a layer"):
        pipeline(loss)


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_torchs_losses_are_refused(name: str) -> None:
    with pytest.raises(rp.ModelError, match=rf"{name}\(reduction='sum'\) returns the sum.*\(sum, count\)"):
        pipeline(SUMS[name])


@pytest.mark.parametrize("kind", GOOD)
def test_other_losses_train_as_in_a_plain_loop(kind: str) -> None:
    assert_same_run(pipeline(GOOD[kind]), Natural(mlp(), sgd, GOOD[kind], 2), batches(2))


# --- losses that are not finite ---


def ignored(where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of which a micro-batch, or all of it, has no label: its mean is 0/0 and its gradients are 0."""
    x, y = next(batches(1, 8))
    y = y.clone()
    y[: 2 if where == "one" else None] = -100
    return x, y


SCHEDULES = ["1f1b", "zb-h1", "pipedream", "pipedream-2bw"]


@pytest.mark.parametrize("where", ["one", "all"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_skip_leaves_the_update_out(schedule: str, where: str) -> None:
    pipe = pipeline(nn.CrossEntropyLoss(), schedule=schedule, chunks=4)
    before = pipe.state_dict()
    result = pipe.train_step(*ignored(where))
    assert result.loss != result.loss
    assert not result.applied
    if schedule != "pipedream" or where == "all":  # which updates after every micro-batch
        assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    assert pipe.train_step(*next(batches(1, 8))).applied


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stop_raises(schedule: str) -> None:
    pipe = pipeline(nn.CrossEntropyLoss(), schedule=schedule, chunks=4, nonfinite="stop")
    before = pipe.state_dict()
    with pytest.raises(rp.NonFiniteError, match="loss"):
        pipe.train_step(*ignored("one"))
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    assert pipe.train_step(*next(batches(1, 8))).applied


@pytest.mark.parametrize("at", [0, 1])
def test_a_call_of_an_accumulation_spoils_its_update_alone(at: int) -> None:
    pipe, other = (pipeline(nn.CrossEntropyLoss(), chunks=4, accumulate=2) for _ in range(2))
    calls = [next(batches(1, 8)), next(batches(1, 8))]
    calls[at] = ignored("one")
    before = pipe.state_dict()
    assert [pipe.train_step(*batch).applied for batch in calls] == [False, False]
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    other.trained = 2
    for batch in batches(2, 8):
        assert pipe.train_step(*batch).loss == other.train_step(*batch).loss
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in pipe.state_dict().items())


def test_stop_drops_the_call_of_an_accumulation_that_raised() -> None:
    pipe, other = (pipeline(nn.CrossEntropyLoss(), chunks=4, accumulate=2, nonfinite="stop") for _ in range(2))
    data = list(batches(2, 8))
    pipe.train_step(*data[0])
    with pytest.raises(rp.NonFiniteError, match="loss of micro-batch 0 is nan"):
        pipe.train_step(*ignored("one"))
    other.train_step(*data[0])
    assert pipe.train_step(*data[1]).applied
    assert other.train_step(*data[1]).applied
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in pipe.state_dict().items())


def test_nothing_counted_in_one_call_of_an_accumulation_is_no_harm() -> None:
    pipe = pipeline(summed, accumulate=2)
    x, y = next(batches(1, 8))
    assert not pipe.train_step(x, torch.zeros_like(y)).applied
    assert pipe.train_step(x, torch.ones_like(y)).applied


def test_an_evaluation_says_what_the_plain_mean_is() -> None:
    pipe = pipeline(nn.CrossEntropyLoss(), nonfinite="stop")
    loss = pipe.evaluate([ignored("all")])
    assert loss != loss
    assert pipe.evaluate(batches(1)) == pytest.approx(
        sum(cross_entropy(mlp().eval()(x), y).item() for x, y in batches(1))
    )


# --- embeddings that change their weight ---


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(9, 4, max_norm=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)  # type: ignore[no-any-return]


EMBEDDINGS: dict[str, tuple[Any, str]] = {
    "module": (nn.Embedding(9, 4, max_norm=0.5), r"layer 0 is an Embedding with max_norm=0\.5"),
    "spec": (rp.LayerSpec(nn.Embedding, 9, 4, max_norm=0.5), r"layer 0 is an Embedding with max_norm=0\.5"),
    "inside": (nn.Sequential(nn.Identity(), Inside()), r"layer 0\.1\.table is an EmbeddingBag with max_norm=1\.0"),
    "inside a spec": (rp.LayerSpec(Inside), r"layer 0\.table is an EmbeddingBag with max_norm=1\.0"),
    "wired": (rp.Wired(nn.Embedding(9, 4, max_norm=0.5), gives="x"), "layer 0 is an Embedding"),
    "frozen": (nn.Embedding(9, 4, max_norm=0.5).requires_grad_(False), "layer 0 is an Embedding"),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_that_renormalize_are_refused_by_layer(kind: str) -> None:
    layer, message = EMBEDDINGS[kind]
    with pytest.raises(rp.ModelError, match=message):
        rp.Pipeline([layer, nn.Linear(4, 4)], LocalCluster(2), loss=cross_entropy, optimizer=sgd)  # type: ignore[arg-type]


# --- what a loss remembers ---


class Remembering(nn.Module):
    """Divides by a running mean of itself; fails, once it has changed it, where all labels are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = cross_entropy(output, target)
        self.mean.mul_(0.5).add_(value.detach(), alpha=0.5)
        if bool((target == 0).all()):
            raise ValueError("no labels")
        return value / self.mean


class RemembersByItself:
    """The same without torch's module."""

    def __init__(self) -> None:
        self.mean = torch.ones(())

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = cross_entropy(output, target)
        self.mean = self.mean * 0.5 + value.detach() * 0.5
        return value / self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


@pytest.mark.parametrize("kind", [Remembering, RemembersByItself])
def test_a_losss_memory_goes_along_with_moves_saves_and_loads(kind: Any, tmp_path: Any) -> None:
    def fresh(balance: list[int], schedule: str) -> rp.Pipeline:
        return rp.Pipeline(
            mlp(), LocalCluster(2), loss=kind(), optimizer=sgd, chunks=2, balance=balance, schedule=schedule
        )  # type: ignore[arg-type]

    pipe, loop = fresh([3, 5], "1f1b"), Natural(mlp(), sgd, kind(), 2)
    untouched = fresh([3, 5], "1f1b").save(tmp_path / "new")
    assert_same_run(pipe, loop, batches(2))
    for schedule in ("zb-v", "interleaved", "1f1b"):
        pipe.schedule = schedule  # type: ignore[assignment]
        assert_same_run(pipe, loop, batches(1))
    pipe.save(tmp_path / "run")
    again = fresh([5, 3], "1f1b")
    again.load(tmp_path / "run")
    assert_same_run(again, loop, batches(2))
    again.load(untouched)
    assert_same_run(again, Natural(mlp(), sgd, kind(), 2), batches(2))


def test_a_failed_step_leaves_a_losss_buffers_as_they_were() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=Remembering(), optimizer=sgd, chunks=2)  # type: ignore[arg-type]
    loop = Natural(mlp(), sgd, Remembering(), 2)
    assert_same_run(pipe, loop, batches(1))
    [(x, y)] = batches(1)
    with pytest.raises(ValueError, match="no labels"):
        pipe.train_step(x, y * 0)
    assert_same_run(pipe, loop, batches(2))


@pytest.mark.parametrize("kind", [Remembering, RemembersByItself])
def test_replicas_refuse_a_loss_that_remembers(kind: Any) -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(4), loss=kind(), optimizer=sgd, chunks=2, replicas=2)  # type: ignore[arg-type]
    before = pipe.state_dict()
    for _ in range(2):
        with pytest.raises(rp.ModelError, match=r"changes 'mean' of its state_dict.*replicas=1"):
            pipe.train_step(*next(batches(1)))
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


class Alternating:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: torch.Tensor, output: torch.Tensor) -> Any:
        self.calls += 1
        return value if self.calls % 2 else (value, 5)


RETURNS: dict[str, tuple[Any, str]] = {
    "three": (lambda v, o: (v, 1, 2), r"or \(sum, count\), not \("),
    "a dict": (lambda v, o: {"loss": v}, r"or \(sum, count\), not \{"),
    "an output beside": (lambda v, o: (v, o), "is not a count of samples"),
    "a scalar with a graph beside": (lambda v, o: (v, o.sum()), "is not a count of samples"),
    "a word beside": (lambda v, o: (v, "mean"), "not a count of samples, but 'mean'"),
    "a dict beside": (lambda v, o: (v, {}), "is not a count of samples, but {}"),
    **{f"{count!r} beside": (lambda v, o, count=count: (v, count), "is not a count of samples, but") for count in (
        math.nan, math.inf, -1, 1j, torch.tensor(math.nan), torch.tensor(-1), torch.tensor(1j), torch.ones(2),
    )},
    "nothing": (lambda v, o: None, r"or \(sum, count\), not None"),
    "a number": (lambda v, o: 1.5, r"or \(sum, count\), not 1.5"),
    "a vector": (lambda v, o: v.reshape(1), r"not a tensor of shape \(1,\)"),
    "a complex number": (lambda v, o: v * 1j, "must return a real number on the model's device, not torch.complex64"),
    "a loss elsewhere": (lambda v, o: v.to("meta"), "must return a real number on the model's device, not .* on meta"),
    "now this, now that": (Alternating(), "the mean for one micro-batch of a batch and"),
}  # fmt: skip


@pytest.mark.parametrize("name", RETURNS)
def test_what_is_no_mean_and_no_sum_and_count_is_refused(name: str) -> None:
    make, message = RETURNS[name]
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=lambda o, t: make(cross_entropy(o, t), o), optimizer=sgd, chunks=2)  # type: ignore[arg-type]
    before = pipe.state_dict()
    calls = (pipe.train_step, lambda x, y: pipe.evaluate([(x, y)]))
    for call in calls[: 1 if "graph" in name else 2]:
        with pytest.raises(rp.ModelError, match=message):
            call(*next(batches(1)))
    assert all(torch.equal(value, before[key]) for key, value in pipe.state_dict().items())
