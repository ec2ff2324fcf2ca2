"""A batch cut into micro-batches, and what is refused to be one. Whoever reads a batch cuts it: driver or worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from rpcpipe.errors import ArgumentError, require
from rpcpipe.model.microbatch import Batched, Cut, MicroBatches, Nest, Replicated, cut, flatten, map_tensors
from rpcpipe.model.sendable import as_argument, checked

_STACK = "torch.stack(inputs) makes a batch of a list of samples. "
# What batches of dicts call their targets.
_LABELS = ("labels", "label", "targets", "target", "y")


def as_pair(batch: Any, source: str) -> tuple[Nest, Nest]:
    """Return ``batch`` as (inputs, targets); raises ArgumentError for anything but a pair.

    ``source`` says who takes what, for the message.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        about = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        about += f" with the keys {list(batch)}" if isinstance(batch, Mapping) else ""
        raise ArgumentError(
            f"{source} pairs (inputs, targets), and got a {type(batch).__name__}{about};"
            f" make pairs of the batches, for instance {_pairs(batch)}"
        )
    return batch[0], batch[1]


def _pairs(batch: Any) -> str:
    """Return code that makes pairs of batches like ``batch``, with what it is likely to have them of."""
    if not isinstance(batch, Mapping) or len(batch) < 2:
        return "((batch['x'], batch['y']) for batch in loader)"
    label = next((key for key in batch if key in _LABELS), list(batch)[-1])
    if "input_ids" in batch:
        rest = f"{{key: value for key, value in batch.items() if key != {label!r}}}"
        return f"(({rest}, {{{label!r}: batch[{label!r}]}}) for batch in loader), as models of transformers take them"
    first = next(key for key in batch if key != label)
    return f"((batch[{first!r}], batch[{label!r}]) for batch in loader)"


class Size(NamedTuple):
    """How much a batch is: its samples, and its ``tokens``, 0 unless its inputs are token ids."""

    samples: float
    tokens: int


class Batch(NamedTuple):
    """A batch's micro-batches in order, the share of the batch that each is, and how many each replica has.

    ``samples``: of each micro-batch. ``by_caller``: the caller has cut it. ``tokens``: of the batch.
    """

    parts: list[Nest]
    weights: tuple[float, ...]
    counts: tuple[int, ...]
    samples: tuple[float, ...]
    by_caller: bool
    tokens: int

    @property
    def size(self) -> Size:
        """The samples and tokens of the batch."""
        return Size(sum(self.samples), self.tokens)


def count_tokens(inputs: Nest) -> int:
    """Return the number of tokens in ``inputs``, 0 unless they are token ids.

    They are where their tensor called ``input_ids``, or else their first one that is not Replicated, holds integers in
    two dimensions, batch and length; every element is a token, padding as well.
    """
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        inputs = inputs["input_ids"]
    match next((leaf for leaf in flatten(inputs)[0] if isinstance(leaf, (torch.Tensor, Batched, MicroBatches))), None):
        case torch.Tensor() as ids:
            is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
            return ids.numel() if is_integer and ids.dim() == 2 else 0
        case Batched() as one:
            return count_tokens(one.value)
        case MicroBatches() as made:
            return sum(map(count_tokens, made.parts))
    return 0


def cut_inputs(inputs: Nest, replicas: int, chunks: int) -> Batch:
    """Return ``inputs`` in micro-batches; ArgumentError for what cannot be cut or sent."""
    shares, samples, by_caller = _cut("inputs", inputs, replicas, chunks)
    parts, total = [_sendable(part, "inputs") for share in shares for part in share], sum(samples)
    weights = tuple(count / total for count in samples)
    return Batch(parts, weights, tuple(map(len, shares)), tuple(samples), by_caller, count_tokens(inputs))


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
    rows = inputs.parts[0]
    listed = isinstance(rows, (list, tuple)) and len(rows) == sum(samples)
    require(
        by_caller or tuple(samples) == inputs.samples,
        f"inputs have {inputs.size.samples:g} samples and targets {sum(samples):g}: a loss would stretch one to the"
        f" other, or compare the wrong ones. {_STACK * listed}Give both the same size in dimension 0; say"
        " rp.Batched(value, dim=…) where the batch is in another dimension, rp.Replicated(value) of what all"
        " micro-batches share, or cut both yourself with rp.MicroBatches([…])",
    )
    return parts


def _cut(what: str, nest: Nest, replicas: int, chunks: int) -> Cut:
    """Return ``nest`` in micro-batches; raises ArgumentError, which says that it is about ``what``."""
    _check_tensors(what, nest)
    try:
        return cut(nest, replicas, chunks)
    except ArgumentError as error:
        raise ArgumentError(f"{what}: {error}") from None


def _check_tensors(what: str, nest: Nest) -> None:
    """Raise ArgumentError, with what to pass instead, for inputs or targets without a tensor that could be cut."""
    leaves = flatten(nest)[0]
    kinds = (torch.Tensor, Replicated, Batched, MicroBatches)
    if any(isinstance(leaf, kinds) or getattr(leaf, "ndim", 0) for leaf in leaves):
        return  # what else is wrong with tensors and arrays is said where they are cut
    if nest is None:
        advice = "pass a tensor with the batch in dimension 0"
        if what == "targets":
            advice += "; a loss that needs none can be given the inputs again, and ignore them"
    elif any(isinstance(leaf, str) for leaf in leaves):
        advice = "pass token ids, as tokenizer(texts, return_tensors='pt', padding=True) gives them"
    elif any(isinstance(leaf, (int, float)) for leaf in leaves):
        advice = "pass torch.tensor(…) of its numbers; have a tokenizer make tensors, by return_tensors='pt'"
    else:
        advice = "pass a tensor, or a tuple, list, dict or dataclass of tensors, with the batch in dimension 0"
    given = "are None" if nest is None else f"have none: they are of type {type(nest).__name__}"
    raise ArgumentError(f"{what} must be made of tensors, and {given}; {advice}")


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
