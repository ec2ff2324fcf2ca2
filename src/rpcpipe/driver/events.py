"""What happened to a pipeline beside its steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PipelineEvent:
    """What happened to a pipeline after ``step`` steps, and when (seconds since the epoch).

    ``kind``: "saved" or "loaded" (a checkpoint), "resized" (other workers, or another cut), "schedule" (another one);
    ``how`` says it in words.
    """

    kind: str
    step: int
    how: str
    time: float = field(default_factory=time.time)
