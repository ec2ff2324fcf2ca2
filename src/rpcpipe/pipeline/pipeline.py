"""Define ``Pipeline``, the user's API. Its methods check that work is possible, and call the packages below."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch

from rpcpipe import _tables
from rpcpipe._arguments import require_path
from rpcpipe.checkpoint.plain_state import Holders
from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.driver import inference
from rpcpipe.driver.ahead import train
from rpcpipe.driver.callbacks import Callback, JsonLines
from rpcpipe.driver.events import PipelineEvent
from rpcpipe.driver.feeding import has
from rpcpipe.driver.optimizer import PipelineOptimizer
from rpcpipe.driver.result import StepResult
from rpcpipe.driver.stage_handle import HEADER, StageHandle
from rpcpipe.driver.step import Step
from rpcpipe.driver.training import step_by_hand, train_batch
from rpcpipe.driver.turn import EachInTurn, Turn, in_turn
from rpcpipe.errors import require_whole
from rpcpipe.model.layers import AnyModel, Loss
from rpcpipe.model.nest_types import Batches, NestOfTensors
from rpcpipe.model.splitting import layers_for
from rpcpipe.pipeline import deploy, resize, state
from rpcpipe.pipeline.arguments import Options, pairs
from rpcpipe.pipeline.hints import Hints
from rpcpipe.pipeline.progress_bar import NOT_TRAINED, shown
from rpcpipe.pipeline.recipe import Recipe
from rpcpipe.pipeline.setting import Setting
from rpcpipe.planning.plan import Plan
from rpcpipe.schedules import Schedule
from rpcpipe.schedules.timeline import Timeline
from rpcpipe.stage.metrics import Metrics
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.recompute import Checkpoint


class Pipeline(Hints):
    """A model cut into stages on a cluster's workers, trained from this process.

    Args:
        model: An ``nn.Sequential``, a list of ``nn.Module``, ``LayerSpec`` and ``Wired``, or a dict of them by their
            names in the unsplit model's ``state_dict`` (``encoder.layer.0``). With ``sample`` any ``nn.Module``, cut by
            ``rp.split``.
        cluster: The workers, of ``rp.launch`` or ``rp.connect``.
        loss: ``loss(output, target)`` returns the mean over its samples as a scalar tensor, or (sum, count), which is
            normalized over the whole batch. If it has a method ``prepare``, the driver cuts ``loss.prepare(targets)``
            into micro-batches instead of the targets.
        optimizer: ``optimizer(params)`` makes a torch optimizer, once per worker. Without it the pipeline infers and,
            if it has a loss, evaluates.
        schedule: A name of ``rp.schedules.names()``, or a ``Schedule``.
        chunks: Micro-batches per batch, fewer if the batch is too small; a ``Schedule`` has its own number.
        balance: Layers per stage, or "parameters", "time" or "memory"; the last two are measured on the first worker
            with ``sample``. A list shorter than the cluster, or a ``Schedule`` for fewer workers, uses the first
            workers and leaves the others to further pipelines.
        checkpoint: Which activations are dropped and recomputed: "never", "except_last" (every stage but the last),
            "always", a ratio (the layers that save most bytes per second of recomputation, up to that share of a
            stage's bytes), or a function of (stage, chunk) that returns whether to recompute.
        virtual_stages: Stages per worker, for the looped schedules.
        replicas: Copies of every stage, each with a share of the batch (``tensor.chunk(replicas)``) cut into
            ``chunks`` micro-batches; the schedule's worker w is workers w·R … w·R + R - 1.
        shard_optimizer: Whether each replica's optimizer has only a part of the parameters (ZeRO-1).
        weights: The version of its weights that a stage uses under an asynchronous schedule: "stash", "vertical_sync"
            or "latest".
        flush_every: Batches after which ``train`` drains an asynchronous schedule; None for never.
        clip_grad_norm: The norm to which the gradients of all parameters together are clipped; None for no clipping.
        nonfinite: "skip" leaves out an update whose loss or gradient is not finite, "stop" raises.
        seed: Seeds the weights of every ``LayerSpec`` and all random numbers of training.
        dispatch: "rref" issues one asynchronous call per action and keeps its RRef, "batched" one message per worker
            and step; the results are the same.
        autocast: torch.bfloat16 or torch.float16, in which layers and loss run under ``torch.autocast``; for float16
            ``scaler``, a ``torch.amp.GradScaler``, scales the loss.
        accumulate: The number of calls of ``train_step`` that make one update.
        batch_norm: When BatchNorm's running statistics move: with every "micro_batch", or "deferred", once per batch by
            the statistics of the unsplit batch.
        undo: "copy" holds weights and optimizer state twice, to take back an update that fails; with "off" updates wait
            for the driver, and after one that fails half way training goes on from a snapshot or a checkpoint alone.
        sample: One micro-batch of inputs, for ``balance="time"`` or ``"memory"``, and to split a module.
        plan: A plan of ``rp.plan``, whose ``arguments`` replace these.

    Raises:
        ArgumentError, ModelError, ScheduleError, PartitionError: Before anything starts; all are also ValueErrors.
        StageError, WorkerLost: While the workers build their stages.
    """

    def __init__(
        self,
        model: AnyModel,
        cluster: PipelineCluster,
        *,
        loss: Loss | None = None,
        optimizer: Factory | None = None,
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
        undo: str = "copy",
        sample: NestOfTensors = None,
        plan: Plan | None = None,
    ) -> None:
        options = Options(
            loss=loss, optimizer=optimizer, schedule=schedule, chunks=chunks, balance=balance, checkpoint=checkpoint,
            virtual_stages=virtual_stages, replicas=replicas, shard_optimizer=shard_optimizer, weights=weights,
            flush_every=flush_every, clip_grad_norm=clip_grad_norm, nonfinite=nonfinite, seed=seed, dispatch=dispatch,
            autocast=autocast, accumulate=accumulate, batch_norm=batch_norm, undo=undo, sample=sample,
        )  # fmt: skip
        options, layers = options.planned(plan).checked(), layers_for(model, sample, autocast)
        self.recipe = Recipe(layers, options)
        self.runtime = deploy.start(layers, cluster, options)

    accumulate = Setting[int]("How many calls of ``train_step`` make one update; a new value holds from the next on.")
    clip_grad_norm = Setting[float | None]("The norm to which all gradients are clipped, None for none.")
    nonfinite = Setting[str]("What happens when a loss or gradient is not finite: ``skip`` or ``stop``.")

    @property
    def cluster(self) -> PipelineCluster:
        """Return the cluster whose workers hold the stages."""
        return self.runtime.cluster

    @property
    def turn(self) -> Turn:
        """Return what lets one thread at a time call the pipeline."""
        return self.runtime.turn

    @property
    def optimizer(self) -> PipelineOptimizer:
        """Return a ``torch.optim.Optimizer`` on the driver; ``param_groups`` and torch's schedulers work unchanged.

        Raises StateError if the pipeline was made without one.
        """
        self.runtime.check_trains()
        return self.runtime.optimizer

    @property
    def stages(self) -> tuple[StageHandle, ...]:
        """Return the stages; ``stages[k].call(function)`` runs a function on the module of stage k."""
        return self.runtime.stages

    @property
    def trained(self) -> int:
        """Return the number of training steps done, which seeds the random numbers of the next one."""
        return self.runtime.trained

    @trained.setter
    @in_turn
    def trained(self, steps: int) -> None:
        self.runtime.check()
        self.runtime.trained = require_whole("trained", steps, least=0)

    @property
    def chunks(self) -> int:
        """Return the number of micro-batches of a full batch; may be set between steps, unless a Schedule brings it."""
        return self.runtime.chunks

    @chunks.setter
    @in_turn
    def chunks(self, count: int) -> None:
        self.runtime.check()
        deploy.change_chunks(self.runtime, count)

    @property
    def balance(self) -> list[int]:
        """Return the number of layers of each stage."""
        return list(self.runtime.deployment.balance)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Return the loss scaler under float16, None otherwise; its setters and ``load_state_dict`` change it."""
        return self.runtime.scaler

    @property
    def callbacks(self) -> list[Callback]:
        """Return the functions that are called after every step."""
        return self.runtime.callbacks

    @property
    def events(self) -> list[PipelineEvent]:
        """Return the newest checkpoints, resizes and changes of schedule, the oldest first; see ``cluster.events``."""
        return list(self.runtime.events)

    @property
    def schedule(self) -> Schedule:
        """Return the schedule of a full batch. It may be set between two steps, to a name or a Schedule.

        If the new schedule has other stages or places them on other workers, the layers and their optimizer state move
        over RPC, and the losses go on to the bit. Raises StateError within a step, and ArgumentError or ScheduleError
        for a schedule that does not fit, before anything changes.
        """
        return self.runtime.schedule

    @schedule.setter
    @in_turn
    def schedule(self, schedule: str | Schedule) -> None:
        self.runtime.check()
        deploy.change_schedule(self.runtime, schedule)

    @in_turn
    def resize(
        self,
        workers: int | None = None,
        *,
        balance: str | Sequence[int] = "parameters",
        replicas: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Go on over the cluster's first ``workers`` (None: all), cut by ``balance``, or as a ``plan`` says.

        Weights, optimizer state, random numbers and schedulers go on: losses are those of a run that was not resized,
        to the bit unless ``replicas`` changes. Raises StateError within a step or an accumulation, and ArgumentError,
        ScheduleError or PartitionError, before anything changes.
        """
        self.runtime.check()
        options = resize.wanted(self.recipe.options, self.runtime, balance, replicas).planned(plan)
        self.runtime = self.runtime.healed(lambda: resize.resized(self.runtime, options, workers))
        self.recipe.options = options

    @in_turn
    def close(self) -> None:
        """Free the stages on the workers; closing twice is allowed."""
        self.runtime.close()

    def __repr__(self) -> str:
        if self.runtime.closed:
            return "Pipeline(closed)"
        return f"{self.runtime.title()}\n{_tables.text(HEADER, self.runtime.rows())}"

    def _repr_html_(self) -> str:
        return _tables.markup(self.runtime.title(), HEADER, self.runtime.rows())

    @in_turn
    def train_step(
        self, inputs: NestOfTensors, targets: NestOfTensors, metrics: Metrics | None = None, outputs: bool = False
    ) -> StepResult:
        """Run one batch forward and backward and update the weights; return the loss and what was measured.

        ``inputs`` and ``targets``: nests of tensors with the batch in dimension 0, or as ``rp.Replicated``,
        ``rp.Batched`` and ``rp.MicroBatches`` say; the result has the gradients of inputs that require one. With
        ``accumulate`` = n, only every n-th call updates. ``result.metrics`` are ``metrics``, given as to ``evaluate``,
        of the training forward's outputs; with ``outputs`` these are in ``result.outputs``, detached and on the CPU.
        Raises ArgumentError, StageError, WorkerLost or DeadlineExceeded; the weights are then as before.
        """
        self.runtime = resize.settled(self.runtime, self.recipe.options)
        return train_batch(self.runtime, inputs, targets, metrics, outputs)

    def train(self, batches: Batches, progress: bool = False, *, ahead: int = 0) -> Iterator[StepResult]:
        """Train on each (inputs, targets) of ``batches``, or RemoteBatches, as ``train_step`` does; yield each result.

        ``progress`` shows a bar with the loss. With ``ahead=1`` a batch more is read than results are yielded, and its
        step is issued while the one before runs: the results are the same, and workers do not wait for this process.
        Asynchronous schedules stream: a result is yielded some batches after its batch was fed (enough to keep all
        workers busy), so a learning rate set then holds for the batches fed from then on. Any other call on the
        pipeline drains the stream first. Raises what ``train_step`` raises.
        """
        self.runtime = resize.settled(self.runtime, self.recipe.options)
        self.runtime.check_trains()
        given = iter(pairs(batches, "train", lambda inputs: has(self.runtime, inputs)))
        results = train(self.runtime, given, self.train_step, ahead)
        return EachInTurn(self.turn, "train", shown(results, batches, progress), NOT_TRAINED)

    def on_step(self, callback: Callback | str | os.PathLike[str]) -> Callback:
        """Call ``callback(result)`` on the driver after every step; return it.

        A path stands for ``JsonLines(path)``. ``train_step``, ``train`` or the end of a ``with pipe.step()`` raises
        what a callback raises, once the other callbacks have been called; by then the step is done and counted, and the
        pipeline is usable. ``callbacks`` lists them; ``close`` closes those that have a method ``close``.
        """
        function = callback if callable(callback) else JsonLines(require_path("callback", callback, ", or a function"))
        self.callbacks.append(function)
        return function

    @in_turn
    def step(self) -> Step:
        """Return a step to run by hand, ``with pipe.step() as s:``, inside a distributed-autograd context.

        The gradients are in the context ``s.context_id`` after ``s.forward_backward(inputs, targets)``; apply them
        with ``s.optimize()``, or with torch's ``DistributedOptimizer`` on ``parameter_rrefs()``. Raises ScheduleError
        under an asynchronous schedule.
        """
        return step_by_hand(self.runtime)

    @contextmanager
    def trace(self) -> Iterator[Timeline]:
        """Yield a timeline that the block's steps fill with actions, transfers and updates, on the driver's clock."""
        self.turn.run("trace", self.runtime.check)
        with self.runtime.traced() as timeline:
            yield timeline

    @in_turn
    def __call__(self, inputs: NestOfTensors) -> Any:
        """Return the model's output in eval mode, gathered in this process. Its type is Any: the model decides it."""
        [output] = self.predict([inputs])
        return output

    def predict(self, batches: Iterable[NestOfTensors]) -> Iterator[Any]:
        """Yield the output for every batch of inputs, as ``pipe(inputs)`` returns it, without a gap between batches.

        The iterator reads some batches ahead. Until it is finished or closed, other calls of the pipeline that run
        batches raise StateError.
        """
        self.turn.run("predict", self.runtime.check)
        return EachInTurn(self.turn, "predict", inference.outputs(self.runtime, batches))

    @overload
    def evaluate(self, batches: Batches) -> float: ...

    @overload
    def evaluate(self, batches: Batches, metrics: Metrics) -> dict[str, float]: ...

    @in_turn
    def evaluate(self, batches: Batches, metrics: Metrics | None = None) -> float | dict[str, float]:
        """Return the mean loss over all samples of ``batches``, or RemoteBatches, in eval mode.

        ``metrics``: functions by name, each of the (output, target) of a micro-batch and returning (sum, count), called
        on the last stage's worker; then {"loss": …, name: sum / count, …} is returned. Raises ArgumentError if nothing
        is counted in any batch.
        """
        self.runtime.check()
        loss, means = inference.evaluate(self.runtime, pairs(batches, "evaluate"), {} if metrics is None else metrics)
        return loss if metrics is None else {"loss": loss, **means}

    @in_turn
    def parameter_rrefs(self) -> list[Any]:
        """Return RRefs to every replica's trainable parameters, in the model's order, for ``DistributedOptimizer``."""
        self.runtime.check()
        self.runtime.check_trains()
        return [rref for stage in self.stages for rref in stage.parameter_rrefs()]

    @in_turn
    def state_dict(self, trainable: bool = False) -> OrderedDict[str, Any]:
        """Return all state, or the ``trainable`` parameters alone, under the unsplit model's names, on the CPU."""
        self.runtime.check()
        return self.runtime.healed(lambda: state.state_dict(self.runtime, trainable))

    @in_turn
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` of this pipeline or of the unsplit model returned.

        Raises CheckpointError, before anything changes, unless names and shapes are the model's.
        """
        self.runtime.ready()
        after = "Some workers may have loaded their part, and some not: load again"
        self.runtime.healed(lambda: state.load_state_dict(self.runtime, state_dict), after)

    @in_turn
    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        stateful: Holders | None = None,
        position: Any = None,
        keep: int | None = 2,
    ) -> Path:
        """Write everything that training needs to go on into a new folder of ``directory``, and return the folder.

        ``stateful``: by name, objects to save beside weights, optimizer, seed and ``trained``: learning-rate
        schedulers, a ``torch.Generator``, anything with ``state_dict`` and ``load_state_dict``. ``position``: plain
        values that say where in the data training is. A save that is killed, at any moment, leaves the checkpoints
        before it readable. The newest ``keep`` checkpoints stay, all if it is None. Until this process ends no other
        one saves to ``directory``. Raises CheckpointError with worker and path.
        """
        self.runtime.check()
        holders = {} if stateful is None else stateful
        return self.runtime.healed(lambda: state.save(self.runtime, directory, holders, position, keep))

    @in_turn
    def load(
        self, directory: str | os.PathLike[str], *, stateful: Holders | None = None, missing_ok: bool = False
    ) -> Any:
        """Go on from the newest checkpoint in ``directory``, or from that very checkpoint; return its ``position``.

        ``stateful``: objects by the names given to ``save``. With ``missing_ok`` a directory without a checkpoint, or
        none, is no error, and whether something was loaded is returned: one script begins and resumes. Training goes on
        with the same bits, also with another cut, schedule or number of workers. Raises CheckpointError with file and
        tensor, before anything changes.
        """
        self.runtime.ready()
        return state.load(self.runtime, directory, {} if stateful is None else stateful, missing_ok=missing_ok)
