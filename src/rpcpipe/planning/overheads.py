"""What a step takes beside its layers: dispatch, messages, and what lies between two actions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overheads:
    """Seconds that no layer accounts for; all 0 where nothing was measured.

    ``step``: before the first action and after the last one, without the update. ``call``: the driver's for each action
    before it sends the first one. ``dispatch``: CPU time of the driver and of the workers' other threads for each
    action, near the step's beginning, on the cores that the workers use. ``action``: between two actions of a worker.
    ``message``: of a worker for a message, at each of its ends; ``copy``: the sender's for each byte beside that.
    """

    step: float = 0.0
    call: float = 0.0
    dispatch: float = 0.0
    action: float = 0.0
    message: float = 0.0
    copy: float = 0.0

    def sending(self, size: float) -> float:
        """Return the seconds for which a message of ``size`` bytes occupies its sender."""
        return self.message + size * self.copy

    def around(self, actions: float, idle: float, cores: float) -> float:
        """Return the seconds that a step of ``actions`` takes beside its timeline and its update.

        ``idle``: seconds that workers on ``cores`` wait for their first actions, in which dispatch delays nobody.
        """
        return self.step + actions * self.call + max(0.0, actions * self.dispatch - idle) / cores
