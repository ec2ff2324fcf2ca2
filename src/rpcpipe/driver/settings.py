"""The settings of training, which hold for a pipeline whatever its stages are."""

from __future__ import annotations

from dataclasses import dataclass

from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.weight_versions import Policy


@dataclass(kw_only=True)
class Settings:
    """The settings of training, replaced between steps.

    ``undo``: whether workers copy what an update changes, to take it back ("copy", "off").
    ``trains`` and ``has_loss``: whether the pipeline was made with an optimizer and with a loss.
    """

    accumulate: int = 1
    batch_norm: str = "micro_batch"
    clip_grad_norm: float | None = None
    flush_every: int | None = None
    nonfinite: str = "skip"
    weights: str | None = None
    virtual_stages: int = 1
    undo: str = "copy"
    trains: bool = True
    has_loss: bool = True

    def check(self, policy: Policy | None, *, scaled: bool) -> None:
        """Raise ScheduleError for settings that do not fit an asynchronous schedule with ``policy``.

        ``policy``: the versions that stages keep of their weights; None for a synchronous schedule, which fits all
        settings. ``scaled``: whether the loss is scaled.
        """
        if policy is None:
            return
        if scaled:
            raise ScheduleError(
                "autocast=torch.float16 scales the loss, and whether a gradient overflowed is to be known on all stages"
                " before any of them updates: use torch.bfloat16, or a synchronous schedule"
            )
        if self.accumulate > 1:
            raise ScheduleError(
                f"accumulate={self.accumulate} does not fit an asynchronous schedule; pipedream-2bw makes one update of"
                " all micro-batches of a batch: pass it larger batches and more chunks"
            )
        if self.undo == "off":
            raise ScheduleError(
                "undo='off' does not fit an asynchronous schedule: stages update at different times, and where one"
                " fails all come back to copies of the same update. Use undo='copy', or a synchronous schedule"
            )
        if self.batch_norm == "deferred":
            raise ScheduleError(
                "batch_norm='deferred' waits for the end of a batch, and an asynchronous schedule has begun the next by"
                " then: use batch_norm='micro_batch', or a synchronous schedule"
            )
