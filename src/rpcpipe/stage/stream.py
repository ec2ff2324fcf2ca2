"""A stage's backward where minibatches follow each other without a flush, and what is left out of its updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rpcpipe.stage import gradients
from rpcpipe.stage.autograd import Gradients
from rpcpipe.stage.context import StepContext
from rpcpipe.stage.stage import Stage


@dataclass(frozen=True)
class Skipped:
    """Travels in place of gradients: leave out the update group that this micro-batch belongs to."""


class StreamBackward:
    """Backwards of one stage in a stream. ``stage.versions`` is set as long as it is used.

    A group whose loss or last gradient is not finite is skipped on all stages. Only the last stage can judge that, as
    no other has used the update yet.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._skipped: set[int] = set()

    def run(
        self, context: StepContext, chunk: int, grads: Mapping[str, Gradients | Skipped]
    ) -> Mapping[str, Gradients | Skipped]:
        """Run the backward of ``chunk``; returns what goes back by each link.

        After a group's last micro-batch its gradients are in ``.grad``. Raises FloatingPointError where a loss or
        gradient that is not finite is to end the stream.
        """
        stage = self._stage
        micro_batch, versions = stage.micro_batches[chunk], stage.versions
        assert versions is not None
        assert micro_batch.group is not None
        given = {link: grad for link, grad in grads.items() if not isinstance(grad, Skipped)}
        found: Mapping[str, Gradients | Skipped]
        if len(given) < len(grads) or not stage.loss_counts(chunk):
            found = dict.fromkeys(stage.give_up(chunk), Skipped())
            self._skip(context, micro_batch.group, f"its loss is {stage.losses[chunk][0]}" if stage.loss else "")
        else:
            found = stage.backward(chunk, given)
        if micro_batch.last:
            versions.collect(versions.of(micro_batch.group))
            if stage.loss is not None and not gradients.finite(stage.parameters):
                self._skip(context, micro_batch.group, "a gradient of the last stage is not finite")
                found = dict.fromkeys(found, Skipped())
        del stage.micro_batches[chunk]
        return found

    def _skip(self, context: StepContext, group: int, why: str) -> None:
        if context.stop and why:
            raise FloatingPointError(f"{why} (nonfinite='stop'); nonfinite='skip' leaves such a minibatch out")
        self._skipped.add(group)

    def take_skipped(self, group: int) -> bool:
        """Is ``group`` to be left out? Asked once, at its update."""
        skipped = group in self._skipped
        self._skipped.discard(group)
        return skipped
