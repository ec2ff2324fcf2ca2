"""The models of transformers that rpcpipe can split into layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from rpcpipe.errors import ArgumentError
from rpcpipe.model.hf import bert, gpt2, llama
from rpcpipe.model.layers import Layer, Loss

Family = Callable[[Any], tuple[dict[str, Layer], Loss]]
_FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": gpt2.lm_head,
    "BertForPreTraining": bert.pre_training,
    "BertForMaskedLM": bert.masked_lm,
    "LlamaForCausalLM": llama.causal_lm,
}
_DEFAULTS = {"gpt2": "GPT2LMHeadModel", "bert": "BertForPreTraining", "llama": "LlamaForCausalLM"}


def family_of(source: Any) -> Family:
    """Return the function that splits ``source``, a config or a model, into layers.

    Raises ArgumentError for a model of another class or a config of another model type.
    """
    if isinstance(source, PreTrainedModel):
        name = type(source).__name__
    else:
        default = _DEFAULTS.get(getattr(source, "model_type", ""), "")
        named = getattr(source, "architectures", None) or [default]
        name = named[0] if default and named[0] in _FAMILIES else default
    if name not in _FAMILIES:
        raise ArgumentError(
            f"from_transformers takes {', '.join(_FAMILIES)}, or their configs, not {type(source).__name__};"
            " any other model is a pipeline once it is written as a list of layers (docs/guide/models.md)"
        )
    return _FAMILIES[name]
