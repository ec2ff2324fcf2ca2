"""Router logits of a mixture of experts: taken from the blocks, given to the model's own auxiliary loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from rpcpipe.model.hf.recipe import Recipe

_ROUTERS = "router_logits"


def recorders(model: type[PreTrainedModel]) -> list[OutputRecorder]:
    """Return what of the class's modules is a router's logits."""
    found = (getattr(model, "_can_record_outputs", None) or {}).get(_ROUTERS, [])
    several = found if isinstance(found, list) else [found]
    return [one if isinstance(one, OutputRecorder) else OutputRecorder(one, index=1) for one in several]


def records_routers(recipe: Recipe) -> bool:
    """Return whether the model counts an auxiliary loss of its routers."""
    asked = getattr(recipe.config.get_text_config(), "output_router_logits", False)
    return bool(asked and recorders(recipe.cls))


def unrouted(model: PreTrainedModel) -> None:
    """Let the forward of ``model``, whose blocks are stand-ins without routers, count no loss of routers."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def _matches(recorder: OutputRecorder, path: str, module: nn.Module) -> bool:
    if recorder.target_class is None or not isinstance(module, recorder.target_class):
        return False
    return recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{path}."


@contextmanager
def record_routers(block: nn.Module, recipe: Recipe) -> Iterator[list[Any]]:
    """Yield a list that the router logits of ``block`` are added to inside the block of code."""
    found: list[Any] = []

    def adding(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            logits = output[index] if isinstance(output, tuple) else output
            if logits is not None:
                found.append(logits)

        return hook

    hooks = [
        module.register_forward_hook(adding(recorder.index))
        for recorder in recorders(recipe.cls)
        for path, module in block.named_modules()
        if _matches(recorder, path, module)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def with_routers(forward: Callable[..., Any], logits: Sequence[Any]) -> Callable[..., Any]:
    """Return ``forward``, of a model without head, whose output has ``logits`` as those of its routers."""

    def routed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output[_ROUTERS] = tuple(logits)
        return output

    return routed
