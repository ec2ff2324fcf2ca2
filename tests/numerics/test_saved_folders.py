"""A pipeline of a saved folder is the model that ``from_pretrained`` reads from it, and the driver builds none."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, BertModel, LlamaForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM

import rpcpipe as rp
from numerics.test_transformers import BATCH, MODELS, SIZES, batch, bert, llama, logits, sgd
from rpcpipe.model.hf.cut import cut
from rpcpipe.model.hf.folder import Folder, Weights
from support.local_cluster import LocalCluster

WEIGHTS = "model.safetensors"


def local(source: Any, **arguments: Any) -> rp.Pipeline:
    cluster: Any = LocalCluster(3)
    return rp.from_transformers(source, cluster, **{"optimizer": sgd, "chunks": 4, **arguments})


def mixtral(**more: Any) -> MixtralConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralConfig(
        intermediate_size=32, num_local_experts=4, max_position_embeddings=16, **sizes, **SIZES, **more
    )


# Mixtral's files have a tensor for each expert, and its model one for all.
CASES = {**MODELS, "mixtral": (MixtralForCausalLM, mixtral)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(llama(tie_word_embeddings=False)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(folder: Path, changing: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    changing(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def compare(pipe: rp.Pipeline, model: Any, name: str) -> None:
    """Same weights to the bit, same logits, and the same weights after an update."""
    state = pipe.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    inputs, targets = batch(name)
    with torch.no_grad():
        expected = logits(model(**inputs))
    for mine, theirs in zip(logits(pipe(inputs)), expected, strict=True):
        seen = inputs["attention_mask"].bool() if mine.dim() == 3 else ...
        torch.testing.assert_close(mine[seen], theirs[seen], atol=1e-5, rtol=1e-5)
    optimizer = sgd(list(model.train().parameters()))
    loss = model(**inputs, **targets).loss
    loss.backward()
    optimizer.step()
    assert pipe.train_step(inputs, targets).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    state = pipe.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_from_pretrained_reads(name: str, tied: bool, tmp_path: Path) -> None:
    make, configure = CASES[name]
    torch.manual_seed(1)
    make(configure(tie_word_embeddings=tied)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    compare(local(str(tmp_path) if tied else tmp_path), make.from_pretrained(tmp_path), name)


def test_on_real_workers_and_none_of_it_here(cluster: rp.Cluster, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM.from_pretrained(saved)
    fill, values = Weights.fill, load_file(saved / WEIGHTS)
    called, read = [], []

    def filling(self: Weights, layer: nn.Module, path: str, frame: Any) -> None:
        fill(self, layer, path, frame)
        called.append(path)
        own = {f"{path}.{name}": p for name, p in layer.named_parameters() if p.dim() > 1 and not p.is_meta}
        read.extend(name for name, parameter in own.items() if torch.equal(parameter, values[name]))

    monkeypatch.setattr(Weights, "fill", filling)  # in this process, whose workers are others
    pipe = rp.from_transformers(saved, cluster, optimizer=sgd, chunks=4)
    assert called
    assert read == []
    compare(pipe, model, "llama")
    pipe.close()


@pytest.mark.parametrize("said", [None, torch.float32])
def test_the_dtype_is_the_configs(said: torch.dtype | None, tmp_path: Path) -> None:
    LlamaForCausalLM(llama()).to(torch.bfloat16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.dtype = said or config.dtype
    pipe, model = local(tmp_path, config=config), LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert {value.dtype for value in pipe.state_dict().values()} == {said or torch.bfloat16} == {model.dtype}
    inputs, targets = batch("llama")
    assert torch.equal(pipe(inputs), model(**inputs).logits)
    assert torch.equal(local(model)(inputs), pipe(inputs))
    assert pipe.train_step(inputs, targets).loss > 0


def test_a_head_that_is_not_there_begins_anew(tmp_path: Path) -> None:
    base = LlamaModel(llama())
    base.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
    config.architectures = ["LlamaForSequenceClassification"]
    with pytest.warns(UserWarning, match=r"lacks score\.weight, which begin with initial values") as warned:
        pipe = local(tmp_path, config=config)
    assert len(warned) == 1
    state = pipe.state_dict()
    assert torch.equal(state["model.layers.1.mlp.up_proj.weight"], base.layers[1].mlp.up_proj.weight)
    assert float(state["score.weight"].std()) == pytest.approx(0.02, rel=0.5)
    inputs, _ = batch("llama")
    inputs["input_ids"] = inputs["input_ids"].clamp(min=1)
    assert pipe.train_step(inputs, {"labels": torch.arange(BATCH) % 3}).loss > 0


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining"])
def test_all_but_the_head_is_from_pretrained(kind: str, tmp_path: Path) -> None:
    """Also where a part of the file is of no use, and where names have no prefix."""
    BertModel(bert()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.architectures = [kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = local(tmp_path, config=config).state_dict()
    expected = getattr(transformers, kind).from_pretrained(tmp_path).state_dict()
    assert state.keys() == expected.keys()
    drawn = {key for key, value in expected.items() if not torch.equal(value, state[key])}
    assert all(key.startswith(("cls.", "classifier.")) and float(state[key].std()) > 0 for key in drawn)


def test_a_tied_weight_may_have_either_name(saved: Path) -> None:
    change(saved, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    config = AutoConfig.from_pretrained(saved)
    config.tie_word_embeddings = True
    compare(local(saved, config=config), LlamaForCausalLM.from_pretrained(saved, config=config), "llama")


@pytest.mark.parametrize(
    ("changing", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"lacks model\.embed_tokens\.weight"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(1)}), r"has .*up_proj\.bias, which the mo"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), r"model\.norm\.weight has shape \(5,\).* \(16,\)"),
    ],
)
def test_another_model_is_refused_by_a_tensors_name(changing: Callable[..., Any], said: str, saved: Path) -> None:
    with pytest.raises(rp.CheckpointError, match=said):
        local(change(saved, changing))


def test_two_values_of_a_tied_weight_are_refused(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.tie_word_embeddings = True
    with pytest.raises(rp.CheckpointError, match="are one weight by the config, and differ; say tie_word_embeddings"):
        local(saved, config=config)


def test_what_no_worker_can_read_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"not a folder with a config\.json, and from_transformers downloads nothing"):
        local("meta-llama/Llama-2-7b")
    with pytest.raises(ValueError, match="config=… is for a folder"):
        local(llama(), config=llama())
    with pytest.raises(ValueError, match="config must be a config of transformers, not a dict"):
        local(saved, config={})
    (saved / WEIGHTS).write_bytes(b"abc")
    with pytest.raises(rp.CheckpointError, match=r"model\.safetensors cannot be read on .*SafetensorError"):
        local(saved)
    (saved / WEIGHTS).rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"its weights not in model\.safetensors .* read it here and pass the model"):
        local(saved)
    (saved / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(rp.CheckpointError, match=r"index\.json is damaged"):
        local(saved)
    (saved / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read the config in .*saved: .*model_type"):
        local(saved)


def test_a_worker_without_the_folder_says_so(saved: Path) -> None:
    layers, loss, _ = cut(Folder.of(saved, None))
    shutil.rmtree(saved)
    cluster: Any = LocalCluster(2)
    with pytest.raises(
        rp.StageError, match=r"on worker\d raised .*saved/model\.safetensors cannot be read on .* hosts"
    ):
        rp.Pipeline(layers, cluster, loss=loss, optimizer=sgd)


MIXED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "Bloom": {"n_head": 4, "n_layer": 2},
    "Gemma2": {"head_dim": 4},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "GptOss": {"num_local_experts": 4, "head_dim": 4},
    "Glm4Moe": {**MIXED, "first_k_dense_replace": 1, "head_dim": 4},
}


@pytest.mark.parametrize("family", OTHERS)
def test_names_and_shapes_of_other_families(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 16, "pad_token_id": 0}
    make = getattr(transformers, f"{family}ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**sizes, **SIZES, **OTHERS[family])
    make(config).save_pretrained(tmp_path, max_shard_size="20KB")
    state, expected = local(tmp_path).state_dict(), make.from_pretrained(tmp_path).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_workers_keep_nothing_of_the_files(saved: Path) -> None:
    """As when the tuned model is saved over the one that was read."""
    pipe = local(saved)
    inputs, targets = batch("llama")
    before = pipe(inputs)
    (saved / WEIGHTS).write_bytes(b"")
    assert torch.equal(pipe(inputs), before)
    assert pipe.train_step(inputs, targets).applied
