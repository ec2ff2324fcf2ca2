"""The user's API: composition of the parts, no mechanism of its own."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from tqdm import tqdm

from rpcpipe import _tables
from rpcpipe.checkpoint.plain_state import Holders
from rpcpipe.cluster.cluster import Cluster
from rpcpipe.driver import inference
from rpcpipe.driver.callbacks import Callback, JsonLines, tell
from rpcpipe.driver.optimizer import PipelineOptimizer
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.runtime import Runtime
from rpcpipe.driver.stage_handle import HEADER, StageHandle
from rpcpipe.driver.step import Step
from rpcpipe.driver.stream import Stream
from rpcpipe.errors import ScheduleError
from rpcpipe.model.layers import Loss, Model
from rpcpipe.model.microbatch import Nest
from rpcpipe.pipeline import deploy, state
from rpcpipe.pipeline.arguments import Options, pairs
from rpcpipe.planning.plan import Plan
from rpcpipe.schedules import Schedule
from rpcpipe.schedules.timeline import Timeline
from rpcpipe.stage.metrics import Metric
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.recompute import Checkpoint
from rpcpipe.transport.interrupts import shield_interrupts


class Pipeline:
    """A model cut into stages on a cluster's workers, trained from this process.

    Args:
        model: An ``nn.Sequential``, or a list of ``nn.Module``, ``LayerSpec`` and ``Wired``, or a dict of them by
            their names in the unsplit model's ``state_dict`` (``encoder.layer.0``).
        cluster: The workers, of ``rp.launch`` or ``rp.connect``.
        loss: ``loss(output, target)`` returns the mean as a scalar tensor, or (sum, count), which is normalized over
            the whole batch. If it has a method ``prepare``, the driver cuts ``loss.prepare(targets)`` into
            micro-batches instead of the targets.
        optimizer: ``optimizer(params)`` makes a torch optimizer, once per worker.
        schedule: A name of ``rp.schedules.names()``, or a ``Schedule``.
        chunks: Micro-batches per batch, fewer where the batch is too small; a ``Schedule`` brings its own.
        balance: Layers per stage, or "parameters", "time" or "memory", the last two measured on the first worker with
            ``sample``. A list shorter than the cluster, or a ``Schedule`` for fewer workers, uses the first workers
            and leaves the others to further pipelines.
        checkpoint: Which activations are dropped and recomputed: "never", "except_last" (every stage but the last),
            "always", a ratio (the layers that save most bytes per second of recomputation, up to that share of a
            stage's bytes), or a function of (stage, chunk).
        virtual_stages: Stages per worker, for the looped schedules.
        replicas: Copies of every stage, each with its share of the batch (``tensor.chunk(replicas)``) and ``chunks``
            micro-batches of that; the schedule's worker w is workers w·R … w·R + R - 1.
        shard_optimizer: Each replica's optimizer has only its part of the parameters (ZeRO-1).
        weights: Which version of its weights a stage uses under an asynchronous schedule: "stash", "vertical_sync" or
            "latest".
        flush_every: Batches after which ``train`` drains an asynchronous schedule; None for never.
        clip_grad_norm: The largest norm of all gradients together; None for any.
        nonfinite: "skip" leaves out an update whose loss or gradient is not finite, "stop" raises.
        seed: Of the weights of ``LayerSpec`` and of all random numbers.
        dispatch: "rref" issues one asynchronous call per action and keeps its RRef, "batched" one message per worker
            and step; the results are the same.
        autocast: torch.bfloat16 or torch.float16, in which layers and loss run under ``torch.autocast``; for float16
            ``scaler``, a ``torch.amp.GradScaler``, scales the loss.
        accumulate: So many calls of ``train_step`` make one update.
        batch_norm: BatchNorm's running statistics move with every "micro_batch", or "deferred", once a batch as the
            unsplit batch's would.
        sample: One micro-batch of inputs, for ``balance="time"`` or ``"memory"``.
        plan: Of ``rp.plan``; takes the place of all that it has decided: schedule, chunks, balance, virtual stages,
            checkpoint, replicas, sharding.

    Raises:
        ScheduleError, PartitionError, ValueError: Before anything starts.
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
        options = Options(
            loss, optimizer, schedule, chunks, balance, checkpoint, virtual_stages, replicas, shard_optimizer, weights,
            flush_every, clip_grad_norm, nonfinite, seed, dispatch, autocast, accumulate, batch_norm, sample,
        )  # fmt: skip
        self._runtime = deploy.start(model, cluster, options.planned(plan).checked())

    # --- what it is ---

    @property
    def runtime(self) -> Runtime:
        """What steps, streams and passes work on."""
        return self._runtime

    @property
    def cluster(self) -> Cluster:
        """The workers."""
        return self._runtime.cluster

    @property
    def optimizer(self) -> PipelineOptimizer:
        """A ``torch.optim.Optimizer`` on the driver: ``lr_scheduler`` and ``param_groups`` work unchanged."""
        return self._runtime.optimizer

    @property
    def stages(self) -> tuple[StageHandle, ...]:
        """The stages; ``stages[k].call(function)`` runs a function on one's module."""
        return self._runtime.stages

    @property
    def trained(self) -> int:
        """Training steps done; the next one's random numbers are seeded by it."""
        return self._runtime.trained

    @trained.setter
    def trained(self, steps: int) -> None:
        self._runtime.trained = steps

    @property
    def chunks(self) -> int:
        """Micro-batches of a full batch."""
        return self._runtime.chunks

    @property
    def balance(self) -> list[int]:
        """Layers per stage."""
        return list(self._runtime.deployment.balance)

    @property
    def accumulate(self) -> int:
        """Calls of ``train_step`` that make one update; what is set holds from the next update on."""
        return self._runtime.settings.accumulate

    @accumulate.setter
    def accumulate(self, calls: int) -> None:
        self._runtime.settings.accumulate = calls

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scale under float16; its settings are changed by its setters or ``load_state_dict``."""
        return self._runtime.scaler

    @property
    def callbacks(self) -> list[Callback]:
        """What is called after every step."""
        return self._runtime.callbacks

    @property
    def clip_grad_norm(self) -> float | None:
        """The largest norm of all gradients together; may be set between two steps."""
        return self._runtime.settings.clip_grad_norm

    @clip_grad_norm.setter
    def clip_grad_norm(self, largest: float | None) -> None:
        self._runtime.settings.clip_grad_norm = largest

    @property
    def nonfinite(self) -> str:
        """What a loss or gradient that is not finite does: "skip" or "stop"; may be set between two steps."""
        return self._runtime.settings.nonfinite

    @nonfinite.setter
    def nonfinite(self, what: str) -> None:
        self._runtime.settings.nonfinite = what

    @property
    def schedule(self) -> Schedule:
        """The schedule of a full batch; may be set between two steps, by name or a Schedule.

        Where the new one has other stages or holds them elsewhere, the layers and their optimizer
        state move over RPC; the losses go on to the bit.
        """
        return self._runtime.schedule

    @schedule.setter
    def schedule(self, wanted: str | Schedule) -> None:
        self._runtime.check()
        deploy.change_schedule(self._runtime, wanted)

    def close(self) -> None:
        """Free the stages on the workers; closing twice is allowed."""
        self._runtime.close()

    def __repr__(self) -> str:
        if self._runtime.closed:
            return "Pipeline(closed)"
        return f"{self._runtime.title()}\n{_tables.text(HEADER, self._runtime.rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(self._runtime.title(), HEADER, self._runtime.rows())

    # --- training ---

    def train_step(self, inputs: Nest, targets: Nest) -> StepResult:
        """One batch forward and backward, and one update, or the ``accumulate``-th part of one.

        ``inputs`` and ``targets``: nests of tensors with the batch in dimension 0, or as ``rp.Replicated``,
        ``rp.Batched`` and ``rp.MicroBatches`` say. The result has the gradients of inputs that require one. Raises
        StageError, WorkerLost or DeadlineExceeded; the weights are then as before.
        """
        if self._runtime.policy is not None:
            self._runtime.check()
            stream = Stream(self._runtime)
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
            (self.train_step(inputs, targets) for inputs, targets in pairs(batches, "train"))
            if self._runtime.policy is None
            else Stream(self._runtime).run(pairs(batches, "train"), self._runtime.settings.flush_every)
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
        self._runtime.check()
        if self._runtime.policy is not None:
            raise ScheduleError(
                f"{self.schedule.name!r} updates as it goes; a step by hand needs a synchronous schedule"
            )
        return Step(self._runtime, self.trained)

    @contextmanager
    def trace(self) -> Iterator[Timeline]:
        """A timeline that the block's steps fill: actions, transfers and updates, on the driver's clock."""
        self._runtime.check()
        with self._runtime.traced() as timeline:
            yield timeline

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
        self._runtime.check()
        return inference.outputs(self._runtime, batches)

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
        self._runtime.check()
        loss, found = inference.evaluate(self._runtime, pairs(batches, "evaluate"), metrics or {})
        return loss if metrics is None else {"loss": loss, **found}

    # --- weights ---

    def parameter_rrefs(self) -> list[Any]:
        """An RRef to every trainable parameter, each replica's, in the model's order, for ``DistributedOptimizer``."""
        self._runtime.check()
        return [rref for stage in self.stages for rref in stage.parameter_rrefs()]

    def state_dict(self) -> OrderedDict[str, torch.Tensor]:
        """All parameters and buffers under the unsplit model's names, on the CPU."""
        self._runtime.check()
        return state.state_dict(self._runtime)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Inverse of ``state_dict``; reads the unsplit model's as well.

        Raises CheckpointError, before anything changes, unless names and shapes are the model's.
        """
        self._runtime.check()
        state.load_state_dict(self._runtime, state_dict)

    def save(
        self,
        directory: str | Path,
        *,
        stateful: Holders | None = None,
        position: Any = None,
        keep: int | None = 2,
    ) -> Path:
        """Write all that training goes on from into a new folder of ``directory``, which is returned.

        ``stateful`` names what goes on beside weights, optimizer, seed and ``trained``: learning-rate
        schedulers, a ``torch.Generator``, anything with ``state_dict`` and ``load_state_dict``.
        ``position``: where the data is, of plain values. Killed at any moment it leaves the checkpoint
        before readable; in the end the newest ``keep`` stay. Raises CheckpointError with worker and path.
        """
        self._runtime.check()
        return state.save(self._runtime, directory, stateful or {}, position, keep)

    def load(self, directory: str | Path, *, stateful: Holders | None = None) -> Any:
        """Go on from the newest checkpoint in ``directory``, or from that very one; returns its ``position``.

        Another cut, schedule or number of workers goes on with the same bits. Raises CheckpointError
        with file and tensor, before anything changes.
        """
        self._runtime.check()
        return state.load(self._runtime, directory, stateful or {})
