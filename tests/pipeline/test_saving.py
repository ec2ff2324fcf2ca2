"""What a checkpoint holds beside weights, when it may be written, and who else can read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.trainer_utils import load_sharded_checkpoint

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import adamw, batches, mlp
from support.oracle import assert_same_weights
from support.saving import make


class Scale:
    """Stands for what a pipeline holds on the driver beside its optimizer."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_pipelines_own_parts_are_saved_and_those_that_fit_loaded(tmp_path: Path) -> None:
    pipe, other = make(2), make(1)
    pipe.runtime.parts |= {"scale": Scale(8.0), "gone": Scale(1.0)}
    mine = {"scale": Scale(2.0), "new": Scale(3.0)}
    other.runtime.parts |= mine
    # The caller's names are the caller's: one may be the same.
    theirs = Scale(5.0)
    pipe.save(tmp_path, stateful={"scale": theirs})
    theirs.value = 6.0
    other.load(tmp_path, stateful={"scale": theirs})
    assert [mine["scale"].value, mine["new"].value, theirs.value] == [8.0, 3.0, 5.0]


def test_inside_a_step_nothing_is_saved_or_loaded(tmp_path: Path) -> None:
    pipe = make(2)
    pipe.save(tmp_path)
    with pipe.step():
        with pytest.raises(rp.StateError, match="save after its with-block"):
            pipe.save(tmp_path)
        with pytest.raises(rp.StateError, match="load after its with-block"):
            pipe.load(tmp_path)
    with pytest.raises(rp.ArgumentError, match="keep must be at least 1"):
        pipe.save(tmp_path, keep=0)


# --- other readers ---


def test_transformers_and_plain_torch_read_the_weights(tmp_path: Path) -> None:
    pipe = make(3)
    for batch in batches(2):
        pipe.train_step(*batch)
    folder = pipe.save(tmp_path)
    by_transformers = mlp()
    load_sharded_checkpoint(by_transformers, str(folder))
    assert_same_weights(pipe, by_transformers)

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    plain = mlp()
    assert list(index["weight_map"]) == list(plain.state_dict())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in plain.parameters())
    state: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        state |= load_file(folder / file)
    plain.load_state_dict(state)
    assert_same_weights(pipe, plain)


def test_a_model_of_transformers_reads_its_pipelines_checkpoint(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    pipe = rp.from_transformers(config, LocalCluster(3), optimizer=adamw, chunks=2)
    ids = torch.randint(0, 32, (4, 6))
    pipe.train_step({"input_ids": ids}, {"labels": ids})
    folder = pipe.save(tmp_path)
    config.save_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, pipe({"input_ids": ids}), rtol=1e-5, atol=1e-5)
