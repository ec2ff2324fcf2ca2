"""What all workers' losses and gradients say of an update, and how workers tell each other without the driver.

At the end of a step every worker gets the others' losses and the norms of their gradients by messages, so that all come
to the same verdict, and update with the same factor or not at all:

    report ─▶ losses from the tellers ─▶ divide by the count ─▶ norms from all others ─▶ update, or leave it out

Invariant: where workers exchange gradients all of them are tellers. A worker tells once it has received all sums, so
nobody changes gradients, which may still be on their way, before they have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rpcpipe.stage import gradients
from rpcpipe.worker.messages import Norms, Port, StepEnd

# (value, count) of the loss by micro-batch; count None for a mean.
Losses = Mapping[int, tuple[float, float | None]]


class Agreement(NamedTuple):
    """How ``workers`` agree on an update: whose losses all await, and the norm to clip to."""

    workers: tuple[str, ...]
    tellers: tuple[str, ...]
    max_norm: float | None

    def others(self, worker: str) -> list[str]:
        """Return the workers but ``worker``."""
        return [other for other in self.workers if other != worker]

    def losses_for(self, worker: str) -> tuple[Port, ...]:
        """Return the ports of the losses that ``worker`` awaits."""
        return tuple(losses_from(teller) for teller in self.tellers if teller != worker)

    def norms_for(self, worker: str) -> tuple[Port, ...]:
        """Return the ports of the norms that ``worker`` awaits."""
        return tuple(norms_from(other) for other in self.others(worker))


_END = StepEnd()


def losses_from(worker: str) -> Port:
    """Return the port for the losses of ``worker``."""
    return Port(_END, f"losses from {worker}")


def norms_from(worker: str) -> Port:
    """Return the port for the norms of ``worker``."""
    return Port(_END, f"norms from {worker}")


@dataclass(frozen=True)
class GradientGate:
    """The gradients' norm over all stages, and the ``factor`` that clips them."""

    grad_norm: float
    factor: float

    @property
    def finite(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.grad_norm)

    @classmethod
    def of(cls, parts: Iterable[Norms], max_norm: float | None) -> GradientGate:
        """Return the 2-norm of all gradients, with the factor by which ``clip_grad_norm_(…, max_norm)`` clips them."""
        parts = list(parts)
        by_stage: dict[int, dict[int, float]] = {}
        for part in parts:
            for stage, norms in part.norms.items():
                by_stage.setdefault(stage, {}).update(norms)  # replicas have different ones
        found = [norm for _, norms in sorted(by_stage.items()) for _, norm in sorted(norms.items())]
        dtype = gradients.joint_dtype(part.dtype for part in parts if any(part.norms.values()))
        norm = gradients.total_norm(found, dtype)
        return cls(norm, 1.0 if max_norm is None else gradients.clip_factor(norm, max_norm, dtype))


@dataclass(frozen=True)
class Verdict:
    """A batch's mean ``loss``, its ``count`` if the loss returns (sum, count), and its gradients' ``gate``."""

    loss: float
    count: float | None
    gate: GradientGate

    @property
    def spoiled(self) -> bool:
        """Whether the loss is not finite, other than that of a batch without anything to count.

        Gradients of such a loss may be finite.
        """
        return not math.isfinite(self.loss) and self.count != 0.0

    @property
    def sound(self) -> bool:
        """Whether the loss and all gradients are finite."""
        return self.gate.finite and not self.spoiled


def mean_loss(losses: Losses, weights: Sequence[float] | Mapping[int, float]) -> tuple[float, float | None]:
    """Return (mean loss over the batch, total count) from the last stage's losses.

    The count is None where the loss returns means. ``weights``: each micro-batch's share of the batch.
    """
    counts = [count for _, count in losses.values() if count is not None]
    if not counts:
        return sum(losses[chunk][0] * weights[chunk] for chunk in sorted(losses)), None
    total = sum(counts)
    return sum(losses[chunk][0] for chunk in sorted(losses)) / total if total else float("nan"), total


def divisor(count: float) -> float:
    """Return what gradients are divided by for a batch's ``count``: NaN for 0, which keeps them from the weights."""
    return count or math.nan
