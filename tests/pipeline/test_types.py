"""What a user's program may write, with no cast, under ``mypy --strict``, which checks this file; and it runs.

What has a ``type: ignore`` is refused by mypy: an ignore of nothing would be an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import sgd

X, Y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)


class Named(NamedTuple):
    x: torch.Tensor
    scale: float


@dataclass
class Data:
    x: torch.Tensor
    name: str = ""


class First(nn.Module):
    """Takes the first tensor of whatever it is given."""

    def forward(self, inputs: object) -> torch.Tensor:
        leaves = torch.utils._pytree.tree_leaves(inputs)
        return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def loss(output: torch.Tensor, target: object) -> torch.Tensor:
    labels = next(one for one in torch.utils._pytree.tree_leaves(target) if isinstance(one, torch.Tensor))
    return nn.functional.cross_entropy(output, labels)


@pytest.fixture
def pipe() -> Iterator[rp.Pipeline]:
    made = rp.Pipeline([First(), nn.Linear(3, 2)], LocalCluster(2), loss=loss, optimizer=sgd, chunks=2)
    yield made
    made.close()


def test_nests_of_all_kinds_are_trained_on(pipe: rp.Pipeline) -> None:
    by_name: dict[str, torch.Tensor] = {"x": X}
    by_number: dict[int, list[torch.Tensor]] = {0: [X, X]}
    several: list[torch.Tensor] = [X, X]
    pipe.train_step(X, Y)
    pipe.train_step(by_name, {"labels": Y, "weight": 0.5, "note": None})
    pipe.train_step(by_number, (Y, [Y, Y]))
    pipe.train_step(several, Y)
    pipe.train_step((X, {"mask": (X, "mean", 3)}), Y)
    pipe.train_step(Named(X, 2.0), Y)
    pipe.train_step(Data(X), Data(Y, "labels"))
    pipe.train_step(SimpleNamespace(x=X), Y)
    pipe.train_step((rp.Batched(X.T.contiguous().T, dim=0), rp.Replicated(by_name)), Y)
    pipe.train_step(rp.MicroBatches([X[:1], X[1:]]), rp.MicroBatches([Y[:1], Y[1:]]))
    pipe.train_step(*rp.RemoteBatches(lambda: [(X, Y)]).batch(0))
    assert pipe.trained == 11


def test_batches_are_pairs_of_nests(pipe: rp.Pipeline) -> None:
    pairs: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = [({"x": X}, Y)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2)
    losses: list[float] = [result.loss for result in pipe.train(pairs)]
    losses += [result.loss for result in pipe.train(loader, ahead=1)]
    losses += [result.loss for result in pipe.train((x, y) for x, y in [(X, Y)])]
    losses += [result.loss for result in pipe.train(rp.RemoteBatches(lambda: pairs))]
    losses.append(pipe.evaluate(zip([X], [Y], strict=True)))
    losses.append(pipe.evaluate(pairs, {"one": lambda output, target: (1, 1)})["one"])
    with pipe.step() as step:
        losses.append(step.forward_backward({"x": X}, Y))
        step.optimize()
    assert len(losses) == 8


def test_results_are_used_without_a_cast(pipe: rp.Pipeline) -> None:
    """Outputs are typed Any: a tensor here, and with other models a tuple or a dict."""
    output: torch.Tensor = pipe({"x": X})
    shares: list[torch.Tensor] = [one.softmax(-1)[0] for one in pipe.predict([X, X])]
    assert output.argmax(-1).shape == (4,)
    assert len(shares) == 2
    outputs = pipe.train_step(X, Y, outputs=True).outputs
    assert outputs["logits"].shape == (4, 2) if isinstance(outputs, dict) else outputs.shape == (4, 2)
    kinds: list[str] = [event.kind for event in pipe.events]
    assert kinds == []


def test_what_is_no_nest_is_refused_by_mypy_and_when_it_runs(pipe: rp.Pipeline) -> None:
    with pytest.raises(rp.ArgumentError):
        pipe.train_step(X.numpy(), Y)  # type: ignore[arg-type]
    with pytest.raises(rp.ArgumentError):
        pipe.train_step({"x": X.numpy()}, Y)  # type: ignore[dict-item]
    with pytest.raises(rp.ArgumentError):
        pipe.train_step((x for x in [X]), Y)  # type: ignore[arg-type]
    with pytest.raises(rp.ArgumentError):
        pipe.evaluate([(X, {Y})])  # type: ignore[list-item]
    with pytest.raises(rp.ArgumentError):
        next(pipe.train([X]))  # type: ignore[list-item]
    assert pipe.trained == 0
