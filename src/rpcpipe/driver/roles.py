"""What a pipeline's Runtime holds without knowing how it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rpcpipe.model.microbatch import Nest
from rpcpipe.stage.progress import Progress
from rpcpipe.worker.operations import Operation


class Active(Protocol):
    """The active object of a pipeline: a step, a stream that is being fed, or forward passes."""

    def apply(self) -> None:
        """Carry out ``pipe.optimizer.step()``."""
        ...

    def forget(self) -> None:
        """Drop the gradients accumulated so far: no later call adds to them."""
        ...

    def lose(self) -> None:
        """Note that workers are being replaced, with whose tasks what was under way is gone."""
        ...


class OpenStream(Protocol):
    """A stream with batches under way."""

    def flush(self) -> None:
        """Wait until all batches under way are done."""
        ...

    def abandon(self) -> None:
        """Forget the batches under way, without sending a message."""
        ...

    def lose(self) -> None:
        """Note that workers are being replaced, with whose tasks the batches under way are gone."""
        ...


class Past(Protocol):
    """What a pipeline has done, to be done again if a host is lost; see ``History``."""

    behind: bool
    restored: int

    @property
    def due(self) -> bool: ...

    @property
    def safe(self) -> bool: ...

    @property
    def leads_to_now(self) -> bool: ...

    def trained(self, step: StepRecord) -> None: ...

    def called(self, workers: Sequence[str], operation: Operation) -> None: ...

    def cut(self) -> None: ...

    def begin_anew(self) -> None: ...

    def tick(self) -> None: ...

    def lose(self) -> None: ...

    def restore(self) -> None: ...

    def close(self) -> None: ...


class StepRecord(NamedTuple):
    """A training step that has succeeded.

    ``progress``: that of the accumulation before it. ``changes``: per parameter group, the hyperparameters sent for the
    update; ``updated``: whether there was one. ``batch``: None for a step by hand.
    """

    number: int
    progress: Progress
    changes: Sequence[Mapping[str, Any]]
    updated: bool
    batch: tuple[Nest, Nest] | None
