"""The driver's progress in an accumulation of gradients; the gradients themselves stay on the workers."""

from __future__ import annotations

from typing import NamedTuple

from rpcpipe.errors import ModelError


class Progress(NamedTuple):
    """The progress in one accumulation of ``calls`` calls.

    ``done`` calls have succeeded, the last as step ``after``. ``total`` is the sum of their counts where the
    loss returns (sum, count), else None. ``spoiled``: whether the loss of a call was not finite, so that
    the update is left out.
    """

    calls: int
    done: int = 0
    after: int | None = None
    total: float | None = None
    spoiled: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the next call is the last one, which the update follows."""
        return self.done + 1 == self.calls

    def counted(self, count: float | None) -> float | None:
        """Return ``count`` plus the calls' total so far. Raises ModelError if only some calls have a count."""
        if self.done and (self.total is None) != (count is None):
            raise ModelError(
                "the loss returned the mean in some calls of one accumulation and (sum, count) in others;"
                " return the same form in all"
            )
        return count if self.total is None or count is None else self.total + count

    def later(self, step: int, count: float | None, *, spoiled: bool = False) -> Progress:
        """Return the progress after ``step``, which has succeeded with ``count``."""
        if self.is_last:
            return Progress(self.calls)
        return Progress(self.calls, self.done + 1, step, self.counted(count), self.spoiled or spoiled)
