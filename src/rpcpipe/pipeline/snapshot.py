"""A pipeline's weights under the unsplit model's names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from rpcpipe.model.layers import layer_of
from rpcpipe.model.tied_weights import completed
from rpcpipe.pipeline.arguments import check_state

if TYPE_CHECKING:
    from rpcpipe.pipeline.pipeline import Pipeline


def state_dict(pipe: Pipeline) -> OrderedDict[str, torch.Tensor]:
    """All parameters and buffers, on the CPU."""
    driver = pipe._driver
    found = driver.collect({name: driver.post(name, "state_dict") for name in pipe._layout.row(0)})
    by_stage = {stage: state for stages in found.values() for stage, state in stages.items()}
    return OrderedDict((key, value) for stage in sorted(by_stage) for key, value in by_stage[stage].items())


def load_state_dict(pipe: Pipeline, state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of ``state_dict``; CheckpointError, before anything changes, unless names and shapes fit.

    A tied weight may come under one of its names or, with the same value, under several.
    """
    state = completed(pipe._ties, state)
    check_state(state_dict(pipe), state)
    owner = {layer: stage for stage in pipe.stages for layer in stage.layers}
    parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {name: {} for name in pipe._names}
    for key, value in state.items():
        stage = owner[layer_of(key, owner)]
        for worker in stage.workers:
            parts[worker].setdefault(stage.index, {})[key] = value
    pipe._driver.collect({name: pipe._driver.post(name, "load_state_dict", parts[name]) for name in pipe._names})
