"""A schedule as users handle it: shown as a table, simulated, written to and read from CSV."""

from __future__ import annotations

import csv
import io
import re

from rpcpipe import _tables
from rpcpipe._arguments import require_kind
from rpcpipe.errors import ScheduleError
from rpcpipe.schedules.action import Action
from rpcpipe.schedules.costs import Costs
from rpcpipe.schedules.order import Order
from rpcpipe.schedules.simulate import simulate
from rpcpipe.schedules.timeline import Timeline

_HEADER = ("worker", "stages", "actions", "first")
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
_IMPLIED = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_SHOWN = 12  # actions of a worker in the table


class Schedule(Order):
    """What every worker does, in order.

    ``placement[stage]`` is the worker that holds the stage; ``actions[worker]`` is executed
    strictly in its order. ``chunks`` is the number of micro-batches of a step.
    """

    def __repr__(self) -> str:
        sizes = f"{self.workers} workers, {self.stages} stages, {self.chunks} micro-batches"
        return f"Schedule({self.name}: {sizes})\n{_tables.text(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(f"Schedule {self.name}, {self.chunks} micro-batches", _HEADER, self._rows())

    def _rows(self) -> list[list[str]]:
        rows = []
        for worker, actions in enumerate(self.actions):
            stages = ", ".join(str(stage) for stage, holder in enumerate(self.placement) if holder == worker)
            first = " ".join(map(str, actions[:_SHOWN])) + (" …" if len(actions) > _SHOWN else "")
            rows.append([f"worker {worker}", stages, str(len(actions)), first])
        return rows

    def simulate(self, costs: Costs | None = None) -> Timeline:
        """Predict the step's timeline; ``costs`` defaults to F = I = W = 1, free communication.

        Raises ScheduleError where the schedule would deadlock, ArgumentError where ``costs`` has another number of
        stages.
        """
        require_kind("costs", costs, (Costs, type(None)), "rp.schedules.Costs, or None")
        return simulate(self, costs)

    def to_csv(self) -> str:
        """Return one line per worker in torch.distributed.pipelining's action notation."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([str(action) for action in row] for row in self.actions)
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str, *, name: str = "csv") -> Schedule:
        """Read what torch.distributed.pipelining writes, one line per worker; empty cells are idle and dropped.

        ``(0F7;7B3)OVERLAP_F_B`` is its actions in order. Sends, receives and what shards parameters follow from the
        placement and are dropped. Raises ScheduleError for another cell, and as ``from_actions`` does.
        """
        require_kind("text", text, str, "the text of a CSV file")
        rows = [
            [action for cell in row for action in _actions(cell.strip())]
            for row in _cells(text)
            if any(cell.strip() for cell in row)
        ]
        return cls.from_actions(rows, name=name)


def _cells(text: str) -> list[list[str]]:
    """Return the rows of a CSV file; raises ScheduleError for a text that is none."""
    try:
        return list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise ScheduleError(f"the text is no CSV of actions: {error}; write it as Schedule.to_csv() does") from error


def _actions(cell: str) -> list[Action]:
    """Return the actions that a cell of torch's CSV stands for."""
    if not cell or _IMPLIED.fullmatch(cell):
        return []
    overlap = _OVERLAP.fullmatch(cell)
    return [Action.parse(part) for part in (overlap[1].split(";") if overlap else [cell])]
