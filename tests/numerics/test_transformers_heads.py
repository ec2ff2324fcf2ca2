"""Heads of transformers' models beside language modelling, inputs of several kinds, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import rpcpipe as rp
from support.families import VOCABULARY, configuration
from support.local_cluster import LocalCluster

BATCH, TIME = 4, 7
LABELS: dict[str, Any] = {
    "single_label_classification": torch.tensor([0, 2, 1, 2]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]]),
    "regression": torch.tensor([[0.5, 1, -1], [1, 0, 0], [0, 2, 1], [1, 1, 1]]),
}


def model_of(family: str, name: str, **more: Any) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(configuration(family, cls, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs() -> dict[str, torch.Tensor]:
    """Rows of different lengths, which end with the token that pads."""
    ids = torch.randint(3, VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(TIME) < torch.tensor([[5], [3], [7], [6]])).long()
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def local(source: Any, **more: Any) -> rp.Pipeline:
    cluster: Any = LocalCluster(2)
    return rp.from_transformers(source, cluster, **{"optimizer": sgd, "chunks": 2, **more})


def check(model: Any, given: dict[str, Any], labels: torch.Tensor) -> None:
    """One update of the pipeline is one of the unsplit model."""
    pipe = local(model)
    with torch.no_grad():
        expected = model(**given).logits
    found = pipe(given)
    seen = given["attention_mask"].bool() if "attention_mask" in given and expected.dim() == 3 else slice(None)
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)
    loss = model(**given, labels=labels).loss
    loss.backward()
    assert pipe.train_step(given, {"labels": labels}).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    sgd([one for one in model.parameters() if one.requires_grad]).step()
    state = pipe.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForSequenceClassification"), ("gpt2", "GPT2ForSequenceClassification"),
        ("bert", "BertForSequenceClassification"), ("qwen2", "Qwen2ForSequenceClassification"),
    ],
)  # fmt: skip
def test_sequences_are_classified(family: str, name: str, problem: str) -> None:
    check(model_of(family, name, num_labels=3, problem_type=problem), inputs(), LABELS[problem])


def test_one_number_for_a_sequence() -> None:
    check(model_of("llama", "LlamaForSequenceClassification", num_labels=1), inputs(), torch.tensor([0.1, 2, -1, 0]))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForTokenClassification"), ("gpt2", "GPT2ForTokenClassification"),
        ("bert", "BertForTokenClassification"), ("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM"),
    ],
)  # fmt: skip
def test_tokens_are_classified_and_filled_in(family: str, name: str) -> None:
    given = inputs()
    labels = torch.where(given["attention_mask"].bool() & (given["input_ids"] % 3 > 0), given["input_ids"] % 2, -100)
    check(model_of(family, name), given, labels)


def test_a_head_without_a_loss_that_is_known_needs_one() -> None:
    model = model_of("bert", "BertForQuestionAnswering")
    ids = inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids)
    found = local(model)({"input_ids": ids})
    torch.testing.assert_close(found["start_logits"], expected.start_logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(rp.StageError, match=r"does not know the loss of BertForQuestionAnswering; pass loss="):
        local(model).train_step({"input_ids": ids}, {"labels": ids})
    result = local(model, loss=lambda output, target: ((output["end_logits"] - target) ** 2).mean())
    assert result.train_step({"input_ids": ids}, torch.zeros(BATCH, TIME)).loss > 0


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("family", "name"),
    [("mistral", "MistralForCausalLM"), ("gemma2", "Gemma2ForCausalLM"), ("gemma3_text", "Gemma3ForCausalLM")],
)  # fmt: skip
def test_windows_of_attention_slide(family: str, name: str, window: int) -> None:
    given = inputs()
    check(model_of(family, name, sliding_window=window), given, given["input_ids"])


def test_micro_batches_of_routers_count_as_gradient_accumulation_does() -> None:
    model = model_of("mixtral", "MixtralForCausalLM", router_aux_loss_coef=0.5)
    pipe, given = local(model), inputs()
    labels, total = given["input_ids"], 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        part = {name: value[rows] for name, value in given.items()}
        output = model(**part, labels=labels[rows], num_items_in_batch=BATCH * (TIME - 1))
        loss = output.loss - 0.25 * output.aux_loss  # half of it for each of two micro-batches
        loss.backward()
        total += float(loss.detach())
    assert pipe.train_step(given, {"labels": labels}).loss == pytest.approx(total, abs=1e-5)
    sgd(list(model.parameters())).step()
    state = pipe.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), [("llama", "LlamaForCausalLM"), ("opt", "OPTForCausalLM")])
def test_positions_are_the_callers_and_batches_of_any_length(family: str, name: str) -> None:
    """As without a cache, where positions that begin anew in a row are those of a packed sequence."""
    model = model_of(family, name)
    pipe = local(model)
    for time in (3, 6, 4):
        ids = inputs()["input_ids"][:, :time]
        given = {"input_ids": ids, "position_ids": torch.arange(time).flip(0).expand(BATCH, -1)}
        with torch.no_grad():
            torch.testing.assert_close(pipe(given), model(**given, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "name"), [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")]
)
def test_encoder_decoders_are_refused(family: str, name: str) -> None:
    with pytest.raises(rp.ModelError, match=f"{name} cannot be cut: it has an encoder and a decoder"):
        local(model_of(family, name))


@pytest.mark.parametrize("name", ["inputs_embeds", "past_key_values", "labels", "output_attentions", "use_cache"])
def test_inputs_that_a_pipeline_cannot_have_are_refused_by_name(name: str) -> None:
    pipe = local(model_of("llama", "LlamaForCausalLM"))
    with pytest.raises(rp.ArgumentError, match=rf"at most .*, not \['input_ids', '{name}'\]"):
        pipe({"input_ids": inputs()["input_ids"], name: inputs()["input_ids"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_converted_computes_as_it_does(dtype: torch.dtype) -> None:
    """``to`` converts rotary frequencies, too, which no stage has: they are rounded on each of them."""
    model: Any = model_of("llama", "LlamaForCausalLM").to(dtype)
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    assert torch.equal(local(model)({"input_ids": inputs()["input_ids"]}), model(inputs()["input_ids"]).logits)


def test_a_change_outside_of_the_layers_is_refused() -> None:
    model = model_of("llama", "LlamaForCausalLM")
    model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(rp.ModelError, match="rotary_emb of the LlamaForCausalLM was changed after its config built it"):
        local(model)


@pytest.mark.parametrize(("family", "name"), [("opt", "OPTForCausalLM"), ("bart", "BartForCausalLM")])
def test_blocks_left_out_at_random_are_refused(family: str, name: str) -> None:
    option = "layerdrop" if family == "opt" else "decoder_layerdrop"
    with pytest.raises(rp.ModelError, match="leaves blocks out at random"):
        local(model_of(family, name, **{option: 0.1}))


def test_a_model_that_was_called_for_router_logits_is_sent_and_stays_as_it_is() -> None:
    model = model_of("mixtral", "MixtralForCausalLM")
    model(**inputs(), output_router_logits=True)
    hooks = sum(len(vars(part)["_forward_hooks"]) for part in model.modules())
    assert hooks > 0
    local(model)
    assert sum(len(vars(part)["_forward_hooks"]) for part in model.modules()) == hooks


def test_a_part_of_the_embedding_keeps_its_own_mode() -> None:
    """Dropout that the user has switched off stays off while the model trains."""
    model = model_of("gpt2", "GPT2LMHeadModel", embd_pdrop=0.5, attn_pdrop=0.0, resid_pdrop=0.0).train()
    model.transformer.drop.eval()
    ids = inputs()["input_ids"]
    expected = model(ids, labels=ids).loss
    assert local(model).train_step({"input_ids": ids}, {"labels": ids}).loss == pytest.approx(float(expected.detach()))
