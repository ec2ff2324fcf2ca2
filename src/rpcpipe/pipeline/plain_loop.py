"""The same training in one process: the plain loop over micro-batches that ``rp.verify`` compares a pipeline with.

Knows no stage, worker, schedule or message; of the pipeline's own code it uses how layers are built and wired, and
how random numbers are seeded. ``main`` does one ``Job`` in a process that does nothing else.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import DeadlineExceeded, ModelError, RpcPipeError
from rpcpipe.model import batchnorm, rng
from rpcpipe.model.layers import Layer, Loss, Sequential
from rpcpipe.model.microbatch import Nest, map_tensors, tensors
from rpcpipe.model.wiring import Flow, advance, live_names
from rpcpipe.stage.optimizer import Factory, Parameters
from rpcpipe.stage.rollback import Buffers
from rpcpipe.transport.user_pickling import loads, named_dumps


@dataclass(kw_only=True)
class Job:
    """What to train and from where: ``steps`` updates on one batch, cut into ``replicas`` × micro-batches.

    ``shares`` holds the weight of each micro-batch's mean loss; ``weights`` and ``optimizer_state`` (by layer and
    parameter) are the pipeline's, as are the optimizer's ``groups`` and ``trained``, the steps done.
    """

    layers: OrderedDict[str, Layer]
    loss: Loss
    optimizer: Factory
    replicas: list[list[tuple[Nest, Nest]]]
    shares: Sequence[float]
    weights: Mapping[str, Any]
    optimizer_state: Mapping[str, Mapping[str, Mapping[str, Any]]]
    groups: Sequence[Mapping[str, Any]]
    trained: int
    seed: int
    steps: int = 1
    accumulate: int = 1
    clip: float | None = None
    autocast: torch.dtype | None = None
    scaler: Mapping[str, Any] | None = None
    batch_norm: str = "micro_batch"
    device: str = "cpu"
    threads: int = 1


@dataclass
class Update:
    """One update: the mean loss of each call that led to it, the gradients' norm, and the state after it.

    ``outputs``: by layer a fingerprint of its output for each micro-batch, of the first call of all.
    """

    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, list[float]] = field(default_factory=dict)


_WATCH = "_rpcpipe_watch"


def watch(module: nn.Module) -> None:
    """Take a fingerprint of every output of the layers in ``module``, until ``unwatch``."""
    for layer in module.children():
        found: list[float] = []

        def note(_: nn.Module, __: Any, output: Any, found: list[float] = found) -> None:
            found.append(sum(float(leaf.detach().double().sum()) for leaf in tensors(output)))

        layer.__dict__[_WATCH] = found, layer.register_forward_hook(note)


def unwatch(module: nn.Module) -> dict[str, list[float]]:
    """Return the fingerprints by layer."""
    outputs = {}
    for name, layer in module.named_children():
        outputs[name], handle = layer.__dict__.pop(_WATCH)
        handle.remove()
    return outputs


class PlainLoop:
    """Trains a model in this process as ``job`` says."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._model = Sequential(job.layers, seed=job.seed).to(job.device)
        if job.batch_norm == "deferred":
            batchnorm.defer(self._model)
        self._model.load_state_dict(job.weights)
        named = [pair for pair in self._model.named_parameters() if pair[1].requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self._optimizer = job.optimizer(Parameters(named))
        self._adopt()
        self._scaler = None if job.scaler is None else torch.amp.GradScaler(job.device)
        if self._scaler is not None:
            self._scaler.load_state_dict(dict(job.scaler or {}))

    def _adopt(self) -> None:
        """Let the optimizer go on from the pipeline's."""
        for group, values in zip(self._optimizer.param_groups, self._job.groups, strict=True):
            group.update(values)
        for name, layer in self._model.named_children():
            for key, parameter in layer.named_parameters():
                if state := self._job.optimizer_state.get(name, {}).get(key):
                    self._optimizer.state[parameter] = dict(state)

    def run(self) -> Iterator[Update]:
        """Yield each update when it is done."""
        job, step = self._job, self._job.trained
        for _ in range(job.steps):
            update, count = Update(), None
            for _ in range(job.accumulate):
                if step == job.trained:
                    watch(self._model)
                loss, number = self._call(step)
                if step == job.trained:
                    update.outputs = unwatch(self._model)
                update.losses.append(loss)
                count = number if count is None or number is None else count + number
                step += 1
            self._apply(update, count)
            update.state = {key: _to_cpu(value) for key, value in self._model.state_dict().items()}
            yield update

    def _call(self, step: int) -> tuple[float, float | None]:
        """Add the gradients of one batch; return its mean loss, and the count of a loss that returns sums."""
        before = [parameter.grad for parameter in self._parameters]
        losses: list[tuple[float, float | None]] = []
        totals: list[torch.Tensor | None] | None = None
        buffers = Buffers()
        for replica, parts in enumerate(self._job.replicas):
            # A replica goes on from what it has accumulated, and the replicas' sums are added up.
            for parameter, grad in zip(self._parameters, before, strict=True):
                parameter.grad = None if grad is None or totals is not None else grad
            for inputs, target in parts:
                losses.append(self._micro_batch(step, len(losses), inputs, target))
            totals = _added(totals, [parameter.grad for parameter in self._parameters])
            if self._job.batch_norm == "deferred":
                continue
            # Running statistics are those of the first replica's share.
            if replica:
                buffers.restore()
            elif len(self._job.replicas) > 1:
                buffers.take([self._model])
        for parameter, grad in zip(self._parameters, totals or before, strict=True):
            parameter.grad = grad
        for norm in batchnorm.deferred(self._model):
            norm.commit()
        counts = [count for _, count in losses if count is not None]
        if counts:
            return sum(value for value, _ in losses) / sum(counts), sum(counts)
        return sum(value * share for (value, _), share in zip(losses, self._job.shares, strict=True)), None

    def _micro_batch(self, step: int, index: int, inputs: Nest, target: Nest) -> tuple[float, float | None]:
        """Run one micro-batch forward and backward; return its loss and count."""
        job = self._job
        inputs, target = (map_tensors(lambda leaf: leaf.to(job.device), nest) for nest in (inputs, target))
        with self._autocast():
            value = job.loss(self._forward(step, index, inputs), target)
        value, count = value if isinstance(value, tuple) else (value, None)
        weighted = value if count is not None else value * (job.shares[index] / job.accumulate)
        (weighted if self._scaler is None else self._scaler.scale(weighted)).backward()
        return float(value.detach()), None if count is None else float(count)

    def _forward(self, step: int, index: int, inputs: Nest) -> Nest:
        flow: Flow = inputs, dict(inputs) if isinstance(inputs, Mapping) else {}
        wirings = list(self._model.wirings.values())
        for at, (layer, wiring, needed) in enumerate(zip(self._model, wirings, live_names(wirings), strict=True)):
            rng.seed_layer(self._job.seed, step, index, at)
            flow = advance(layer, wiring, flow, needed)
        return flow[0]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._job.autocast
        return nullcontext() if dtype is None else torch.autocast(self._job.device.partition(":")[0], dtype)

    def _apply(self, update: Update, count: float | None) -> None:
        """Apply the gradients, unless the loss or the gradients are not finite."""
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if count is not None:
            torch._foreach_div_(grads, count)
        update.grad_norm = float(nn.utils.get_total_norm(grads))
        if self._job.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._job.clip)
        finite = torch.tensor([*update.losses, update.grad_norm]).isfinite().all()
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        elif finite:
            self._optimizer.step()
        self._optimizer.zero_grad()


def _added(totals: list[torch.Tensor | None] | None, grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    if totals is None:
        return grads
    return [
        first if second is None else second if first is None else first + second
        for first, second in zip(totals, grads, strict=True)
    ]


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


class PlainProcess:
    """A process that does one Job."""

    def __init__(self, job: Job) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [str(Path(self._folder.name) / name) for name in ("job", "result")]
        self._result = Path(files[1])
        with open(files[0], "wb") as file:
            pickle.dump(sys.path, file)
            pickle.dump(named_dumps(job, "the model", error=ModelError), file)
        self._process = subprocess.Popen([sys.executable, "-c", _PROGRAM, *files], stdin=subprocess.DEVNULL)

    def result(self, seconds: float) -> list[Update]:
        """Return the updates; raises DeadlineExceeded after ``seconds``, ModelError if the loop raises."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(f"the plain loop took more than {seconds:.0f} s; verify a smaller batch") from error
        if self._process.returncode:
            raise RpcPipeError(f"the plain loop's process ended with status {self._process.returncode}: see its output")
        result: list[Update] | str = pickle.loads(self._result.read_bytes())
        if isinstance(result, str):
            raise ModelError(f"one process cannot do what the pipeline did:\n{result.rstrip()}")
        return result

    def close(self) -> None:
        """End the process, if it has not ended, and remove its files."""
        self._process.kill()
        self._process.wait()  # what is killed ends, if not in a system call that cannot be interrupted: then with that
        self._folder.cleanup()


_PROGRAM = "import sys; from rpcpipe.pipeline.plain_loop import main; main(*sys.argv[1:])"


def main(job_file: str, result_file: str) -> None:
    """Do the job in ``job_file``: what to import from, then a pickled Job. Write a list of Updates, or a traceback."""
    with open(job_file, "rb") as file:
        sys.path[:] = pickle.load(file)
        data = pickle.load(file)
    try:
        result: Any = list(PlainLoop(loads(data)).run())
    except Exception:
        result = traceback.format_exc()
    Path(result_file).write_bytes(pickle.dumps(result))
