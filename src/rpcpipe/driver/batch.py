"""A batch on the driver: cut into micro-batches, sent to the stages that take it, and its gradients put together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from rpcpipe.errors import ArgumentError, require
from rpcpipe.model.microbatch import (
    Cut,
    MicroBatches,
    Nest,
    cut,
    flatten,
    map_tensors,
    merge_gradients,
    tensors,
    unflatten,
)
from rpcpipe.model.sendable import as_argument, checked
from rpcpipe.model.wiring import DRIVER, Flow, ValueRoute, link
from rpcpipe.schedules import Action
from rpcpipe.stage.autograd import StageInput, leave
from rpcpipe.worker.messages import Port, Report


class Batch(NamedTuple):
    """A batch's micro-batches in order, the share of the batch that each is, and how many each replica has.

    ``samples``: of each micro-batch. ``by_caller``: the caller has cut it.
    """

    parts: list[Nest]
    weights: tuple[float, ...]
    counts: tuple[int, ...]
    samples: tuple[float, ...]
    by_caller: bool

    @property
    def size(self) -> float:
        """The samples of the batch."""
        return sum(self.samples)


def cut_inputs(inputs: Nest, replicas: int, chunks: int) -> Batch:
    """Return ``inputs`` in micro-batches; ArgumentError for what cannot be cut or sent."""
    shares, samples, by_caller = _cut("inputs", inputs, replicas, chunks)
    parts, total = [_sendable(part, "inputs") for share in shares for part in share], sum(samples)
    weights = tuple(count / total for count in samples)
    return Batch(parts, weights, tuple(map(len, shares)), tuple(samples), by_caller)


def cut_targets(targets: Nest, inputs: Batch, replicas: int, chunks: int) -> list[Nest]:
    """Return the targets of ``inputs``, detached; ArgumentError unless they are of as many samples."""
    shares, samples, by_caller = _cut("targets", targets, replicas, chunks)
    _check_weights(targets, inputs)
    parts = [_sendable(map_tensors(torch.Tensor.detach, part), "targets") for share in shares for part in share]
    require(
        inputs.by_caller == by_caller,
        "rp.MicroBatches stand in the inputs or the targets alone; pass both as rp.MicroBatches",
    )
    require(
        len(inputs.parts) == len(parts),
        f"inputs make {len(inputs.parts)} micro-batches and targets {len(parts)}: their batch sizes differ",
    )
    require(
        by_caller or tuple(samples) == inputs.samples,
        f"inputs have {inputs.size:g} samples and targets {sum(samples):g}: a loss would stretch one to the other, or"
        " compare the wrong ones. Give both the same size in dimension 0; say rp.Batched(value, dim=…) where the batch"
        " is in another dimension, rp.Replicated(value) of what all micro-batches share, or cut both yourself with"
        " rp.MicroBatches([…])",
    )
    return parts


def _cut(what: str, nest: Nest, replicas: int, chunks: int) -> Cut:
    """Return ``nest`` in micro-batches; raises ArgumentError, which says that it is about ``what``."""
    try:
        return cut(nest, replicas, chunks)
    except ArgumentError as error:
        raise ArgumentError(f"{what}: {error}") from None


def _check_weights(targets: Nest, inputs: Batch) -> None:
    """Raise ArgumentError for weights beside the targets that are not those of the inputs, which count."""
    for leaf in flatten(targets)[0]:
        if isinstance(leaf, MicroBatches) and leaf.weights is not None:
            require(
                tuple(weight / sum(leaf.weights) for weight in leaf.weights) == inputs.weights,
                f"the targets' rp.MicroBatches have weights {leaf.weights}, and the inputs' say {list(inputs.weights)};"
                " give weights=[…] to the inputs' rp.MicroBatches",
            )


def _sendable(part: Nest, what: str) -> Nest:
    """Return a micro-batch as it is sent, in host memory; ArgumentError for what cannot be."""
    with as_argument():
        return checked(part, f"the batch's {what}", torch.Tensor.cpu)


def entering(part: Nest, chunk: int, value_routes: Sequence[ValueRoute]) -> dict[Port, StageInput]:
    """Return what each stage gets from the driver of micro-batch ``chunk``'s inputs ``part``, by port."""
    return {
        Port(Action("F", stage, chunk), link(stage, DRIVER)): leave(flow)
        for stage, flow in entering_values(part, value_routes).items()
    }


def entering_values(part: Nest, value_routes: Sequence[ValueRoute]) -> dict[int, Flow]:
    """Return by stage the running value and the named values that it gets from the driver."""
    names: dict[int, list[str]] = {0: []}
    for way in value_routes:
        if way.source == DRIVER:
            names.setdefault(way.target, []).append(way.name)
    return {stage: (None if stage else part, {name: part[name] for name in wanted}) for stage, wanted in names.items()}


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
