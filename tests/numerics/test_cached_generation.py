"""Generation with keys and values kept on the stages: transformers' tokens, and those of passes over whole rows."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, PreTrainedModel

import rpcpipe as rp
from rpcpipe.model.hf.decoding import Decoding, Decodings
from rpcpipe.model.language_model import CacheLost
from support.local_cluster import LocalCluster

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Rotary angles, learned positions, ALiBi from the mask, positions from the mask, sliding windows that the rows pass,
# a mixture of experts, and blocks that return tuples.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "bloom": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": 6},
    "gpt_neox": {},
    "falcon": {},
}
LENGTHS, NEW = (4, 7, 5, 4, 6), 8


def model(family: str, **more: Any) -> PreTrainedModel:
    """Large weights, so that no two logits are nearly equal."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **more})
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 99, (length,), generator=generator) for length in LENGTHS]


def expected(unsplit: Any, **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return [unsplit.generate(row[None], **settings)[0].tolist() for row in prompts()]


def local(unsplit: Any, workers: int = 2, **arguments: Any) -> rp.Pipeline:
    cluster: Any = LocalCluster(workers)
    return rp.from_transformers(unsplit, cluster, **{"chunks": 2, **arguments})


def tokens(pipe: rp.Pipeline, new_tokens: int = NEW, **options: Any) -> list[list[int]]:
    return [row.tolist() for row in rp.generate(pipe, prompts(), new_tokens, **options)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_transformers_own_greedy(family: str) -> None:
    unsplit = model(family)
    assert tokens(local(unsplit), cache=True) == expected(unsplit)


CUTS = [{"chunks": 1}, {"chunks": 5}, {"schedule": "zb-v", "virtual_stages": 2}, {"replicas": 2}]


@pytest.mark.parametrize("more", CUTS)
def test_however_it_is_cut(more: dict[str, Any]) -> None:
    unsplit = model("llama")
    assert tokens(local(unsplit, 4 if "replicas" in more else 2, **more), cache=True) == expected(unsplit)


def test_sampled_tokens_are_those_without_a_cache() -> None:
    pipe = local(model("llama"))
    options = {"temperature": 0.9, "top_k": 30, "seed": 5}
    assert tokens(pipe, **options) == tokens(pipe, cache=False, **options)


def test_a_row_ends_with_its_stop() -> None:
    unsplit = model("llama")
    rows = expected(unsplit)
    stop = rows[1][LENGTHS[1] + 2]
    ended = [
        row[: row.index(stop, length) + 1] if stop in row[length:] else row
        for row, length in zip(rows, LENGTHS, strict=True)
    ]
    assert ended != rows
    assert tokens(local(unsplit), stop=stop) == ended


class Watched:
    """Selects the logits, and tells how many tokens they are of."""

    seen: ClassVar[list[int]] = []

    def __call__(self, output: Any) -> Any:
        self.seen.append(output.shape[1])
        return output


def test_a_pass_has_one_token_of_each_row() -> None:
    """All passes but the first of a group."""
    seen, pipe = Watched.seen, local(model("gpt2"), chunks=1)
    seen.clear()
    watched = Watched()
    rp.generate(pipe, prompts()[:1], NEW, logits=watched)
    assert seen == [LENGTHS[0]] + [1] * (NEW - 1)
    seen.clear()
    rp.generate(pipe, prompts()[:1], NEW, logits=watched, cache=False)
    assert seen == list(range(LENGTHS[0], LENGTHS[0] + NEW))


def test_training_goes_on_and_nothing_is_kept() -> None:
    pipe = local(model("llama"), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    ids = torch.randint(3, 99, (4, 6), generator=torch.Generator().manual_seed(2))
    before = tokens(pipe)
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Decoding)]
    pipe.train_step({"input_ids": ids}, {"labels": ids})
    assert tokens(pipe) == tokens(pipe, cache=False) != before


def test_a_window_that_moves_takes_whole_rows() -> None:
    pipe = local(model("llama"))
    assert tokens(pipe, context=5) == tokens(pipe, context=5, cache=False)
    with pytest.raises(ValueError, match="no more than context tokens"):
        tokens(pipe, context=5, cache=True)


def test_models_without_keys_and_values_in_all_blocks_take_whole_rows() -> None:
    torch.manual_seed(0)
    unsplit = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2)
    ).eval()
    pipe = local(unsplit)
    with pytest.raises(ValueError, match="whose blocks all have attention"):
        tokens(pipe, 2, cache=True)
    assert tokens(pipe, 2) == tokens(pipe, 2, cache=False)


def test_what_is_not_causal_does_not_generate() -> None:
    bert = BertConfig(**SIZES, architectures=["BertLMHeadModel"])
    with pytest.raises(rp.ModelError, match="needs is_decoder=True"):
        tokens(local(bert))
    torch.manual_seed(0)
    unsplit = transformers.BertLMHeadModel(BertConfig(**SIZES, is_decoder=True, initializer_range=0.3)).eval()
    assert tokens(local(unsplit), cache=True) == expected(unsplit)


def test_rows_whose_tokens_another_process_has_seen_are_refused() -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    decodings = Decodings()

    def seen(past: int, width: int, session: int = 1) -> Any:
        return decodings.current(config, 3, {"rpcpipe_cached": torch.tensor([[session, 0, past]])}, width)

    assert seen(0, 4) is seen(0, 4)
    assert seen(4, 1).narrow.get_seq_length() == 4
    assert seen(5, 1).narrow.get_seq_length() == 5
    for past in (4, 5 + 2):
        with pytest.raises(CacheLost, match="6 tokens of these rows"):
            seen(past, 1)
    assert seen(0, 3, session=2).narrow.get_seq_length() == 0
    with pytest.raises(CacheLost, match="0 tokens"):
        decodings.current(config, 3, {"rpcpipe_cached": torch.tensor([[3, 0, 2]])}, 1)
