"""Models of the library peft: a base with adapters in it, which is cut as the base is."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import PreTrainedModel

from rpcpipe.errors import ModelError

# How peft names what is in the base of a PeftModel.
_PREFIX = "base_model.model."


def unwrapped(source: Any) -> tuple[Any, str]:
    """Return the base with its adapters of a PeftModel, and the prefix of its names there; else ``source`` and "".

    Raises ModelError for a method that does more than to change layers.
    """
    peft = sys.modules.get("peft")  # else ``source`` cannot be one
    if peft is None or not isinstance(source, peft.PeftModel):
        return source, ""
    config = source.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    tuner = source.base_model
    if config.is_prompt_learning or not isinstance(tuner.model, PreTrainedModel):
        raise _unlike_layers(kind, "changes the model's inputs, or what its attention sees")
    plain = peft.tuners.tuners_utils.BaseTuner
    if not isinstance(tuner, plain) or inspect.getattr_static(tuner, "forward") is not plain.forward:
        raise _unlike_layers(kind, "has a forward of its own around the model's")
    if getattr(config, "alora_invocation_tokens", None):
        raise _unlike_layers("activated LORA", "looks in the inputs for the tokens that turn it on")
    return tuner.model, _PREFIX


def _unlike_layers(kind: str, what: str) -> ModelError:
    return ModelError(
        f"peft's {kind} {what}, and a pipeline has the model's layers alone; use adapters inside of layers, as LoRA"
    )
