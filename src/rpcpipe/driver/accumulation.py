"""How far an accumulation of gradients has come; the gradients stay on the workers."""

from __future__ import annotations

from typing import NamedTuple

from rpcpipe.errors import ArgumentError


class Progress(NamedTuple):
    """How far the driver has come in one accumulation of ``calls`` calls.

    ``done`` of them ended well, the last as step ``after``; a loss of (sum, count) has counted
    ``total`` in them. ``spoiled``: the loss of one of them was not finite, so the update is to be left out.
    """

    calls: int
    done: int = 0
    after: int | None = None
    total: float | None = None
    spoiled: bool = False

    @property
    def is_last(self) -> bool:
        """Does the update follow on the next call?"""
        return self.done + 1 == self.calls

    def counted(self, count: float | None) -> float | None:
        """``count`` with that of the calls before."""
        if self.done and (self.total is None) != (count is None):
            raise ArgumentError(
                "the loss returned the mean in some calls of one accumulation and (sum, count) in others;"
                " return the same form in all"
            )
        return count if self.total is None or count is None else self.total + count

    def later(self, step: int, count: float | None, *, spoiled: bool = False) -> Progress:
        """After ``step``, which counted ``count``, ended well."""
        if self.is_last:
            return Progress(self.calls)
        return Progress(self.calls, self.done + 1, step, self.counted(count), self.spoiled or spoiled)
