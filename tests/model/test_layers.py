from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model import layers
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights


def test_names_are_the_unsplit_models() -> None:
    from collections import OrderedDict

    named = nn.Sequential(OrderedDict(embed=nn.Embedding(3, 2), head=nn.Linear(2, 3)))
    assert list(layers.named_layers(named)) == ["embed", "head"]
    assert list(layers.named_layers([nn.ReLU(), rp.LayerSpec(nn.Linear, 1, 1)])) == ["0", "1"]
    assert list(layers.named_layers({"a.0": nn.ReLU(), "a": rp.LayerSpec(nn.Linear, 1, 1)})) == ["a.0", "a"]


class Unsplit(nn.Module):
    """A model with levels, whose layers a dict names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embed = nn.Linear(12, 6)
        self.encoder.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 4)


def test_names_may_have_dots() -> None:
    model, cluster = Unsplit(), LocalCluster(3)

    class Embed(nn.Module):
        def __init__(self, embed: nn.Module) -> None:
            super().__init__()
            self.embed = embed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.embed(x)  # type: ignore[no-any-return]

    blocks = {f"encoder.blocks.{at}": block for at, block in enumerate(model.encoder.blocks)}
    named = {"encoder": Embed(model.encoder.embed), **blocks, "head": model.head}
    pipe = rp.Pipeline(named, cluster, loss=cross_entropy, optimizer=adamw, chunks=2, schedule="zb-v", balance=[1] * 4)
    assert_same_weights(pipe, model)
    oracle = Oracle(nn.Sequential(*named.values()), adamw, cross_entropy, 2)
    for batch in batches(2):
        assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    pipe.schedule = "1f1b"  # layers and their optimizers' state move
    for batch in batches(2):
        assert pipe.train_step(*batch).loss == oracle.train_step(*batch)
    model.load_state_dict(pipe.state_dict())
    state = model.state_dict()
    fresh = Unsplit()
    pipe.load_state_dict(fresh.state_dict())
    assert_same_weights(pipe, fresh)
    with pytest.raises(rp.CheckpointError, match=r"missing \['head.bias'\], unexpected \['encoder.blocks.2'\]"):
        pipe.load_state_dict({("encoder.blocks.2" if k == "head.bias" else k): v for k, v in state.items()})
    whole = rp.layers.Sequential(named)
    with pytest.raises(rp.CheckpointError, match=r"missing \['head.bias'\], unexpected \['head.bias.0'\]"):
        whole.load_state_dict({("head.bias.0" if k == "head.bias" else k): v for k, v in state.items()})
    assert list(whole.state_dict()) == list(model.state_dict())
    assert [layers.layer_of(key, named) for key in model.state_dict()][::2] == list(named)


class Weighted:
    """Rows have weights; a micro-batch cannot know their sum over the batch."""

    def prepare(self, targets: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {**targets, "mean": float(targets["weight"].mean())}

    def __call__(self, output: torch.Tensor, targets: Any) -> torch.Tensor:
        losses = nn.functional.cross_entropy(output, targets["class"], reduction="none")
        return (losses * targets["weight"]).mean() / targets["mean"]


def test_a_loss_may_prepare_the_whole_batchs_targets() -> None:
    cluster = LocalCluster(3)
    pipe = rp.Pipeline(mlp(dropout=0.0), cluster, loss=Weighted(), optimizer=sgd, chunks=4)
    x, y = next(batches(1))
    targets = {"class": y, "weight": torch.arange(10.0)}
    with torch.no_grad():
        losses = nn.functional.cross_entropy(mlp(dropout=0.0)(x), y, reduction="none")
    expected = float((losses * targets["weight"]).sum() / targets["weight"].sum())
    assert pipe.evaluate([(x, targets)]) == pytest.approx(expected)
    assert pipe.train_step(x, targets).loss == pytest.approx(expected)
    assert "mean" not in targets


def test_specs_count_parameters_without_memory_and_build_from_the_seed() -> None:
    huge = rp.LayerSpec(nn.Linear, 10**6, 10**6, bias=False)
    assert layers.parameter_counts({"a": huge, "b": nn.Linear(2, 2)}) == [10**12, 6]
    spec = rp.LayerSpec(nn.Linear, 3, 3)
    weights = [layers.build(spec, seed=seed, index=index).weight for seed, index in [(1, 2), (1, 2), (1, 3), (2, 2)]]
    assert torch.equal(weights[0], weights[1])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[2])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[3])  # type: ignore[arg-type]
    assert repr(rp.LayerSpec(nn.Linear, 3, bias=False)) == "LayerSpec(Linear, 3, bias=False)"


def test_a_spec_of_no_module_is_refused() -> None:
    with pytest.raises(rp.ModelError, match="made a dict, not an"):
        rp.LayerSpec(dict).build()
