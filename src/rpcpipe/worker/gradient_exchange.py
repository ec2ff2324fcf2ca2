"""Members of a group hold the same parameters: their gradients summed over all, their new values spread.

A reduce-scatter by ownership, then an all-gather, made of pushes and of tasks in the workers' strict
sequences: ``scatter`` sends every owner its part of the gradients, ``reduce`` sums on the owner what
came, in the members' order, and sends the sums out, ``gather`` takes them over. The members are a
stage's replicas, or stages that share a weight.

Why no collective of torch.distributed: one that a failed or cancelled step leaves half-joined hangs its
peers or meets the next step's, while a push carries its step's number and is cancelled, watched and
waited for like any other value; and the order of summation would be the library's. The price is in
docs/guide/parallelism.md.

Invariants: who pushes gradients gives them up, so the receiver may sum in place. What ``reduce`` sends
must stay as it is until all members have reported, which the driver waits for before any gradient or
weight changes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from rpcpipe.worker.messages import Bucket, Port

# Of one message: large enough for the wire's full rate, small enough that summing overlaps with it.
BUCKET_BYTES = 4 << 20

Tensors = list[torch.Tensor | None]
# (worker, port, value) to push
Push = tuple[str, Port, Sequence[torch.Tensor | None]]


def assign(sizes: Sequence[int], members: int) -> list[int]:
    """The owner of each parameter of ``sizes`` bytes: the largest first, each to whom has least so far.

    At most 4/3 of the best possible maximum (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
    """
    load, owners = [0] * members, [0] * len(sizes)
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        owners[at] = min(range(members), key=load.__getitem__)
        load[owners[at]] += sizes[at]
    return owners


@dataclass(frozen=True)
class ReplicaGroup:
    """The workers that hold copies of the same stages, and which of them this is.

    ``shard``: each one's optimizer has only what it owns and spreads the new weights instead of the sums
    (Rajbhandari et al., "ZeRO", section 5: optimizer state partitioning).
    """

    workers: tuple[str, ...] = ()
    index: int = 0
    shard: bool = False

    @property
    def name(self) -> str:
        """This worker's."""
        return self.workers[self.index]

    def exchanges(self, stages: Mapping[int, Sequence[nn.Parameter]]) -> dict[str, GradientExchange]:
        """By group, one per stage; each worker owns its part of all stages' parameters together."""
        if len(self.workers) < 2:
            return {}
        sizes = [_bytes(parameter) for parameters in stages.values() for parameter in parameters]
        owners = iter(assign(sizes, len(self.workers)))
        return {
            group_of(stage): GradientExchange(
                group_of(stage), self.workers, self.index, parameters, [next(owners) for _ in parameters],
            )
            for stage, parameters in stages.items()
        }  # fmt: skip


def group_of(stage: int) -> str:
    """The group of a stage's replicas."""
    return f"stage {stage}"


class Part(NamedTuple):
    """One message's worth of parameters of one owner."""

    owner: int
    parameters: list[nn.Parameter]


class GradientExchange:
    """What member ``index`` does in ``group``; all members pass ``parameters`` of the same shapes and ``owners``.

    ``workers``: the members', each another one, in the order of summation.
    """

    def __init__(
        self,
        group: str,
        workers: Sequence[str],
        index: int,
        parameters: Sequence[nn.Parameter],
        owners: Sequence[int],
        *,
        limit: int = BUCKET_BYTES,
    ) -> None:
        self.group = group
        self.workers = tuple(workers)
        self.index = index
        self.parts = _cut(parameters, owners, limit)

    @property
    def owners(self) -> list[int]:
        """Each bucket's, for ``reduces`` and ``gathers``."""
        return [part.owner for part in self.parts]

    @property
    def owned_elsewhere(self) -> list[nn.Parameter]:
        """The parameters whose gradients another member sums."""
        return [parameter for part in self.parts if part.owner != self.index for parameter in part.parameters]

    def scatter(self) -> list[Push]:
        """The other owners' parts of the gradients, which are given up."""
        slot, pushes = gradients_from(self.workers[self.index]), list[Push]()
        for bucket, (owner, parameters) in enumerate(self.parts):
            if owner != self.index:
                grads = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    parameter.grad = None
                pushes.append((self.workers[owner], Port(Bucket(self.group, bucket), slot), _to_host(grads)))
        return pushes

    def reduce(self, bucket: int, given: Mapping[str, Tensors]) -> None:
        """Sum in the members' order, into ``.grad``; ``given``: the others' parts by slot."""
        parameters = self.parts[bucket].parameters
        total: Tensors = [None] * len(parameters)
        for at, worker in enumerate(self.workers):
            mine = at == self.index
            part = [parameter.grad for parameter in parameters] if mine else given[gradients_from(worker)]
            total = _added(total, _to_device(part, parameters))
        for parameter, grad in zip(parameters, total, strict=True):
            parameter.grad = grad

    def sums(self, bucket: int) -> list[Push]:
        """What ``reduce`` has made, for the others."""
        return self._to_others(bucket, "sums", [parameter.grad for parameter in self.parts[bucket].parameters])

    def take_sums(self, bucket: int, sums: Tensors) -> None:
        """Take over the owner's sums."""
        parameters = self.parts[bucket].parameters
        for parameter, grad in zip(parameters, _to_device(sums, parameters), strict=True):
            parameter.grad = grad

    def weights(self) -> list[Push]:
        """The values of the parameters owned here, for the others."""
        return [
            push
            for bucket, (owner, parameters) in enumerate(self.parts)
            if owner == self.index
            for push in self._to_others(bucket, "weights", [parameter.detach() for parameter in parameters])
        ]

    @torch.no_grad()
    def take_weights(self, bucket: int, weights: Tensors) -> None:
        """Take over the owner's values."""
        for parameter, value in zip(self.parts[bucket].parameters, weights, strict=True):
            assert value is not None
            parameter.copy_(value)

    def _to_others(self, bucket: int, slot: str, tensors: Tensors) -> list[Push]:
        port, sent = Port(Bucket(self.group, bucket), slot), _to_host(tensors)
        return [(worker, port, sent) for at, worker in enumerate(self.workers) if at != self.index]


def gradients_from(worker: str) -> str:
    """The slot of a member's part, of which a bucket's owner awaits several."""
    return f"gradients from {worker}"


def _cut(parameters: Sequence[nn.Parameter], owners: Sequence[int], limit: int) -> list[Part]:
    """Each owner's parameters in buckets of at most ``limit`` bytes, if more than one."""
    found: list[Part] = []
    for owner in sorted(set(owners)):
        room = 0
        for parameter in (mine for mine, of in zip(parameters, owners, strict=True) if of == owner):
            size = _bytes(parameter)
            if size > room:
                found.append(Part(owner, []))
                room = limit
            found[-1].parameters.append(parameter)
            room -= size
    return found


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _added(total: Tensors, part: Tensors) -> Tensors:
    """``total + part``, in place unless one is sparse; None is zero."""
    both = [(into, grad) for into, grad in zip(total, part, strict=True) if into is not None and grad is not None]
    dense = [(into, grad) for into, grad in both if not (into.is_sparse or grad.is_sparse)]
    if dense:
        torch._foreach_add_([into for into, _ in dense], [grad for _, grad in dense])
    return [_sum(into, grad) for into, grad in zip(total, part, strict=True)]


def _sum(into: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """Return what ``_added`` makes of one pair, of which the dense ones are added already."""
    if into is None or grad is None:
        return grad if into is None else into
    if into.is_sparse:
        return grad + into  # only dense + sparse and sparse + sparse are defined
    return into + grad if grad.is_sparse else into


def _to_host(tensors: Tensors) -> Tensors:
    """Tensors travel through host memory; on the CPU these are the tensors themselves."""
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


def _to_device(tensors: Tensors, like: Sequence[nn.Parameter]) -> Tensors:
    return [None if tensor is None else tensor.to(at.device) for tensor, at in zip(tensors, like, strict=True)]


def statistics_from(worker: str) -> str:
    """The slot of what a replica's micro-batches add to running statistics."""
    return f"statistics from {worker}"
