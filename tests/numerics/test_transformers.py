"""transformers' models in a pipeline are the unsplit models: logits, loss, gradients, weights, names."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import rpcpipe as rp
from support.local_cluster import LocalCluster

VOCABULARY, TIME, BATCH = 61, 9, 10
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(**more: Any) -> GPT2Config:
    drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=16, **{**drops, **SIZES, **more})


def bert(**more: Any) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(max_position_embeddings=16, **{**sizes, **drops, **SIZES, **more})


def llama(**more: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(intermediate_size=32, max_position_embeddings=16, **{**sizes, **SIZES, **more})


MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gpt2": (GPT2LMHeadModel, gpt2),
    "bert": (BertForPreTraining, bert),
    "masked": (BertForMaskedLM, lambda **more: bert(architectures=["BertForMaskedLM"], **more)),
    "llama": (LlamaForCausalLM, llama),
}


def batch(name: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rows of different lengths, and labels that are ignored here and there: unequally over the micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (BATCH, TIME), generator=generator)
    mask = (torch.arange(TIME) < torch.randint(3, TIME + 1, (BATCH, 1), generator=generator)).long()
    labels = torch.where((torch.rand(BATCH, TIME, generator=generator) < 0.4) & mask.bool(), ids, -100)
    inputs, targets = {"input_ids": ids, "attention_mask": mask}, {"labels": labels}
    if name in ("bert", "masked"):
        inputs["token_type_ids"] = torch.randint(0, 2, (BATCH, TIME), generator=generator)
    if name == "bert":
        targets["next_sentence_label"] = torch.randint(0, 2, (BATCH,), generator=generator)
    return inputs, targets


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.5)


def logits(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [output[key] for key in ("prediction_logits", "seq_relationship_logits", "logits") if key in output]


def local(source: Any, **arguments: Any) -> rp.Pipeline:
    cluster: Any = LocalCluster(3)
    return rp.from_transformers(source, cluster, **{"optimizer": sgd, "chunks": 4, **arguments})


CASES = [
    (name, attention, tied, origin)
    for name in MODELS
    for attention, tied, origin in [
        ("sdpa", True, "model"), ("sdpa", True, "config"), ("eager", True, "config"), ("sdpa", False, "config"),
        ("sdpa", False, "model"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("name", "attention", "tied", "origin"), CASES)
def test_it_is_the_unsplit_model(name: str, attention: str, tied: bool, origin: str) -> None:
    make, configure = MODELS[name]
    config = configure(attn_implementation=attention, tie_word_embeddings=tied)
    torch.manual_seed(1)
    model = make(copy.deepcopy(config))
    pipe = local(model if origin == "model" else config)
    if origin == "config":
        model.load_state_dict(pipe.state_dict())  # every name, and no other
    inputs, targets = batch(name)
    with torch.no_grad():
        expected = model.eval()(**inputs, **targets)
    for mine, theirs in zip(logits(pipe(inputs)), logits(expected), strict=True):
        seen = inputs["attention_mask"].bool() if mine.dim() == 3 else ...
        torch.testing.assert_close(mine[seen], theirs[seen], atol=1e-5, rtol=1e-5)
    assert pipe.evaluate([(inputs, targets)]) == pytest.approx(float(expected.loss), abs=1e-5)
    optimizer = sgd(list(model.train().parameters()))
    for seed in range(3):
        inputs, targets = batch(name, seed)
        loss = model(**inputs, **targets).loss
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        result = pipe.train_step(inputs, targets)
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
    state = pipe.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_draws_transformers_own_initial_weights(name: str) -> None:
    """By scale, as the generator is another: every weight has the spread that the unsplit model's has."""
    make, configure = MODELS[name]
    config = configure(initializer_range=0.3)
    state = local(config).state_dict()
    for key, value in make(config).state_dict().items():
        sigma = 0.3 * (2 / value.numel()) ** 0.5
        assert abs(float(state[key].float().mean() - value.float().mean())) < 5 * sigma, key
        assert float(state[key].float().std()) == pytest.approx(float(value.float().std()), rel=0.6, abs=1e-6), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["zb-v", "interleaved"])
def test_schedules_and_recomputation_give_the_same_losses(name: str, schedule: str) -> None:
    """To the bit but for tied weights on several stages, whose gradients are summed as the cut has it."""
    virtual = rp.schedules.fewest_virtual_stages(schedule)
    losses = []
    for more in ({}, {"schedule": schedule, "virtual_stages": virtual, "checkpoint": "always"}):
        cluster: Any = LocalCluster(2)
        pipe = rp.from_transformers(MODELS[name][1](), cluster, optimizer=sgd, chunks=4, **more)
        losses.append([pipe.train_step(*batch(name, seed)).loss for seed in range(2)])
    tied = getattr(MODELS[name][1](), "tie_word_embeddings", True)
    assert losses[0] == (pytest.approx(losses[1], abs=1e-5) if tied else losses[1])


def test_position_and_token_type_ids_count() -> None:
    torch.manual_seed(2)
    model = GPT2LMHeadModel(gpt2()).eval()
    inputs, _ = batch("gpt2")
    inputs |= {"position_ids": torch.arange(TIME).flip(0).expand(BATCH, -1), "token_type_ids": inputs["input_ids"] % 5}
    with torch.no_grad():
        torch.testing.assert_close(local(model)(inputs), model(**inputs).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            local(model)({"input_ids": inputs["input_ids"]}), model(inputs["input_ids"]).logits, atol=1e-5, rtol=1e-5
        )


def test_a_model_is_left_as_it_is() -> None:
    model = GPT2LMHeadModel(gpt2())
    model.activation_checkpointing_enable()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    local(model).train_step(*batch("gpt2"))
    assert type(model.transformer.h[0]).__module__.startswith("transformers.")
    assert model.transformer.h[0].gradient_checkpointing
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    config = gpt2()
    local(config)
    assert config.to_dict() == gpt2().to_dict()


def test_generation_is_transformers_own() -> None:
    torch.manual_seed(4)
    model = LlamaForCausalLM(llama(initializer_range=0.6)).eval()
    prompts = torch.randint(1, VOCABULARY, (5, 4))
    expected = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = rp.generate(local(model), prompts, 8, inputs=lambda ids: {"input_ids": ids})
    assert torch.stack(found).tolist() == expected.tolist()


def test_stages_are_cut_by_parameters() -> None:
    pipe = local(gpt2(), stages=2)
    assert len(pipe.stages) == 2
    assert sum(pipe.balance) == 6
    with pytest.raises(ValueError, match="pass one of them"):
        local(gpt2(), stages=2, balance=[3, 3])


def test_what_cannot_be_cut_is_refused() -> None:
    for other in (nn.Linear(1, 1), {"model_type": "gpt2"}):
        with pytest.raises(ValueError, match=r"takes a model or a config of transformers, not a (Linear|dict)"):
            local(other)
    with pytest.raises(ValueError, match="cross-attention"):
        local(gpt2(add_cross_attention=True))
    pipe = local(gpt2())
    inputs, targets = batch("gpt2")
    with pytest.raises(ValueError, match=r"at most .*, not \['input_ids', 'inputs_embeds'\]"):
        pipe({"input_ids": inputs["input_ids"], "inputs_embeds": inputs["input_ids"]})
    with pytest.raises(ValueError, match="not a Tensor"):
        pipe(inputs["input_ids"])
    with pytest.raises(ValueError, match="targets must be a dict with 'labels'"):
        pipe.train_step(inputs, {"label": targets["labels"]})
    with pytest.raises(ValueError, match="'next_sentence_label'"):
        local(bert()).train_step(*batch("masked"))


def test_rpcpipe_alone_imports_no_transformers() -> None:
    check = "import sys, rpcpipe; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None\n"
    call = "try: rpcpipe.from_transformers(None, None)\nexcept rpcpipe.DependencyError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", check + call], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install '.[hf]'" in done.stdout


def test_on_real_workers_the_driver_holds_no_weights(cluster: rp.Cluster) -> None:
    config = bert(vocab_size=30522, hidden_size=64)
    pipe = rp.from_transformers(config, cluster, optimizer=sgd, chunks=5)
    inputs, targets = batch("bert")
    model = BertForPreTraining(config)
    model.load_state_dict(pipe.state_dict())
    loss = model(**inputs, **targets).loss.detach()
    assert pipe.train_step(inputs, targets).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    tied = pipe.state_dict()
    assert torch.equal(tied["cls.predictions.decoder.weight"], tied["bert.embeddings.word_embeddings.weight"])
    pipe.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_pipeline_is_a_pretrained_model(name: str, tmp_path: Path) -> None:
    make, configure = MODELS[name]
    pipe = local(configure())
    pipe.train_step(*batch(name))
    folder = pipe.save(tmp_path)
    configure().save_pretrained(folder)  # the config; the weights are there
    model, state = make.from_pretrained(folder), pipe.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fresh: Any = LocalCluster(2)
    resumed = rp.from_transformers(model, fresh, optimizer=sgd, chunks=4)
    resumed.load(tmp_path)
    assert resumed.train_step(*batch(name, 1)).loss == pipe.train_step(*batch(name, 1)).loss


def test_two_replicas_count_the_whole_batchs_labels() -> None:
    losses = []
    for workers, more in ((2, {}), (4, {"replicas": 2})):
        cluster: Any = LocalCluster(workers)
        pipe = rp.from_transformers(bert(), cluster, optimizer=sgd, chunks=4, **more)
        losses.append([pipe.train_step(*batch("bert", seed)).loss for seed in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
