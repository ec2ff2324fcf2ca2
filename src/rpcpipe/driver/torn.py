"""A state from which nothing may go on: some stages have applied an update that others have not."""

from __future__ import annotations

from rpcpipe.errors import StateError, require

_MEND = (
    "There is no copy to take that back from (undo='off'), so nothing goes on from it: load a checkpoint (pipe.load),"
    " or call load_state_dict and optimizer.load_state_dict. Until then steps, saves and evaluations are refused"
)


class Torn:
    """``why`` the state is torn; empty while it is whole."""

    def __init__(self) -> None:
        self.why = ""
        self._left = set[str]()

    def tear(self, why: str) -> str:
        """Note that weights and optimizer state are not of one update; return ``why``, with what to do."""
        self.why, self._left = f"{why} {_MEND}", {"weights", "optimizer"}
        return self.why

    def replaced(self, *parts: str) -> None:
        """Note that "weights" or the state of the "optimizer" have been loaded; once both have, the state is whole."""
        self._left -= {*parts}
        if not self._left:
            self.why = ""

    def check(self) -> None:
        """Raise StateError unless the state is whole."""
        require(not self.why, self.why, error=StateError)
