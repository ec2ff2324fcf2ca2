"""A batch on the driver: sent to the stages that take it, and its gradients put together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from rpcpipe.model.batch import Batch
from rpcpipe.model.microbatch import Nest, flatten, merge_gradients, tensors, unflatten
from rpcpipe.model.wiring import DRIVER, Flow, ValueRoute, link
from rpcpipe.schedules import Action
from rpcpipe.stage.autograd import StageInput, leave
from rpcpipe.worker.messages import Port, ReadPart, Report


def entering(part: Nest, chunk: int, value_routes: Sequence[ValueRoute]) -> dict[Port, StageInput | ReadPart]:
    """Return what each stage gets from the driver of micro-batch ``chunk``'s inputs ``part``, by port."""
    if isinstance(part, ReadPart):
        return {
            Port(Action("F", stage, chunk), slot := link(stage, DRIVER)): part._replace(slot=slot, names=tuple(names))
            for stage, names in _entering_names(value_routes).items()
        }
    return {
        Port(Action("F", stage, chunk), link(stage, DRIVER)): leave(flow)
        for stage, flow in entering_values(part, value_routes).items()
    }


def entering_values(part: Nest, value_routes: Sequence[ValueRoute]) -> dict[int, Flow]:
    """Return by stage the running value and the named values that it gets from the driver."""
    return {
        stage: (None if stage else part, {name: part[name] for name in names})
        for stage, names in _entering_names(value_routes).items()
    }


def _entering_names(value_routes: Sequence[ValueRoute]) -> dict[int, list[str]]:
    """Return by stage that gets inputs from the driver the names of those that it gets beside the running value."""
    names: dict[int, list[str]] = {0: []}
    for way in value_routes:
        if way.source == DRIVER:
            names.setdefault(way.target, []).append(way.name)
    return names


def input_gradients(
    batch: Batch, inputs: Nest, reports: Mapping[str, Report], value_routes: Sequence[ValueRoute], factor: float
) -> Nest:
    """Return the gradients of ``inputs``, times ``factor``, in a nest like it; None if no tensor requires one.

    Where several stages take a value the gradients are summed from the last to the first, as autograd does.
    """
    if not any(tensor.requires_grad for part in batch.parts for tensor in tensors(part)):
        return None
    found = {key: grads for report in reports.values() for key, grads in report.input_grads.items()}
    rows = []
    for chunk, part in enumerate(batch.parts):
        own = tensors(part)
        sums: list[torch.Tensor | None] = [None] * len(own)
        for stage, indices in _entering_tensors(part, value_routes):
            grads = found.get((stage, chunk), [])
            for index, grad in reversed([*zip((i for i in indices if own[i].requires_grad), grads, strict=True)]):
                if grad is not None:
                    sums[index] = grad * factor if (so_far := sums[index]) is None else so_far + grad * factor
        rows.append(list(zip(own, sums, strict=True)))
    return merge_gradients(inputs, rows)


def _entering_tensors(part: Nest, value_routes: Sequence[ValueRoute]) -> list[tuple[int, list[int]]]:
    """Return (stage, which of ``part``'s tensors it gets from the driver), from the last such stage to the first."""
    leaves, spec = flatten(part)
    numbers = itertools.count()
    numbered = unflatten([next(numbers) if isinstance(leaf, torch.Tensor) else None for leaf in leaves], spec)
    entries = entering_values(numbered, value_routes)
    return [
        (stage, [i for i in flatten(entries[stage])[0] if i is not None]) for stage in sorted(entries, reverse=True)
    ]
