"""The state that a pipeline's steps, streams and inference passes share."""

from __future__ import annotations

import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from rpcpipe.checkpoint.plain_state import Stateful
from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.driver import optimizer_state
from rpcpipe.driver.batch import input_gradients
from rpcpipe.driver.callbacks import Callback
from rpcpipe.driver.deployment import Deployment
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.events import PipelineEvent
from rpcpipe.driver.layout import Layout
from rpcpipe.driver.optimizer import PipelineOptimizer
from rpcpipe.driver.reading import Readers
from rpcpipe.driver.roles import Active, OpenStream, Past
from rpcpipe.driver.settings import Settings
from rpcpipe.driver.stage_calls import execute
from rpcpipe.driver.stage_handle import StageHandle
from rpcpipe.driver.succession import AS_BEFORE, Succession, healed
from rpcpipe.driver.torn import Torn
from rpcpipe.driver.tracing import Tracer, clock_offset
from rpcpipe.driver.turn import Turn, in_turn
from rpcpipe.errors import StateError, require
from rpcpipe.model.batch import Batch
from rpcpipe.model.microbatch import Nest
from rpcpipe.schedules import Schedule
from rpcpipe.schedules.timeline import Timeline
from rpcpipe.schedules.weight_versions import Policy
from rpcpipe.stage.progress import Progress
from rpcpipe.worker.actor_spec import ActorSpec
from rpcpipe.worker.messages import Report, StageInfo
from rpcpipe.worker.operations import CallModule

T = TypeVar("T")
_EVENTS = 256


class Runtime:
    """The state of a pipeline, shared by steps, streams and inference passes. At most one of them is active.

    ``trained`` counts the training steps done and seeds the next step's random numbers. ``prepare`` maps a batch's
    targets to the nest that is cut into micro-batches. ``parts``: by name, further state that lasts from step to step
    and that save writes and load restores. ``busy``: by worker, its busy share of the last step. ``offsets``: by
    worker, the nanoseconds by which its clock is ahead. ``loss_is_mean``: whether the loss of the last step
    was a mean, and no (sum, count); None before the first one. ``by_hand``: the number of a step that its with-block
    has not ended yet. ``events``: the newest checkpoints, resizes and changes of schedule.
    """

    def __init__(
        self,
        cluster: PipelineCluster,
        driver: Driver,
        deployment: Deployment,
        settings: Settings,
        *,
        policy: Policy | None,
        prepare: Callable[[Nest], Nest],
        scaler: torch.amp.GradScaler | None,
        turn: Turn | None = None,
    ) -> None:
        self.cluster, self.driver, self.settings = cluster, driver, settings
        self.policy, self.prepare, self.scaler = policy, prepare, scaler
        self.parts: dict[str, Stateful] = {} if scaler is None else {"scaler": scaler}
        self.spec: ActorSpec  # what every worker gets of it, without its stages
        self.history: Past
        self.trained = 0
        self.loss_is_mean: bool | None = None
        self.progress = Progress(settings.accumulate)
        self.callbacks: list[Callback] = []
        self.events = deque[PipelineEvent](maxlen=_EVENTS)
        self.turn = turn or Turn(cluster.timeout)
        self._active: weakref.ref[Active] | None = None
        self._entered_by = ""
        self.by_hand: int | None = None
        self.stream: OpenStream | None = None
        self.tracer: Tracer | None = None
        self.busy: dict[str, float] = {}
        self.closed = False
        self.torn = Torn()
        self.names = deployment.layout.names
        # Processes of one host share their monotonic clock.
        self.offsets = dict.fromkeys(self.names, 0)
        self.succession = Succession(cluster, driver)
        self.readers = Readers(driver)
        self.deployment = deployment
        self.stages: tuple[StageHandle, ...] = ()
        self.program = deployment.program(self.stages)
        self.make_optimizer([{}])  # replaced once the workers have reported their parameter groups

    @property
    def layout(self) -> Layout:
        """The pipeline's workers and replicas."""
        return self.deployment.layout

    @property
    def schedule(self) -> Schedule:
        """The schedule of a full batch."""
        return self.deployment.schedule

    @property
    def chunks(self) -> int:
        """The number of micro-batches of a full batch."""
        return self.schedule.chunks

    def install(self, deployment: Deployment, infos: Mapping[str, Mapping[int, StageInfo]] | None = None) -> None:
        """Record that the workers hold ``deployment``; ``infos``: by worker and stage, the new descriptions if any."""
        self.deployment = deployment
        if infos is not None:
            self.stages = tuple(
                StageHandle(
                    self.driver,
                    stage,
                    {name: infos[name][stage] for name in deployment.layout.replicas_of(holder)},
                    self.execute,
                    self.turn,
                )
                for stage, holder in enumerate(deployment.schedule.placement)
            )
        self.program = deployment.program(self.stages)
        self.driver.sharing.gathers = self.program.after_update()
        self.cluster.relabel()

    def make_optimizer(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Create the driver's optimizer for workers' optimizers with the parameter groups ``groups``."""
        self.optimizer = PipelineOptimizer(groups, self)

    def stages_on(self, worker: str) -> list[int]:
        """Return the stages that ``worker`` holds."""
        return [stage.index for stage in self.stages if worker in stage.workers]

    def replica_of(self, worker: str) -> int | None:
        """Return the replica of ``worker``; None unless the pipeline has several replicas and uses ``worker``."""
        return self.layout.replica_of(worker)

    def input_gradients(self, batch: Batch, inputs: Nest, reports: Mapping[str, Report], factor: float) -> Nest:
        """Return the gradients of a step's ``inputs``, times ``factor``; None if no tensor of them requires one."""
        return input_gradients(batch, inputs, reports, self.deployment.stage_links.value_routes, factor)

    @property
    def in_progress(self) -> Progress:
        """The progress of the accumulation that the next step belongs to."""
        return self.progress if self.progress.done else Progress(self.settings.accumulate)

    def title(self) -> str:
        """Return a line that describes the pipeline."""
        steps = f"{self.trained} step{'' if self.trained == 1 else 's'} trained"
        copies = f" in {self.layout.replicas} replicas" if self.layout.replicas > 1 else ""
        return (
            f"Pipeline({self.schedule.name}, {len(self.stages)} stages{copies}, {self.chunks} micro-batches,"
            f" {steps if self.settings.trains else 'inference only'})"
        )

    def rows(self) -> list[list[str]]:
        """Return a table's rows, one for each stage on each of its workers."""
        return [row for stage in self.stages for row in stage.rows(self.busy)]

    @contextmanager
    def traced(self) -> Iterator[Timeline]:
        """Yield a timeline that the block's steps fill, on the driver's clock."""
        own_host = socket.gethostname()
        remote = {worker.name for worker in self.cluster.workers if worker.host != own_host}
        driver, transport = self.driver, self.cluster.transport
        self.offsets = {name: clock_offset(driver, transport, name) if name in remote else 0 for name in self.names}
        self.tracer = Tracer(self.names, self.offsets, f"{self.schedule.name}, measured")
        try:
            yield self.tracer.timeline
        finally:
            if self.stream is not None:
                self.turn.run("trace", self.stream.flush)
            self.tracer = None

    # --- one thing at a time ---

    @property
    def active(self) -> Active | None:
        """The active object, if there is one; an object that the user has forgotten is not active any more."""
        return None if self._active is None else self._active()

    def enter(self, active: Active) -> None:
        """Make ``active`` the active object; raise StateError if another object is active."""
        if self.active is not None:
            raise StateError(
                f"a step of this pipeline is open already, since thread {self._entered_by!r} entered it; first leave"
                " its with-block (at a prompt, step.__exit__(None, None, None)), or finish the iterator of predict"
            )
        self._roll_back_forgotten()
        self._active, self._entered_by = weakref.ref(active), threading.current_thread().name

    @contextmanager
    def nothing_active(self) -> Iterator[None]:
        """Let other objects be active in the block, whatever is active around it."""
        before = self._active, self._entered_by, self.by_hand
        self._active = self.by_hand = None
        try:
            yield
        finally:
            self._active, self._entered_by, self.by_hand = before

    def leave(self, active: Active) -> None:
        """End the activity of ``active``; do nothing if it is not active."""
        if self.active is active:
            self._active = self.by_hand = None

    def _roll_back_forgotten(self) -> None:
        """Roll back a step by hand that was entered and never left, and to which nobody refers any more."""
        if self.active is None and self.by_hand is not None:
            number, self.by_hand = self.by_hand, None
            self.driver.roll_back(number, updating=True)

    def note_event(self, kind: str, how: str) -> None:
        """Note what has happened beside the steps."""
        self.events.append(PipelineEvent(kind, self.trained, how))

    def note(self, timeline: Timeline) -> None:
        """Keep the workers' busy shares of a step's ``timeline``, for the table."""
        shares = (busy / (timeline.makespan or 1.0) for busy in timeline.busy)
        self.busy = dict(zip(self.names, shares, strict=True))

    def forget_accumulated(self) -> None:
        """Drop the gradients that calls of ``train_step`` have accumulated since the last update."""
        self.progress = Progress(self.settings.accumulate)
        if self.active is not None:
            self.active.forget()

    def apply_active(self) -> None:
        """Carry out ``pipe.optimizer.step()``; raise StateError if nothing is active."""
        active = self.active
        if active is None:
            raise StateError("no step is open; call train_step, or optimize inside `with pipe.step() as s:`")
        self.turn.run("optimizer.step", active.apply)

    @in_turn
    def optimizer_state(self) -> dict[str, Any]:
        """Return the state of the workers' optimizers, as torch's ``state_dict``."""
        self.check()
        return self.healed(lambda: optimizer_state.gather(self.driver, self.deployment, self.optimizer.changes()))

    @in_turn
    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load the state of the workers' optimizers; raises StateError within a step, CheckpointError if it differs."""
        self.ready()
        self.check_no_step("optimizer.load_state_dict")
        after = "Some workers may have loaded their part, and some not: load again"
        self.optimizer.adopt(self.healed(lambda: optimizer_state.load(self.driver, self.deployment, state), after))
        self.torn.replaced("optimizer")
        self.history.begin_anew()

    # --- life ---

    def check(self) -> None:
        """Prepare the pipeline for other work, as ``ready`` does; raises StateError, too, if its state is torn."""
        self.ready()
        self.torn.check()

    def ready(self) -> None:
        """Prepare the pipeline for anything that replaces its state: drain an open stream.

        Workers that have died are replaced. Raises StateError if the pipeline or the cluster is closed, and WorkerLost
        if a worker has died and is not replaced.
        """
        self.mend()
        self._roll_back_forgotten()
        if self.stream is not None:
            self.stream.flush()

    def mend(self) -> None:
        """Have workers that have died replaced; raises as ``check`` does."""
        if self.closed:
            raise StateError("the pipeline is closed; make a new one")
        self.cluster.check()
        self.revive()

    def revive(self) -> None:
        """Let the successors of dead workers go on with what those have kept."""
        if self.turn.is_elsewhere or not (self.succession.is_broken or self.history.behind):
            return  # the call of another thread does it itself: this one is of another pipeline
        self._lose()
        if self.history.behind or self.succession.is_beyond:
            self.history.restore()
        else:
            self.history.lose()
            self.succession.revive()

    def _lose(self) -> None:
        self.readers.forget()
        for lost in (self.active, self.stream):
            if lost is not None:
                lost.lose()

    def go_back(self) -> None:
        """Have all workers go back to the newest snapshot and do again what followed; what is active is lost."""
        self._lose()
        self.history.restore()

    def healed(self, call: Callable[[], T], after: str = AS_BEFORE) -> T:
        """Return ``call()``, made again if workers have died in it; raises WorkerLost if they do again and again.

        ``after``: what holds then.
        """
        return healed(self.cluster, self.ready, call, after=after)

    def execute(self, workers: Sequence[str], operation: CallModule) -> dict[str, Any]:
        """Execute ``operation`` on each of ``workers`` once, and return the results; see ``stage_calls``."""
        return execute(self, workers, operation)

    def check_trains(self) -> None:
        """Raise StateError if the pipeline was made without an optimizer."""
        require(
            self.settings.trains,
            "this pipeline was made without an optimizer and cannot train: make one with loss=… and optimizer=…, and"
            " give it these weights by load_state_dict(pipe.state_dict())",
            error=StateError,
        )

    def check_no_step(self, call: str) -> None:
        """Raise StateError if a step is open, for a ``call`` that needs none."""
        require(self.active is None, f"a step is open: {call} after its with-block", error=StateError)

    def check_accumulated(self, call: str) -> None:
        """Raise StateError within an accumulation, for a ``call`` that cannot take its gradients along."""
        done, calls = self.progress.done, self.settings.accumulate
        require(
            done == 0,
            f"{done} of {calls} calls of an accumulation are done: {call} after the one that updates",
            error=StateError,
        )

    def check_policy(self, policy: Policy | None) -> None:
        """Raise ScheduleError if the settings do not fit a schedule with this ``policy`` of weight versions."""
        self.settings.check(policy, scaled=self.scaler is not None)

    def close(self) -> None:
        """Free the stages on the workers; closing twice is allowed."""
        if self.closed:
            return
        self.closed = True
        if self.stream is not None:
            self.stream.abandon()
        self.cluster.pipelines.discard(self)
        self.succession.close()
        self.history.close()
        self.stages = ()
        self.cluster.relabel()
        release(self.cluster, self.driver)
        for callback in [*self.callbacks]:  # one may remove itself
            getattr(callback, "close", lambda: None)()


def release(cluster: PipelineCluster, driver: Driver) -> None:
    """Free a pipeline's stages on the workers that live, if the cluster is open."""
    if cluster.open:
        driver.drop()
