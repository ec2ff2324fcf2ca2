"""The exchange of gradients and weights between the members of a group, who hold the same parameters.

It is a reduce-scatter by ownership, then an all-gather, made of pushes and of tasks in the workers' strict
sequences: ``scatter`` sends every owner its part of the gradients, ``reduce`` sums the parts on the owner
in the members' order, ``sums`` sends the sums to the other members and ``take_sums`` receives them. The
members are a stage's replicas, or the stages that share a weight.

No collective of torch.distributed is used, for two reasons. A collective that a failed or cancelled step
leaves half-joined hangs its peers or pairs with the next step's, while a push carries its step's number and
is cancelled, watched and awaited like any other value. And the library would decide the order of
summation. The price is in docs/guide/parallelism.md.

Invariants: a member that pushes gradients drops its references, so the receiver may sum in place. The
tensors of ``sums`` must not change until all members have reported; the driver waits for all reports
before any gradient or weight changes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from rpcpipe.worker.messages import Bucket, Port

# The size of one message: large enough for the wire's full rate, small enough that summing overlaps with sending.
BUCKET_BYTES = 4 << 20

Tensors = list[torch.Tensor | None]
# (worker, port, value) to push
Push = tuple[str, Port, Sequence[torch.Tensor | None]]


def assign(sizes: Sequence[int], members: int) -> list[int]:
    """Return the owner of each parameter of ``sizes`` bytes. Greedy: largest first, to the least loaded member.

    The largest load is at most 4/3 of the best possible one (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969).
    """
    load, owners = [0] * members, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(members), key=load.__getitem__)
        load[owners[index]] += sizes[index]
    return owners


@dataclass(frozen=True)
class ReplicaGroup:
    """The workers that hold copies of the same stages; ``workers[index]`` is this worker.

    ``shard``: each worker's optimizer holds only the parameters that it owns, and the new weights are sent to
    the other members instead of the sums (Rajbhandari et al., "ZeRO", section 5: optimizer state partitioning).
    """

    workers: tuple[str, ...] = ()
    index: int = 0
    shard: bool = False

    @property
    def name(self) -> str:
        """This worker's name."""
        return self.workers[self.index]

    def exchanges(self, stages: Mapping[int, Sequence[nn.Parameter]]) -> dict[str, GradientExchange]:
        """Return an exchange per stage, by group; ``assign`` balances ownership over all stages together."""
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
    """Return the name of the group of a stage's replicas."""
    return f"stage {stage}"


class Part(NamedTuple):
    """A bucket: the parameters of one owner that one message carries."""

    owner: int
    parameters: list[nn.Parameter]


class GradientExchange:
    """Member ``index``'s part in ``group``. All members pass ``parameters`` of the same shapes and the same ``owners``.

    ``workers``: the members' distinct workers, in the order of summation. ``limit``: bytes of one bucket.
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
        """The owner of each bucket."""
        return [part.owner for part in self.parts]

    @property
    def owned_elsewhere(self) -> list[nn.Parameter]:
        """The parameters whose gradients another member sums."""
        return [parameter for part in self.parts if part.owner != self.index for parameter in part.parameters]

    def scatter(self) -> list[Push]:
        """Return pushes of the gradients to their owners, and drop them from ``.grad`` on this member."""
        slot, pushes = gradients_from(self.workers[self.index]), list[Push]()
        for bucket, (owner, parameters) in enumerate(self.parts):
            if owner != self.index:
                grads = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    parameter.grad = None
                pushes.append((self.workers[owner], Port(Bucket(self.group, bucket), slot), _to_host(grads)))
        return pushes

    def reduce(self, bucket: int, received: Mapping[str, Tensors]) -> None:
        """Sum the members' gradients of ``bucket`` in the members' order into ``.grad``; ``received``: by slot."""
        parameters = self.parts[bucket].parameters
        total: Tensors = [None] * len(parameters)
        for index, worker in enumerate(self.workers):
            own = index == self.index
            part = [parameter.grad for parameter in parameters] if own else received[gradients_from(worker)]
            total = _added(total, _to_device(part, parameters))
        for parameter, grad in zip(parameters, total, strict=True):
            parameter.grad = grad

    def sums(self, bucket: int) -> list[Push]:
        """Return pushes of the sums that ``reduce`` has made to the other members."""
        return self._to_others(bucket, "sums", [parameter.grad for parameter in self.parts[bucket].parameters])

    def take_sums(self, bucket: int, sums: Tensors) -> None:
        """Set the gradients of ``bucket`` to the owner's ``sums``."""
        parameters = self.parts[bucket].parameters
        for parameter, grad in zip(parameters, _to_device(sums, parameters), strict=True):
            parameter.grad = grad

    def weights(self) -> list[Push]:
        """Return pushes of the values of this member's parameters to the other members."""
        return [
            push
            for bucket, (owner, parameters) in enumerate(self.parts)
            if owner == self.index
            for push in self._to_others(bucket, "weights", [parameter.detach() for parameter in parameters])
        ]

    @torch.no_grad()
    def take_weights(self, bucket: int, weights: Tensors) -> None:
        """Set the parameters of ``bucket`` to the owner's ``weights``."""
        for parameter, value in zip(self.parts[bucket].parameters, weights, strict=True):
            assert value is not None
            parameter.copy_(value)

    def _to_others(self, bucket: int, slot: str, tensors: Tensors) -> list[Push]:
        port, sent = Port(Bucket(self.group, bucket), slot), _to_host(tensors)
        return [(worker, port, sent) for index, worker in enumerate(self.workers) if index != self.index]


def gradients_from(worker: str) -> str:
    """Return the slot of the gradients that ``worker`` pushes to a bucket's owner."""
    return f"gradients from {worker}"


def _cut(parameters: Sequence[nn.Parameter], owners: Sequence[int], limit: int) -> list[Part]:
    """Return each owner's parameters in buckets of at most ``limit`` bytes; a larger parameter is a bucket alone."""
    buckets: list[Part] = []
    for owner in sorted(set(owners)):
        room = 0
        for parameter in (parameter for parameter, o in zip(parameters, owners, strict=True) if o == owner):
            size = _bytes(parameter)
            if size > room:
                buckets.append(Part(owner, []))
                room = limit
            buckets[-1].parameters.append(parameter)
            room -= size
    return buckets


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _added(total: Tensors, part: Tensors) -> Tensors:
    """Return ``total + part``, added in place unless one is sparse; None means zero."""
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
    """Return ``tensors`` in host memory, where they travel; tensors of the CPU are returned themselves."""
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


def _to_device(tensors: Tensors, like: Sequence[nn.Parameter]) -> Tensors:
    """Return each tensor on the device of the parameter at the same index of ``like``."""
    return [None if tensor is None else tensor.to(p.device) for tensor, p in zip(tensors, like, strict=True)]


def statistics_from(worker: str) -> str:
    """Return the slot of the additions to running statistics that ``worker`` pushes to the first replica."""
    return f"statistics from {worker}"
