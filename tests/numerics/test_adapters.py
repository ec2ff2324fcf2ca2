"""A frozen model with peft's adapters: the plain loop's numbers, and nothing but the adapters is trained and saved."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import rpcpipe as rp
from numerics.test_transformers import batch, gpt2, llama
from rpcpipe.stage.rollback import Undo
from support.local_cluster import LocalCluster
from support.mortal_cluster import MortalCluster

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def base(name: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(3)
    if name == "gpt2":
        return GPT2LMHeadModel(gpt2(**more))
    return LlamaForCausalLM._from_config(llama(**more), dtype=dtype)


def adapted(model: Any, **more: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **more))


def local(model: Any, workers: int = 3, **arguments: Any) -> rp.Pipeline:
    cluster: Any = LocalCluster(workers)
    return rp.from_transformers(model, cluster, **{"optimizer": adamw, "chunks": 4, **arguments})


def sizes(module: nn.Module) -> tuple[int, int]:
    """The number of trainable values, and of values with a gradient among the frozen ones."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters() if not p.requires_grad and p.grad is not None)


def identities(module: nn.Module) -> list[int]:
    """Of the parameters, in this process as the workers are."""
    return [id(parameter) for parameter in module.parameters()]


CASES: dict[str, dict[str, Any]] = {
    "some": {"target_modules": ["q_proj", "v_proj"]},
    "everywhere": {"target_modules": "all-linear", "use_dora": True},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_loop(case: str) -> None:
    name = "gpt2" if case == "gpt2" else "llama"
    model = adapted(base(name, tie_word_embeddings=case in ("some", "gpt2")), **CASES[case])
    plain, pipe = copy.deepcopy(model), local(model)
    optimizer = adamw([p for p in plain.train().parameters() if p.requires_grad])
    for seed in range(3):
        inputs, targets = batch(name, seed)
        loss = plain(**inputs, **targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert pipe.train_step(inputs, targets).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    state, trained = pipe.state_dict(), pipe.state_dict(trainable=True)
    assert state.keys() == plain.state_dict().keys()
    assert trained.keys() == {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)
        assert key in trained or torch.equal(state[key], model.state_dict()[key])


@pytest.mark.parametrize("more", [{}, {"schedule": "zb-h1"}, {"checkpoint": "always"}, {"balance": [1, 2, 2, 1]}])
def test_frozen_stages_have_neither_gradients_nor_copies(more: dict[str, Any]) -> None:
    """Also where the first and the last stage have nothing to train."""
    pipe = local(adapted(base(), target_modules=["q_proj"]), 4 if "balance" in more else 3, **more)
    losses = [pipe.train_step(*batch("llama", seed)).loss for seed in range(2)]
    usual = local(adapted(base(), target_modules=["q_proj"]))
    assert losses == pytest.approx([usual.train_step(*batch("llama", seed)).loss for seed in range(2)], abs=1e-6)
    found = [stage.call(sizes) for stage in pipe.stages]
    trainable = sum(count for count, _ in found)
    assert trainable == sum(value.numel() for value in pipe.state_dict(trainable=True).values())
    assert all(gradients == 0 for _, gradients in found)
    mine = {one for stage in pipe.stages for one in stage.call(identities)}
    undone = [one.copies for one in gc.get_objects() if type(one) is Undo]
    copied = {id(p): value.numel() for copies in undone for p, (value, _) in copies.items() if id(p) in mine}
    assert sum(copied.values()) == trainable


def test_a_base_of_bfloat16_with_adapters_of_float32() -> None:
    model = adapted(base(dtype=torch.bfloat16), target_modules=["q_proj", "down_proj"])
    plain, pipe = copy.deepcopy(model), local(model)
    inputs, targets = batch("llama")
    assert torch.equal(pipe(inputs), plain(**inputs).logits)
    optimizer = adamw([p for p in plain.train().parameters() if p.requires_grad])
    plain(**inputs, **targets).loss.backward()
    optimizer.step()
    pipe.train_step(inputs, targets)
    before, after = model.state_dict(), pipe.state_dict(trainable=True)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all(not torch.equal(value, before[key]) for key, value in after.items())
    for key, value in after.items():  # the first step of AdamW is the gradient's sign: a few are of rounding errors
        assert float((value - plain.state_dict()[key]).abs().gt(1e-3).float().mean()) < 0.1


def test_the_adapter_alone_is_saved_as_peft_does(tmp_path: Path) -> None:
    model = adapted(base(), target_modules=["q_proj"])
    pipe = local(model)
    pipe.train_step(*batch("llama"))
    model.load_state_dict(pipe.state_dict(trainable=True), strict=False)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 5000
    inputs, _ = batch("llama", 1)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    torch.testing.assert_close(again(**inputs).logits, pipe(inputs), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(local(again)(inputs), pipe(inputs), atol=0, rtol=0)


def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    pipe = local(adapted(base(), target_modules=["q_proj"]))
    pipe.train_step(*batch("llama"))
    pipe.save(tmp_path)
    resumed = local(adapted(base(), target_modules=["q_proj"]), 2)
    resumed.load(tmp_path)
    assert resumed.train_step(*batch("llama", 1)).loss == pipe.train_step(*batch("llama", 1)).loss


def test_workers_that_die_change_no_bit() -> None:
    figures = []
    for cluster in (LocalCluster(2), MortalCluster(2)):
        given: Any = cluster
        pipe = rp.from_transformers(adapted(base(), target_modules=["q_proj"]), given, optimizer=adamw, chunks=4)
        losses = []
        for seed in range(4):
            losses.append(pipe.train_step(*batch("llama", seed)).loss)
            if isinstance(cluster, MortalCluster):
                cluster.kill(f"worker{seed % 2}")
        figures.append((losses, pipe.state_dict()))
    assert figures[0][0] == figures[1][0]
    assert all(torch.equal(value, figures[1][1][key]) for key, value in figures[0][1].items())


def test_what_is_not_inside_of_layers_is_refused() -> None:
    tokens = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    refused = {
        "PROMPT_TUNING changes the model's inputs": PromptTuningConfig(**tokens),
        "PREFIX_TUNING changes the model's inputs": PrefixTuningConfig(**tokens),
        "ADALORA has a forward of its own": AdaLoraConfig(total_step=10, target_modules=["q_proj"]),
        "activated LORA looks in the inputs": LoraConfig(
            task_type="CAUSAL_LM", alora_invocation_tokens=[1], target_modules=["q_proj"]
        ),
    }
    for said, config in refused.items():
        with pytest.raises(ValueError, match=f"peft's {said}"):
            local(get_peft_model(base(), config))
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    model = get_peft_model(base(), other)
    inputs, _ = batch("llama")
    torch.testing.assert_close(local(model)(inputs), model(**inputs).logits, atol=1e-6, rtol=1e-6)
