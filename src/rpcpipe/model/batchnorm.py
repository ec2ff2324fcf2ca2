"""BatchNorm whose running statistics are those of the whole batch, as in torchgpipe's DeferredBatchNorm.

Every micro-batch is normalised by its own statistics, deferred or not, as in gradient accumulation.
An ordinary BatchNorm also updates the running statistics for every micro-batch, so that they become those
of small batches with a large momentum. A deferred BatchNorm merges the moments of the micro-batches (Chan
et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979) and updates the
running statistics once, after the last micro-batch of the step.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rpcpipe.errors import ModelError

MODES = ("micro_batch", "deferred")


class DeferredBatchNorm(_BatchNorm):
    """A BatchNorm with pending statistics: ``pending_count``, ``pending_mean``, ``pending_squares``.

    They hold count, mean and sum of squared deviations of the step's micro-batches so far, per channel.
    They are buffers, so that a recomputation or a failed step restores them with the other buffers, and not
    persistent, so that ``state_dict`` equals that of a BatchNorm.
    """

    pending_count: torch.Tensor
    pending_mean: torch.Tensor
    pending_squares: torch.Tensor

    def open(self) -> None:
        """Create the pending statistics, all zero."""
        assert self.running_mean is not None
        zeros = torch.zeros_like(self.running_mean, dtype=torch.float64)
        self.register_buffer("pending_count", zeros.new_zeros(()), persistent=False)
        self.register_buffer("pending_mean", zeros, persistent=False)
        self.register_buffer("pending_squares", zeros.clone(), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output of the BatchNorm; in training, merge the moments into the pending statistics."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)  # type: ignore[arg-type]
        # With momentum 1 ``mean`` and ``variance`` become this micro-batch's mean and unbiased variance.
        output = nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        count = input.numel() // input.shape[1]
        self.merge(torch.tensor(float(count), dtype=torch.float64), mean.double(), variance.double() * (count - 1))
        return output

    def give(self) -> list[torch.Tensor]:
        """Return the pending statistics, for ``merge`` on another replica, and reset them here to zero."""
        pending = [self.pending_count, self.pending_mean, self.pending_squares]
        self.open()
        return pending

    @torch.no_grad()
    def merge(self, count: torch.Tensor, mean: torch.Tensor, squares: torch.Tensor) -> None:
        """Add ``count`` values with mean ``mean`` and squared deviations ``squares`` to the pending statistics."""
        if not count:
            return
        total = self.pending_count + count
        delta = mean - self.pending_mean
        self.pending_mean += delta * (count / total)
        self.pending_squares += squares + delta.square() * (self.pending_count * count / total)
        self.pending_count.copy_(total)

    @torch.no_grad()
    def commit(self) -> None:
        """Update the running statistics from the pending ones, as one forward of the whole batch would."""
        if not self.pending_count:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(self.pending_mean.to(self.running_mean.dtype), step)
        variance = self.pending_squares / (self.pending_count - 1)
        self.running_var.lerp_(variance.to(self.running_var.dtype), step)
        self.clear()

    def clear(self) -> None:
        """Reset the pending statistics to zero."""
        for pending in (self.pending_count, self.pending_mean, self.pending_squares):
            pending.zero_()


class DeferredBatchNorm1d(DeferredBatchNorm, nn.BatchNorm1d):
    """An ``nn.BatchNorm1d``, deferred."""


class DeferredBatchNorm2d(DeferredBatchNorm, nn.BatchNorm2d):
    """An ``nn.BatchNorm2d``, deferred."""


class DeferredBatchNorm3d(DeferredBatchNorm, nn.BatchNorm3d):
    """An ``nn.BatchNorm3d``, deferred."""


_DEFERRED_CLASSES = {
    nn.BatchNorm1d: DeferredBatchNorm1d,
    nn.BatchNorm2d: DeferredBatchNorm2d,
    nn.BatchNorm3d: DeferredBatchNorm3d,
}


def defer(module: nn.Module) -> nn.Module:
    """Make every BatchNorm in ``module`` deferred, in place, and return ``module``.

    Hooks, parameters and names stay. Raises ModelError for a subclass of BatchNorm, whose forward is unknown.
    """
    for norm in module.modules():
        if not isinstance(norm, _BatchNorm) or isinstance(norm, DeferredBatchNorm) or not norm.track_running_stats:
            continue
        deferred_class = _DEFERRED_CLASSES.get(type(norm))
        if deferred_class is None:
            raise ModelError(
                f"batch_norm='deferred' takes nn.BatchNorm1d, 2d and 3d, not {type(norm).__name__};"
                " replace it, or pass batch_norm='micro_batch'"
            )
        norm.__class__ = deferred_class
        cast(DeferredBatchNorm, norm).open()
    return module


def deferred(module: nn.Module) -> list[DeferredBatchNorm]:
    """Return the deferred BatchNorms in ``module``."""
    return [norm for norm in module.modules() if isinstance(norm, DeferredBatchNorm)]
