"""``rp.verify``: hold a pipeline against the plain loop on the user's own model and batch."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rpcpipe._arguments import require_kind
from rpcpipe.driver.runtime import Runtime
from rpcpipe.errors import ScheduleError, StateError, require, require_whole
from rpcpipe.model import tied_weights
from rpcpipe.model.layers import Layer, Wired, layer_of
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.names import prefix_of
from rpcpipe.model.nest_types import NestOfTensors
from rpcpipe.pipeline import deploy, state
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.pipeline.plain_loop import Job, PlainProcess, Update, unwatch, watch
from rpcpipe.pipeline.recipe import Recipe
from rpcpipe.worker.operations import KeepState, RestoreState

# Where sums are made in another order than by one process: relative to the largest value.
_TOLERANCE = 1e-4
_NORM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Difference:
    """A quantity that differs after ``step``: of ``layer``, or of the whole model if that is empty."""

    step: int
    layer: str
    quantity: str
    largest: float

    def __str__(self) -> str:
        where = f"layer {self.layer}, " if self.layer else ""
        size = "" if math.isinf(self.largest) else f" by up to {self.largest:.3g}"
        return f"{where}{self.quantity}, in step {self.step}: differs{size}"


@dataclass(frozen=True)
class Verification:
    """What came out: ``differences`` by step, of outputs, loss and norm, then parameters and buffers; none if exact.

    ``tolerance`` is 0 where the documentation promises one process's bits; ``reason`` says why it is not.
    ``losses`` and ``grad_norms`` hold (pipeline, plain loop) by step.
    """

    steps: int
    compared: int
    losses: tuple[tuple[float, float], ...]
    grad_norms: tuple[tuple[float, float], ...]
    differences: tuple[Difference, ...]
    tolerance: float = 0.0
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether every bit agrees."""
        return not self.differences

    @property
    def ok(self) -> bool:
        """Whether the pipeline computes what one process computes, to the bit or within ``tolerance``."""
        return all(difference.largest <= self.tolerance for difference in self.differences)

    @property
    def first(self) -> Difference | None:
        """The first difference beyond ``tolerance``: of the earliest step, outputs first, in the model's order."""
        return next((found for found in self.differences if not found.largest <= self.tolerance), None)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        quantities = f"{self.steps} steps: losses, gradient norms and {self.compared} parameters and buffers"
        if self.first is not None:
            return f"The pipeline does not compute what one process computes. First: {self.first}."
        if self.exact:
            return f"{quantities} are those of one process, to the bit."
        worst = max(difference.largest for difference in self.differences)
        return f"{quantities} are those of one process within {worst:.2g} ({self.reason})."


def verify(pipe: Pipeline, inputs: NestOfTensors, targets: NestOfTensors, steps: int = 2) -> Verification:
    """Train ``steps`` updates on one batch, and the same in a plain loop in another process, and compare everything.

    ``inputs`` and ``targets`` as for ``train_step``. The pipeline's weights, buffers, optimizer and counters are put
    back afterwards; callbacks are not called. A truthy result says that it computes what one process computes.

    Raises ArgumentError, StateError within an accumulation, ScheduleError for an asynchronous schedule, StageError if a
    step fails, ModelError if the plain loop fails, and DeadlineExceeded.
    """
    require_kind("pipe", pipe, Pipeline, "a Pipeline")
    return pipe.turn.run("verify", _verify, pipe, inputs, targets, require_whole("steps", steps))


def _verify(pipe: Pipeline, inputs: Nest, targets: Nest, steps: int) -> Verification:
    runtime, recipe = pipe.runtime, pipe.recipe
    runtime.check()
    require(
        runtime.progress.done == 0,
        "calls of an accumulation are done: verify after the one that updates",
        error=StateError,
    )
    if runtime.policy is not None:
        raise ScheduleError(
            f"{runtime.schedule.name!r} computes with older weights on purpose, so the plain loop does something else;"
            " set pipe.schedule to a synchronous one, verify, and set it back"
        )
    with _put_back(runtime) as seed:
        job = _job(runtime, recipe, seed, inputs, targets, steps)
        with closing(PlainProcess(job)) as process:
            started = time.monotonic()
            own = [_update(pipe, inputs, targets, watched=step == 0) for step in range(steps)]
            plain = process.result(60 + 10 * len(runtime.stages) * (time.monotonic() - started))
    tolerance, reason = _tolerance(runtime, recipe)
    return _compare(own, plain, job, tolerance, reason)


@contextmanager
def _put_back(runtime: Runtime) -> Iterator[int]:
    """Yield the seed of random numbers; afterwards the pipeline is as it was."""
    driver, scaler = runtime.driver, runtime.scaler
    seeds = driver.collect({name: driver.call(name, KeepState()) for name in runtime.names})
    before = runtime.trained, runtime.progress, dict(runtime.busy), runtime.callbacks
    scale = None if scaler is None else scaler.state_dict()
    runtime.callbacks = []
    try:
        yield next(iter(seeds.values()))
    finally:
        runtime.trained, runtime.progress, runtime.busy, runtime.callbacks = before
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)
        if runtime.cluster.healthy:
            driver.collect({name: driver.call(name, RestoreState()) for name in runtime.names})
            runtime.history.cut()


def _job(runtime: Runtime, recipe: Recipe, seed: int, inputs: Nest, targets: Nest, steps: int) -> Job:
    options, program = recipe.options, runtime.program
    if options.loss is None or options.optimizer is None:
        raise StateError("this pipeline does not train; make one with loss=… and optimizer=… to verify it")
    batch = program.cut(inputs)
    pairs = iter(zip(batch.parts, program.cut_targets(runtime.prepare(targets), batch), strict=True))
    first = runtime.cluster.workers[0]
    return Job(
        layers=(None if runtime.trained else recipe.layers()) or _from_workers(runtime),
        loss=options.loss,
        optimizer=options.optimizer,
        replicas=[[next(pairs) for _ in range(count)] for count in batch.counts],
        shares=batch.weights,
        weights=state.state_dict(runtime),
        optimizer_state=deploy.optimizer_states(runtime),
        groups=runtime.optimizer.changes(),
        trained=runtime.trained,
        seed=seed,
        steps=steps,
        accumulate=runtime.settings.accumulate,
        clip=runtime.settings.clip_grad_norm,
        autocast=options.autocast,
        scaler=None if runtime.scaler is None else runtime.scaler.state_dict(),
        batch_norm=options.batch_norm,
        device=str(first.device),
        threads=runtime.cluster.call(first, torch.get_num_threads),
    )


def _from_workers(runtime: Runtime) -> OrderedDict[str, Layer]:
    """Return the workers' modules, where the user's are gone, or layers have a state that training has moved on."""
    wirings = runtime.deployment.wirings
    children = [stage.call(lambda module: list(module.named_children())) for stage in runtime.stages]
    modules = OrderedDict(pair for pairs in children for pair in pairs)
    tied_weights.join(modules, runtime.deployment.ties, drawn=(), seed=0)
    return OrderedDict((name, Wired(module, *wirings[name])) for name, module in modules.items())


def _update(pipe: Pipeline, inputs: Nest, targets: Nest, *, watched: bool) -> Update:
    """Train the pipeline until it has updated once; ``watched``: take fingerprints in the first call."""
    update = Update()
    for call in range(pipe.accumulate):
        stages = pipe.stages if watched and call == 0 else ()
        for stage in stages:
            stage.call(watch)
        result = pipe.train_step(inputs, targets)
        for stage in stages:
            update.outputs |= stage.call(unwatch)
        update.losses.append(result.loss)
    update.grad_norm = result.grad_norm
    update.state = dict(pipe.state_dict())
    return update


def _tolerance(runtime: Runtime, recipe: Recipe) -> tuple[float, str]:
    """Return how far the documentation lets the pipeline's figures be from one process's, and why."""
    options, deployment = recipe.options, runtime.deployment
    if any(len(members) > 1 for members in deployment.stage_links.members.values()):
        return _TOLERANCE, "the gradients of tied weights are summed in the stages' order"
    if options.batch_norm == "deferred":
        return _TOLERANCE, "deferred statistics are merged in double precision"
    if deployment.layout.replicas > 1 and runtime.settings.accumulate > 1:
        return _TOLERANCE, "the replicas' gradients are summed in an order of their own"
    if any(torch.device(worker.device).type == "cuda" for worker in runtime.cluster.workers):
        return _NORM_TOLERANCE, "the norm of all gradients is added up on the CPU, from each one's, which the GPU gives"
    return 0.0, ""


def _compare(own: list[Update], plain: list[Update], job: Job, tolerance: float, reason: str) -> Verification:
    first_share = len(job.replicas[0])
    differences = []
    for step, (mine, one) in enumerate(zip(own, plain, strict=True)):
        for layer, values in one.outputs.items():
            # A recomputation gives fingerprints again; a replica has those of its own micro-batches.
            missing = set(values[:first_share]) - set(mine.outputs[layer])
            differences += [Difference(step, layer, "output", math.inf)] if missing else []
        scalars = [("loss", a, b) for a, b in zip(mine.losses, one.losses, strict=True)]
        scalars.append(("the gradient's norm", mine.grad_norm, one.grad_norm))
        differences += [Difference(step, "", what, _distance(a, b)) for what, a, b in scalars if _distance(a, b)]
        for key, value in one.state.items():
            if largest := _distance(mine.state.get(key), value):
                layer = layer_of(key, job.layers)
                differences.append(Difference(step, layer, key.removeprefix(prefix_of(layer)), largest))
    return Verification(
        len(own),
        len(plain[0].state),
        tuple((sum(a.losses) / len(a.losses), sum(b.losses) / len(b.losses)) for a, b in zip(own, plain, strict=True)),
        tuple((a.grad_norm, b.grad_norm) for a, b in zip(own, plain, strict=True)),
        tuple(differences),
        tolerance,
        reason,
    )


def _distance(a: Any, b: Any) -> float:
    """Return 0 where both are equal to the bit, else the largest difference, relative to the largest value over 1."""
    if isinstance(a, float) and isinstance(b, float):
        a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return 0.0 if a == b else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())):
        return 0.0
    largest = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(largest) else largest / max(1.0, float(b.abs().max()))
