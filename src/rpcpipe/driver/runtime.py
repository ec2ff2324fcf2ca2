"""What the parts of a pipeline share: its state, and the rules by which they take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rpcpipe import _tables
from rpcpipe.cluster import Cluster
from rpcpipe.driver.callbacks import Callback
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.program import Layout, Program
from rpcpipe.driver.stage_handle import HEADER, StageHandle
from rpcpipe.driver.step import Step
from rpcpipe.driver.tracing import Tracer
from rpcpipe.errors import RpcPipeError
from rpcpipe.pipeline.arguments import check_asynchronous
from rpcpipe.pipeline.state import Stateful
from rpcpipe.schedules import Schedule
from rpcpipe.schedules.timeline import Timeline
from rpcpipe.stage.accumulation import Progress
from rpcpipe.stage.optimizer import PipelineOptimizer

if TYPE_CHECKING:
    from rpcpipe.driver.inference import Passes
    from rpcpipe.driver.stream import Stream


class Core:
    """A pipeline without its verbs.

    One step, stream or pass is open at a time; ``trained`` counts the training steps done.
    """

    optimizer: PipelineOptimizer
    chunks: int
    accumulate: int
    _batch_norm: str
    _driver: Driver
    _names: tuple[str, ...]
    _layout: Layout
    _schedule: Schedule
    _program: Program

    def __init__(self, cluster: Cluster, progress: Progress, scaler: torch.amp.GradScaler | None) -> None:
        self.cluster = cluster
        self.trained = 0
        self.stages: tuple[StageHandle, ...] = ()
        self.callbacks: list[Callback] = []
        self._progress = progress
        self._closed = False
        self._open: Step | Stream | Passes | None = None
        self._stream: Stream | None = None
        self._tracer: Tracer | None = None
        # What else goes on from step to step, by name: save writes it and load brings it back.
        self._parts: dict[str, Stateful] = {} if scaler is None else {"scaler": scaler}
        self._scaler = scaler
        self._busy: dict[str, float] = {}  # each worker's share of the last step

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scale under float16; its settings are changed by its setters or ``load_state_dict``."""
        return self._scaler

    def stages_on(self, worker: str) -> list[int]:
        """The stages that the named worker holds."""
        return [stage.index for stage in self.stages if worker in stage.workers]

    def replica_of(self, worker: str) -> int | None:
        """Which replica the named worker is part of, where there are several."""
        return self._layout.replica_of(worker)

    # --- one thing at a time ---

    def _enter(self, step: Step | Stream | Passes) -> None:
        if self._open is not None:
            raise RpcPipeError(
                "a step of this pipeline is open already; first leave its with-block, or finish the iterator of predict"
            )
        self._open = step

    def _note(self, timeline: Timeline) -> None:
        """What a step measured, for the table."""
        shares = (busy / (timeline.makespan or 1.0) for busy in timeline.busy)
        self._busy = dict(zip(self._names, shares, strict=True))

    def _leave(self, step: Step | Stream | Passes) -> None:
        self._open = None if self._open is step else self._open

    def _forget_accumulated(self) -> None:
        self._progress = Progress(self.accumulate)
        if isinstance(self._open, Step):
            self._open.forget()

    def _apply_open(self) -> None:
        if self._open is None:
            raise RpcPipeError("no step is open; call train_step, or optimize inside `with pipe.step() as s:`")
        self._open.apply()

    # --- life ---

    def close(self) -> None:
        """Free the stages on the workers; closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        if self._stream is not None:
            self._stream.abandon()
        self.cluster.pipelines.discard(self)
        self.stages = ()
        self.cluster.relabel()
        release(self.cluster, self._driver)
        for callback in self.callbacks:
            getattr(callback, "close", lambda: None)()

    def __repr__(self) -> str:
        if self._closed:
            return "Pipeline(closed)"
        return f"{self._title()}\n{_tables.text(HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(self._title(), HEADER, self._rows())

    def _title(self) -> str:
        replicas = self._layout.replicas
        copies = f" in {replicas} replicas" if replicas > 1 else ""
        return (
            f"Pipeline({self._schedule.name}, {len(self.stages)} stages{copies}, {self.chunks} micro-batches,"
            f" {self.trained} steps trained)"
        )

    def _rows(self) -> list[list[str]]:
        return [row for stage in self.stages for row in stage.rows(self._busy)]

    def _check(self) -> None:
        if self._closed:
            raise RpcPipeError("the pipeline is closed; make a new one")
        self.cluster.check()
        if self._stream is not None:
            self._stream.flush()

    def _check_policy(self, policy: str | None) -> None:
        check_asynchronous(policy, self.accumulate, self._batch_norm, scaled=self.scaler is not None)


def release(cluster: Cluster, driver: Driver) -> None:
    """Free a pipeline's stages, if there is anybody to do it."""
    if cluster.healthy:
        driver.drop()
