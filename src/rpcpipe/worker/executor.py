"""The executor: one compute thread per worker that runs tasks in strict sequence.

Handlers (``submit``, ``deliver``, ``cancel``) file tasks and values and return at once. The transport's threads call
them, and the compute thread itself for what comes by a lane. The compute thread takes the next task whose values have
all arrived, from any pipeline, and runs it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from rpcpipe.errors import Failure
from rpcpipe.model import torch_settings
from rpcpipe.model.microbatch import map_tensors
from rpcpipe.schedules.action import Action, Kind
from rpcpipe.stage.kept_memory import KeptMemory
from rpcpipe.transport import user_pickling
from rpcpipe.transport.base import Transport
from rpcpipe.transport.message_pickling import in_bounds
from rpcpipe.worker.actor import Actor
from rpcpipe.worker.actor_spec import ActorSpec
from rpcpipe.worker.mailbox import Entry, Mailbox
from rpcpipe.worker.messages import ORDERS, Port, ReadOrder, as_tensors, from_tensors
from rpcpipe.worker.operations import Operation, Task
from rpcpipe.worker.programs import Sent
from rpcpipe.worker.revival import Restored, restore
from rpcpipe.worker.stage_set import StageSet
from rpcpipe.worker.titles import described, place_of, title
from rpcpipe.worker.vault import Vault
from rpcpipe.worker.worker_operations import (
    CallFunction,
    CreateActor,
    DropActor,
    ForgetStep,
    ForwardByHand,
    ReadBatch,
    ReviveActor,
    TakeSnapshot,
)

_SWITCH_SECONDS = 2e-4

log = logging.getLogger("rpcpipe.worker")


class Executor:
    """Holds all pipelines' actors on one worker and serves the transport's verbs by the handlers below."""

    def __init__(self, name: str, transport: Transport, *, device: torch.device, threads: int) -> None:
        self.name = name
        self.actors: dict[str, Actor] = {}
        self.finished = 0
        self._transport = transport
        self._device = device
        self._threads = threads
        self._mailboxes: dict[str, Mailbox] = {}
        self._turns: dict[str, int] = {}  # by pipeline, of the newest ``revive``
        self._changed = threading.Lock()
        self._compute_thread = 0
        self._closed = False
        self._running: tuple[str, Entry] | None = None
        self._general = Mailbox()
        self._general_next = 0
        self._vault = vault = Vault(transport)
        # Further verbs.
        self.store, self.stored, self.send_snapshot, self.forget_snapshots = (
            vault.store, vault.stored, vault.send, vault.forget,
        )  # fmt: skip
        self._idle_work_left = False

    # --- handlers: called by any thread, never block ---

    def create(self, pipeline: str, spec: bytes) -> Future[Any]:
        """Build an actor from a pickled ActorSpec; reply with the description of its stages."""
        with self._changed:
            self._mailboxes[pipeline] = Mailbox()
            return self._enqueue(CreateActor(pipeline, spec))

    def revive(self, pipeline: str, turn: int, path: str, place: int, copy: bool) -> Future[Any]:
        """Build an actor from the memory file ``path`` of a worker that has died; reply as ``create`` does.

        ``place``: that of the first task for this worker. ``copy``: go on in a copy of the memory; the actor that there
        may be is given up, with all that is under way for it. ``turn``: a later try has a higher one, and an earlier
        one that comes after it is refused.
        """
        with self._changed:
            if turn < self._turns.get(pipeline, turn):
                return _replied(Failure.cancel(self.name, "a call that was made again"))
            self._turns[pipeline] = turn
            # That of an actor here has the programs to which late messages refer.
            mailbox = self._mailboxes.setdefault(pipeline, Mailbox(place))
            late = mailbox.cancel(-1, 0, place)
            reply = self._enqueue(ReviveActor(pipeline, path, copy))
        self._refuse(late)
        return reply

    def run(self, call: bytes) -> Future[Any]:
        """Run a pickled ``(function, args)`` on the compute thread, outside of any pipeline; reply its result."""
        with self._changed:
            return self._enqueue(CallFunction(call))

    def forward(self, pipeline: str, number: int, nest: Any) -> Future[Any]:
        """Apply stage ``number``'s module to ``nest``, for distributed autograd by hand; reply with the output."""
        with self._changed:
            return self._enqueue(ForwardByHand(pipeline, number, nest))

    def read(self, pipeline: str, order: ReadOrder) -> Future[Any]:
        """Read a batch on the compute thread, between two tasks of any step; reply with a ReadAnswer."""
        with self._changed:
            return self._enqueue(ReadBatch(pipeline, order))

    def submit(
        self, pipeline: str, step: int, sequence: int, sent: Sequence[Sent], values: Sequence[tuple[Port, Any]] = ()
    ) -> Future[Any]:
        """File the tasks ``sent`` from place ``sequence`` on and ``values`` for them; reply with the last's outcome."""
        reply: Future[Any] = Future()
        self._file(pipeline, step, sequence, sent, values, reply)
        return reply

    def accept(
        self, pipeline: str, step: int, sequence: int, sent: Sequence[Sent], values: Sequence[tuple[Port, Any]] = ()
    ) -> str:
        """File tasks like ``submit`` and reply at once; ``ReportStep`` reports their outcome.

        A reply at the end of every action would cost the compute thread a message each.
        """
        self._file(pipeline, step, sequence, sent, values, None)
        return "accepted"

    def _file(
        self,
        pipeline: str,
        step: int,
        sequence: int,
        sent: Sequence[Sent],
        values: Sequence[tuple[Port, Any]],
        reply: Future[Any] | None,
    ) -> None:
        with self._changed:
            mailbox = self._mailboxes.get(pipeline)
            if mailbox is not None:
                self._put(pipeline, mailbox, step, values)
                entries = [Entry(step, task) for task in mailbox.tasks(sent)]
                entries[-1].reply = reply
                late = mailbox.submit(sequence, entries)
                # Calls are issued far ahead: the compute thread need not wake for those that are not next.
                if mailbox.is_ready() or sequence <= mailbox.expected < sequence + len(entries):
                    self._idle_work_left = True  # what it waits for may let something be prepared
                    self._wake()
        if mailbox is not None:
            self._refuse(late)
        elif reply is not None:
            reply.set_result(Failure.cancel(self.name, "a closed pipeline's call"))

    def deliver(self, pipeline: str, step: int, port: Port, value: Any) -> None:
        """File ``value`` for ``port``, which another worker has pushed."""
        if isinstance(port.action, Action) and (actor := self.actors.get(pipeline)) is not None:
            # The arrival is recorded before the value is filed: with its last value the step may end at once.
            actor.arrived(step, port)
        self.supply(pipeline, step, [(port, value)])

    def deliver_tensors(
        self,
        pipeline: str,
        step: int,
        place: tuple[tuple[Kind, int, int], str],
        wants_grad: list[bool] | None,
        tensors: list[torch.Tensor],
    ) -> None:
        """Do as ``deliver`` for a value of tensors alone; ``place``: its port as builtins, which travel fastest."""
        action, slot = place
        self.deliver(pipeline, step, Port(Action(*action), slot), from_tensors(wants_grad, tensors))

    def supply(self, pipeline: str, step: int, values: Sequence[tuple[Port, Any]]) -> None:
        """File ``values`` by port, for tasks that come, or have come, by another message."""
        with self._changed:
            mailbox = self._mailboxes.get(pipeline)
            if mailbox is not None and (self._put(pipeline, mailbox, step, values) or mailbox.is_ready()):
                self._wake()

    def _put(self, pipeline: str, mailbox: Mailbox, step: int, values: Sequence[tuple[Port, Any]]) -> bool:
        """File ``values``; return whether there is something to be prepared."""
        ordered = False
        for port, value in values:
            mailbox.put(step, port, value)
            if port == ORDERS and (actor := self.actors.get(pipeline)) is not None:
                actor.ordered(step)
                ordered = self._idle_work_left = True  # copies to take the update back
        return ordered

    def clock(self) -> int:
        """Return this process's monotonic clock in nanoseconds."""
        return time.monotonic_ns()

    def cancel(self, pipeline: str, step: int, first: int, resume: int) -> None:
        """Drop the remaining tasks of ``step``, which have the places from ``first`` up to ``resume``.

        A task of the step that is running ends without effect.
        """
        with self._changed:
            mailbox = self._mailboxes.get(pipeline)
            if mailbox is None:
                return
            late = mailbox.cancel(step, first, resume)
            self._enqueue(ForgetStep(pipeline, step))
        self._refuse(late)

    def watch(self, pipeline: str, step: int) -> Future[Any]:
        """Reply with the first failure of ``step`` as soon as it happens, or None once the step is over."""
        with self._changed:
            if (mailbox := self._mailboxes.get(pipeline)) is not None:
                return mailbox.watch(step)
        return _replied(None)

    def abandon(self, pipeline: str, step: int, group: int) -> None:
        """Cancel the tasks of the stream ``step`` from ``group`` on; earlier groups run to their end."""
        with self._changed:
            if (mailbox := self._mailboxes.get(pipeline)) is not None:
                mailbox.fail(step, Failure.cancel(self.name, "a stream"), group)
                self._wake()

    def drop(self, pipeline: str) -> None:
        """Free a pipeline's stages."""
        with self._changed:
            mailbox = self._mailboxes.pop(pipeline, None)
            late = mailbox.cancel(1 << 62, 0, 1 << 62) if mailbox is not None else []
            self._enqueue(DropActor(pipeline))
        self._refuse(late)

    def progress(self) -> tuple[int, str]:
        """Return (tasks finished so far, what the worker runs or waits for now)."""
        with self._changed:
            if self._running is not None:
                return self.finished, f"runs {described(self._running[1].task.operation)}"
            waits = [text for mailbox in self._mailboxes.values() if (text := mailbox.waiting_for())]
            return self.finished, "; ".join(waits) or "idle"

    def close(self) -> None:
        """End the compute thread after the task that it runs."""
        with self._changed:
            self._closed = True
            self._wake()

    def _wake(self) -> None:
        """Let the compute thread look again for something to do."""
        if threading.get_ident() != self._compute_thread:
            self._transport.wake()

    def _enqueue(self, operation: Operation) -> Future[Any]:
        """Queue an operation outside of any step; the caller holds the lock."""
        reply: Future[Any] = Future()
        self._general.submit(self._general_next, [Entry(-1, Task(operation), reply)])
        self._general_next += 1
        self._wake()
        return reply

    # --- the compute thread ---

    def serve(self) -> None:
        """Run tasks until ``close``."""
        # Every thread has an OpenMP pool, so the size is set in the thread that computes.
        torch.set_num_threads(self._threads)
        # A handler that holds the GIL delays the compute thread's next kernel: switch often.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._compute_thread = threading.get_ident()
        while (taken := self._next()) is not None:
            self._finish(*taken)

    def run_one(self) -> bool:
        """Run one task if one is ready; return whether one was. The in-process transport runs tasks this way."""
        with self._changed:
            taken = self._take()
        if taken is not None:
            self._finish(*taken)
        return taken is not None

    def _next(self) -> tuple[str, Entry] | None:
        """Return the next task whose values have all arrived, or None once closed; do idle work meanwhile."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                if (taken := self._take()) is not None:
                    return taken
                idle = self._idle_work_left
                awaited = {pipeline: mailbox.awaited() for pipeline, mailbox in self._mailboxes.items()} if idle else {}
            # No deadline is needed: every change of the conditions above wakes.
            if self._transport.receive(0.0 if idle else None):
                continue
            try:
                self._idle_work_left = any(
                    actor.idle_work(awaited.get(pipeline)) for pipeline, actor in list(self.actors.items())
                )
            except Exception:
                # The work stays undone. The optimizer needs it, tries again and reports the failure.
                log.debug("idle work failed", exc_info=True)
                self._idle_work_left = False

    def _take(self) -> tuple[str, Entry] | None:
        if (entry := self._general.take()) is not None:
            self._running = "", entry
            return self._running
        for pipeline, mailbox in self._mailboxes.items():
            if (entry := mailbox.take()) is not None:
                self._running = pipeline, entry
                return self._running
        return None

    def _finish(self, pipeline: str, entry: Entry) -> None:
        outcome = entry.failure or self._outcome(pipeline, entry)
        with self._changed:
            self._running = None
            self.finished += 1
            self._idle_work_left = True
            mailbox = self._mailboxes.get(pipeline)
            if mailbox is not None and isinstance(outcome, Failure) and entry.step >= 0:
                # Tasks between steps have step -1: their failure ends no other task.
                mailbox.fail(entry.step, outcome, entry.task.group)
        if entry.reply is not None:
            entry.reply.set_result(outcome)

    def _outcome(self, pipeline: str, entry: Entry) -> Any:
        operation = entry.task.operation
        try:
            if isinstance(operation, TakeSnapshot):
                number, keeper = operation
                return self._vault.take(pipeline, self.name, number, keeper, self.actors[pipeline].write_image)
            return self._execute(operation) if not pipeline else self.actors[pipeline].execute(operation, entry.values)
        except BaseException as error:
            stage, chunk = place_of(operation)
            log.debug("%s failed", title(operation), exc_info=True)
            return Failure.of(
                error, worker=self.name, action=title(operation), stage=stage, chunk=chunk, in_step=entry.step >= 0
            )

    def _execute(self, operation: Operation) -> Any:
        """Execute an operation of the worker as a whole."""
        match operation:
            case CreateActor(pipeline, spec):
                loaded: ActorSpec = user_pickling.loads(spec)
                return self._serve(pipeline, StageSet(loaded, self._device))
            case ReviveActor(pipeline, path, copy):
                self.actors.pop(pipeline, None)
                restored = restore(KeptMemory.open(path, copy=copy), self._device)
                return self._serve(pipeline, restored.held, restored)
            case CallFunction(call):
                function, args = user_pickling.loads(call)
                try:
                    return user_pickling.dumps(function(*args))
                finally:
                    torch_settings.forget()
            case ForwardByHand(pipeline, stage, inputs):
                return map_tensors(in_bounds, self.actors[pipeline].module(stage)(inputs))
            case ReadBatch(pipeline, order):
                return self.actors[pipeline].reader.read(order)
            case ForgetStep(pipeline, step):
                if (actor := self.actors.get(pipeline)) is not None:
                    actor.reset(step)
            case DropActor(pipeline):
                self.actors.pop(pipeline, None)
                self._vault.drop(pipeline)
            case _:
                raise AssertionError(f"{title(operation)} needs a pipeline")
        return None

    def _serve(self, pipeline: str, held: StageSet, restored: Restored | None = None) -> Any:
        def send(worker: str, step: int, port: Port, value: Any) -> None:
            if worker == self.name:
                self.supply(pipeline, step, [(port, value)])
            elif isinstance(port.action, Action) and (plain := as_tensors(value)) is not None:
                place = tuple(port.action), port.slot
                self._transport.send(worker, "deliver_tensors", pipeline, step, place, *plain)
            else:
                self._transport.send(worker, "deliver", pipeline, step, port, value)

        actor = Actor(self.name, held, send=send, ledger=self._transport, restored=restored)
        self.actors[pipeline] = actor
        return actor.describe()

    def _refuse(self, entries: Sequence[Entry]) -> None:
        """Reply to tasks that were cancelled before they ran."""
        for entry in entries:
            if entry.reply is not None:
                entry.reply.set_result(Failure.cancel(self.name, title(entry.task.operation)))


def _replied(outcome: Any) -> Future[Any]:
    reply: Future[Any] = Future()
    reply.set_result(outcome)
    return reply
