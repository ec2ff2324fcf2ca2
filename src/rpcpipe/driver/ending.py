"""How a step ends on the workers: with a report for the driver's decision, or with an update of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rpcpipe.worker.agreement import Agreement
from rpcpipe.worker.messages import ORDERS, Orders, Port
from rpcpipe.worker.operations import CommitStep, LastReport, ReportStep, TakeOrders, Task, TellLosses, TellNorms


class Ending(Protocol):
    """The end of a step. ``updates``: workers divide by the batch's count, if there is one, and update by themselves.

    ``alone``: each updates for itself, so the driver has the updates taken back if not all can.
    """

    @property
    def updates(self) -> bool: ...

    @property
    def alone(self) -> bool: ...

    def tasks(self, worker: str) -> list[Task]:
        """Return the tasks that end the step on ``worker``; the last one replies with its Report."""
        ...


class Reporting:
    """Workers report; the driver decides, and tells them to update."""

    updates = False
    alone = False

    def tasks(self, worker: str) -> list[Task]:
        """Return the task that ends the step on every worker."""
        return [Task(ReportStep())]


REPORT = Reporting()


@dataclass(frozen=True)
class Committing:
    """Workers update by themselves.

    ``agreement``: how they agree on it; None if each updates for itself. ``after``: by worker, tasks that follow.
    ``orders``: what the update needs; None where the driver sends it later, because the step runs ahead.
    """

    agreement: Agreement | None
    after: Mapping[str, list[Task]]
    orders: Orders | None = field(default=None, compare=False)

    @property
    def updates(self) -> bool:
        """Whether workers update by themselves: they do."""
        return True

    @property
    def alone(self) -> bool:
        """Whether each worker updates for itself."""
        return self.agreement is None

    def tasks(self, worker: str) -> list[Task]:
        """Return the tasks that end the step on ``worker``; the last one replies with its Report."""
        tasks, norms = [Task(ReportStep())], tuple[Port, ...]()
        tasks += [Task(TakeOrders(self.orders), (ORDERS,) if self.orders is None else ())]
        if (agreement := self.agreement) is not None:
            tasks += [Task(TellLosses(agreement))] if worker in agreement.tellers else []
            tasks += [Task(TellNorms(agreement), agreement.losses_for(worker))]
            norms = agreement.norms_for(worker)
        tasks += [Task(CommitStep(agreement), norms)]
        return [*tasks, *after, Task(LastReport())] if (after := self.after.get(worker)) else tasks
