"""The user's API: composition of the parts, no mechanism of its own."""

from __future__ import annotations

import os
import socket
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from tqdm import tqdm

from rpcpipe.cluster import Cluster
from rpcpipe.driver import feeding, inference
from rpcpipe.driver.callbacks import Callback, JsonLines, tell
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.runtime import Core, release
from rpcpipe.driver.step import Step
from rpcpipe.driver.stream import Stream
from rpcpipe.driver.tracing import Tracer
from rpcpipe.errors import ScheduleError
from rpcpipe.model.layers import Layer, Model, find_ties, named_layers, wire_of
from rpcpipe.model.microbatch import Nest
from rpcpipe.pipeline import deploy, moving, snapshot, state
from rpcpipe.pipeline.arguments import check_functions, check_ties, check_training, cut_layers, layout_of, make_schedule
from rpcpipe.planning.plan import Plan
from rpcpipe.schedules import Schedule, weight_versions
from rpcpipe.schedules.timeline import Timeline
from rpcpipe.stage import precision
from rpcpipe.stage.accumulation import Progress
from rpcpipe.stage.metrics import Metric
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.recompute import Checkpoint
from rpcpipe.stage.recompute import check as check_checkpoint
from rpcpipe.stage.stage import Loss
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.stage_set import ActorSpec


class Pipeline(Core):
    """A model cut into stages on a cluster's workers, trained from this process.

    ``model``: an ``nn.Sequential``, or a list of ``nn.Module``, ``LayerSpec`` and ``Wired``, or a dict of
    them by their names in the unsplit model's ``state_dict`` (``encoder.layer.0``). ``loss(output, target)``
    gives the mean as a scalar tensor, or (sum, count), which is normalised over the whole batch; if it
    has a method ``prepare``, the driver cuts ``loss.prepare(targets)`` into micro-batches instead of the targets.
    ``optimizer(params)`` makes a torch optimizer, once per worker. ``balance``: layers per
    stage, or "parameters", "time" or "memory", the last two measured on the first worker with
    ``sample``, one micro-batch of inputs; a list shorter than the cluster, or a Schedule for fewer workers, uses
    the first workers and leaves the others to further pipelines. ``checkpoint``: which activations are
    dropped and recomputed: "never", "except_last" (every stage but the last), "always", a ratio (the
    layers that save most bytes per second of recomputation, up to that share of a stage's bytes), or a
    function of (stage, chunk). ``virtual_stages``: stages per
    worker, for the looped schedules. ``chunks``: micro-batches per batch, fewer where the batch is
    too small; a Schedule brings its own. ``replicas``: copies of every stage, each with its share of the
    batch (``tensor.chunk(replicas)``) and ``chunks`` micro-batches of that; the schedule's worker w is
    workers w·R … w·R + R - 1. ``shard_optimizer``: each replica's optimizer has only its part of the
    parameters. ``dispatch``: "rref" issues one
    asynchronous call per action and keeps its RRef, "batched" one message per worker and step; the
    results are the same. ``autocast``: torch.bfloat16 or torch.float16, in which layers and loss run
    under ``torch.autocast``; for float16 ``scaler``, a ``torch.amp.GradScaler``, scales the loss.
    ``accumulate``: so many calls of ``train_step`` make one update. ``batch_norm``: BatchNorm's running
    statistics move with every "micro_batch", or "deferred", once a batch as the unsplit batch's would. A
    ``plan`` of ``rp.plan`` takes the place of all that it has decided: schedule, chunks, balance, virtual
    stages, checkpoint, replicas, sharding.

    ``trained`` counts the training steps done; it seeds the next one's random numbers.

    Raises ScheduleError, PartitionError or ValueError before anything starts.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        *,
        loss: Loss,
        optimizer: Factory,
        schedule: str | Schedule = "1f1b",
        chunks: int = 8,
        balance: str | Sequence[int] = "parameters",
        checkpoint: Checkpoint = "never",
        virtual_stages: int = 1,
        replicas: int = 1,
        shard_optimizer: bool = False,
        weights: str | None = None,
        flush_every: int | None = None,
        clip_grad_norm: float | None = None,
        nonfinite: str = "skip",
        seed: int = 0,
        dispatch: str = "rref",
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        batch_norm: str = "micro_batch",
        sample: Nest = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__(cluster, Progress(accumulate), precision.loss_scaler(autocast))
        if plan is not None:
            schedule, chunks, balance = plan.schedule, plan.chunks, plan.balance
            checkpoint, virtual_stages = plan.checkpoint, plan.virtual_stages
            replicas, shard_optimizer = plan.replicas, plan.shard_optimizer
        check_functions(loss, optimizer, dispatch, chunks)
        check_checkpoint(checkpoint)
        check_training(nonfinite, flush_every, accumulate, autocast, batch_norm)
        cluster.check()
        self.clip_grad_norm = clip_grad_norm
        self.flush_every = flush_every
        self.nonfinite = nonfinite
        self.accumulate, self._batch_norm = accumulate, batch_norm
        self._layout = layout_of(cluster, schedule, balance, virtual_stages, replicas)
        self._names = self._layout.names
        self._virtual_stages = virtual_stages
        self._schedule = make_schedule(schedule, self._layout.width, chunks, virtual_stages, replicas)
        self.chunks = self._schedule.chunks
        self._shard = shard_optimizer
        self._weights, self._policy = weights, weight_versions.choose(self._schedule.name, weights)
        self._check_policy(self._policy)
        layers = named_layers(model)
        self._layers = list(layers)
        self._wires = {name: wire_of(layer) for name, layer in layers.items()}
        self._ties = find_ties(layers)
        self.balance = cut_layers(
            layers, balance, self._schedule.stages, lambda: deploy.measure(self, layers, sample, seed)
        )
        check_ties(self._policy, self._ties, self._layers, self.balance)
        common = ActorSpec(
            {}, self._schedule.stages - 1, loss, optimizer, seed, checkpoint, autocast, batch_norm,
            self._wires, self._ties, feeding.links(self),
        )  # fmt: skip
        self._start(layers, common, batched=dispatch == "batched")

    def _start(self, layers: OrderedDict[str, Layer], common: ActorSpec, *, batched: bool) -> None:
        """The driver's half, and the stages on their workers."""
        cluster = self.cluster
        self._prepare: Callable[[Nest], Nest] = getattr(common.loss, "prepare", lambda targets: targets)
        identity = uuid.uuid4().hex
        self._driver = Driver(cluster.transport, identity, self._names, timeout=cluster.timeout, batched=batched)
        # Processes of one host share their monotonic clock.
        self._offsets = dict.fromkeys(self._names, 0)
        cluster.pipelines.add(self)
        # In a REPL a pipeline is often just replaced: its stages go with it.
        weakref.finalize(self, release, cluster, self._driver).atexit = False
        try:
            deploy.create(self, identity, layers, common)
        except BaseException:
            self.close()
            raise

    @property
    def schedule(self) -> Schedule:
        """The schedule of a full batch; may be set between two steps, by name or a Schedule.

        Where the new one has other stages or holds them elsewhere, the layers and their optimizer
        state move over RPC; the losses go on to the bit.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, wanted: str | Schedule) -> None:
        self._check()
        moving.change(self, wanted)

    # --- training ---

    def train_step(self, inputs: Nest, targets: Nest) -> StepResult:
        """One batch forward and backward, and one update, or the ``accumulate``-th part of one.

        ``inputs`` and ``targets``: nests of tensors with the batch in dimension 0. Raises
        StageError, WorkerLost or DeadlineExceeded; the weights are then as before.
        """
        if self._policy is not None:
            self._check()
            stream = Stream(self)
            stream.feed(inputs, targets)
            stream.flush()
            return stream.take()
        with shield_interrupts(), self.step() as step:
            # Not forward_backward: its wait for the hand-over would cost a round trip.
            step.run(inputs, targets)
            step.optimize()
            shield_interrupts.check()  # up to here the step can be taken back; from here on it is done
            result = step.result()
        tell(self.callbacks, result)
        return result

    def train(self, batches: Iterable[tuple[Nest, Nest]], progress: bool = False) -> Iterator[StepResult]:
        """``train_step`` for each (inputs, targets); ``progress`` shows a bar with the loss.

        Asynchronous schedules stream: a result comes some batches after its batch was fed (enough to
        keep all workers busy), so a learning rate set on seeing it holds for the batches fed from
        then on. Any other call on the pipeline drains the stream first.
        """
        results = (
            (self.train_step(inputs, targets) for inputs, targets in batches)
            if self._policy is None
            else Stream(self).run(batches, self.flush_every)
        )
        total = len(batches) if isinstance(batches, Sized) else None
        with closing(results), tqdm(results, total=total, disable=not progress, unit="step") as bar:
            for result in bar:
                bar.set_postfix(loss=f"{result.loss:.4f}", bubble=f"{result.bubble:.0%}", refresh=False)
                yield result

    def on_step(self, callback: Callback | str | os.PathLike[str]) -> Callback:
        """Call ``callback(result)`` after every step of ``train_step`` and ``train``, here; returns it.

        A path stands for ``JsonLines(path)``. What a callback raises comes out of ``train_step`` or
        ``train`` once the others have been called; the step is done and counted by then, and the
        pipeline usable. ``callbacks`` lists them; ``close`` closes those that have a ``close``.
        """
        made = callback if callable(callback) else JsonLines(callback)
        self.callbacks.append(made)
        return made

    def step(self) -> Step:
        """A step by hand, inside a distributed-autograd context: ``s.context_id``.

        The gradients are in the context after ``s.forward_backward(inputs, targets)``; apply them
        with ``s.optimize()``, or with torch's ``DistributedOptimizer`` on ``parameter_rrefs()``.
        """
        self._check()
        if self._policy is not None:
            raise ScheduleError(
                f"{self.schedule.name!r} updates as it goes; a step by hand needs a synchronous schedule"
            )
        return Step(self, self.trained)

    @contextmanager
    def trace(self) -> Iterator[Timeline]:
        """A timeline that the block's steps fill: actions, transfers and updates, on the driver's clock."""
        self._check()
        here = socket.gethostname()
        remote = {worker.name for worker in self.cluster.workers if worker.host != here}
        self._offsets = {name: self._driver.clock_offset(name) if name in remote else 0 for name in self._names}
        self._tracer = Tracer(self._names, self._offsets, f"{self.schedule.name}, measured")
        try:
            yield self._tracer.timeline
        finally:
            if self._stream is not None:
                self._stream.flush()
            self._tracer = None

    # --- inference ---

    def __call__(self, inputs: Nest) -> Nest:
        """The model's output in eval mode, gathered on this process."""
        [output] = self.predict([inputs])
        return output

    def predict(self, batches: Iterable[Nest]) -> Iterator[Nest]:
        """The output for every batch of inputs, as ``pipe(inputs)``, without a gap between the batches.

        The iterator reads some batches ahead; the pipeline takes no other step until it is finished
        or closed.
        """
        self._check()
        return inference.outputs(self, batches)

    @overload
    def evaluate(self, batches: Iterable[tuple[Nest, Nest]]) -> float: ...

    @overload
    def evaluate(self, batches: Iterable[tuple[Nest, Nest]], metrics: Mapping[str, Metric]) -> dict[str, float]: ...

    def evaluate(
        self, batches: Iterable[tuple[Nest, Nest]], metrics: Mapping[str, Metric] | None = None
    ) -> float | dict[str, float]:
        """The mean loss over all samples of ``batches``, in eval mode.

        ``metrics``: functions by name, each (output, target) of a micro-batch -> (sum, count), called
        on the last stage's worker; the result is then {"loss": …, name: sum / count, …}.
        """
        self._check()
        loss, found = inference.evaluate(self, batches, metrics or {})
        return loss if metrics is None else {"loss": loss, **found}

    # --- weights ---

    def parameter_rrefs(self) -> list[Any]:
        """An RRef to every trainable parameter, each replica's, in the model's order, for ``DistributedOptimizer``."""
        self._check()
        return [rref for stage in self.stages for rref in stage.parameter_rrefs()]

    def state_dict(self) -> OrderedDict[str, torch.Tensor]:
        """All parameters and buffers under the unsplit model's names, on the CPU."""
        self._check()
        return snapshot.state_dict(self)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of ``state_dict``; reads the unsplit model's as well.

        Raises CheckpointError, before anything changes, unless names and shapes are the model's.
        """
        self._check()
        snapshot.load_state_dict(self, state)

    def save(
        self,
        directory: str | Path,
        *,
        stateful: state.Holders | None = None,
        position: Any = None,
        keep: int | None = 2,
    ) -> Path:
        """Write all that training goes on from into a new folder of ``directory``, which is returned.

        ``stateful`` names what goes on beside weights, optimizer, seed and ``trained``: learning-rate
        schedulers, a ``torch.Generator``, anything with ``state_dict`` and ``load_state_dict``.
        ``position``: where the data is, of plain values. Killed at any moment it leaves the checkpoint
        before readable; in the end the newest ``keep`` stay. Raises CheckpointError with worker and path.
        """
        self._check()
        return state.save(self, directory, stateful or {}, position, keep)

    def load(self, directory: str | Path, *, stateful: state.Holders | None = None) -> Any:
        """Go on from the newest checkpoint in ``directory``, or from that very one; returns its ``position``.

        Another cut, schedule or number of workers goes on with the same bits. Raises CheckpointError
        with file and tensor, before anything changes.
        """
        self._check()
        return state.load(self, directory, stateful or {})
