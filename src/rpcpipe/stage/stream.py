"""A stage's backward in a stream, where minibatches follow each other without a flush, and skipped updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rpcpipe.errors import NonFiniteError
from rpcpipe.stage import gradients
from rpcpipe.stage.autograd import Gradients
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.stage import Stage


@dataclass(frozen=True)
class Skipped:
    """Sent in place of gradients: the update group of this micro-batch is to be skipped."""


class StreamBackward:
    """Runs the backwards of one stage in a stream; ``stage.versions`` must be set.

    A group whose loss or accumulated gradient on the last stage is not finite is skipped on all stages. Only the last
    stage can decide this, because it runs the group's backward before any stage has applied the group's update.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._skipped: set[int] = set()

    def run(
        self, context: StepContext, chunk: int, grads: Mapping[str, Gradients | Skipped]
    ) -> Mapping[str, Gradients | Skipped]:
        """Run the backward of ``chunk``; return the input gradients, or Skipped, by link.

        After a group's last micro-batch the group's gradients are in ``.grad``. Raises NonFiniteError for a loss
        or gradient that is not finite if ``context.stop`` is set.
        """
        stage = self._stage
        micro_batch, versions = stage.micro_batches[chunk], stage.versions
        assert versions is not None
        assert micro_batch.group is not None
        output_grads = {link: grad for link, grad in grads.items() if not isinstance(grad, Skipped)}
        input_grads: Mapping[str, Gradients | Skipped]
        if len(output_grads) < len(grads) or not stage.loss_counts(chunk):
            input_grads = dict.fromkeys(stage.give_up(chunk), Skipped())
            self._skip(context, micro_batch.group, f"its loss is {stage.losses[chunk][0]}" if stage.loss else "")
        else:
            input_grads = stage.backward(chunk, output_grads)
        if micro_batch.last:
            versions.collect(versions.of(micro_batch.group))
            if stage.loss is not None and not gradients.finite(stage.parameters):
                self._skip(context, micro_batch.group, "a gradient of the last stage is not finite")
                input_grads = dict.fromkeys(input_grads, Skipped())
        del stage.micro_batches[chunk]
        return input_grads

    def _skip(self, context: StepContext, group: int, why: str) -> None:
        if context.stop and why:
            raise NonFiniteError(f"{why} (nonfinite='stop'); nonfinite='skip' leaves such a minibatch out")
        self._skipped.add(group)

    def take_skipped(self, group: int) -> bool:
        """Return whether the update of ``group`` is to be skipped, and forget it; called once, at the update."""
        skipped = group in self._skipped
        self._skipped.discard(group)
        return skipped
