"""The unit of a schedule: one piece of work on one stage for one micro-batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from rpcpipe.errors import ScheduleError

Kind = Literal["F", "B", "I", "W", "U"]

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W", "U")
NAMES: dict[str, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "U": "update",
}


class Action(NamedTuple):
    """One action of ``kind`` on ``stage`` for micro-batch ``chunk``.

    ``B`` is the whole backward; ``I`` and ``W`` are its halves (gradient of the input, gradient
    of the weights), as in Qi et al., "Zero Bubble Pipeline Parallelism", section 2. ``U``, in
    asynchronous schedules, updates the weights once ``chunk``'s backward is done.
    """

    kind: Kind
    stage: int
    chunk: int

    def __str__(self) -> str:
        """Return torch.distributed.pipelining's notation: ``0F3`` is the forward of stage 0, chunk 3."""
        return f"{self.stage}{self.kind}{self.chunk}"

    def describe(self) -> str:
        """Return the action in words, for a message: ``forward of stage 0, micro-batch 3``."""
        return f"{NAMES[self.kind]} of stage {self.stage}, micro-batch {self.chunk}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read the notation of ``str``; raises ScheduleError for anything else."""
        stage, kind, chunk = "", "", ""
        for known in KINDS:
            stage, kind, chunk = text.strip().partition(known)
            if kind:
                break
        if not (stage.isdecimal() and kind and chunk.isdecimal()):
            raise ScheduleError(f"{text!r} is no action: write stage, one of F B I W, micro-batch, such as 0F3")
        return cls(kind, int(stage), int(chunk))  # type: ignore[arg-type]
