"""Exceptions anywhere, wrong arguments, and what is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.transport import rpc
from support.models import adamw, batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights


class Boom(nn.Module):
    """Raises in forward or backward once a value is large."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bad = bool(x.abs().max() > 1e6)
        if bad and self.where == "forward":
            raise ValueError("boom in forward: größer als erlaubt")
        if bad and self.where == "backward":
            x.register_hook(self._raise)
        return x

    def _raise(self, grad: torch.Tensor) -> None:
        raise ValueError("boom in backward")


class RaisingAdamW(torch.optim.AdamW):
    """Applies its update and then raises, in the third step, on the worker that has `weight`'s size."""

    def __init__(self, params: list[nn.Parameter], victim: int) -> None:
        super().__init__(params, lr=1e-2)
        # An object that a rollback leaves alone: plain attributes are taken back with the update.
        self.calls = itertools.count(1)
        self.victim = sum(p.numel() for p in params) == victim

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        if next(self.calls) == 3 and self.victim:
            raise RuntimeError("boom in optimizer")


def model_with(where: str, position: int) -> nn.Sequential:
    model = mlp()
    model[position] = nn.Sequential(*model[position], Boom(where))
    return model


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", range(4))
def test_an_exception_in_a_layer(cluster: rp.Cluster, stage: int, where: str, dispatch: str) -> None:
    pipe = rp.Pipeline(
        model_with(where, 2 * stage), cluster, loss=cross_entropy, optimizer=sgd, chunks=5, balance=[2] * 4,
        dispatch=dispatch,
    )  # fmt: skip
    first, second, third = batches(3)
    pipe.train_step(*first)
    before = pipe.state_dict()
    poisoned = first[0].clone()
    poisoned[4:6] *= 1e12  # micro-batch 2
    start = time.perf_counter()
    with pytest.raises(rp.StageError, match=f"boom in {where}") as caught:
        pipe.train_step(poisoned, first[1])
    assert time.perf_counter() - start < 1.0
    assert (caught.value.stage, caught.value.chunk, caught.value.action) == (stage, 2, where)
    assert "test_faults.py" in caught.value.remote_traceback
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert pipe.train_step(*second).applied
    assert pipe.train_step(*third).applied
    pipe.close()


def test_an_exception_in_the_loss(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    x, y = next(batches(1))
    with pytest.raises(rp.StageError, match=r"IndexError|out of bounds") as caught:
        pipe.train_step(x, y + 100)
    assert (caught.value.stage, caught.value.chunk) == (3, 0)
    assert pipe.train_step(x, y).applied
    pipe.close()


def test_a_loss_that_is_no_scalar_is_refused_before_any_backward(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=lambda output, target: output, optimizer=sgd, chunks=2)
    with pytest.raises(rp.ModelError, match=r"scalar tensor .*not a tensor of shape \(5, 4\)"):
        pipe.train_step(*next(batches(1)))
    pipe.close()


@pytest.mark.parametrize("stage", range(4))
def test_an_exception_in_the_optimizer_takes_every_stages_update_back(cluster: rp.Cluster, stage: int) -> None:
    sizes = [1, 2, 3, 2]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in mlp()]
    victim = sum(counts[sum(sizes[:stage]) : sum(sizes[: stage + 1])])
    pipe = rp.Pipeline(
        mlp(), cluster, loss=cross_entropy, optimizer=lambda params: RaisingAdamW(params, victim), chunks=3,
        balance=sizes,
    )  # fmt: skip
    oracle = Oracle(mlp(), adamw, cross_entropy, 3)
    data = list(batches(5))
    for batch in data[:2]:
        pipe.train_step(*batch)
        oracle.train_step(*batch)
    start = time.perf_counter()
    with pytest.raises(rp.StageError, match="boom in optimizer") as caught:
        pipe.train_step(*data[2])
    assert time.perf_counter() - start < 1.0
    assert caught.value.action == "optimizer"
    assert caught.value.failure.worker == f"worker{stage}"
    assert_same_weights(pipe, oracle.model)
    for batch in data[3:]:
        pipe.train_step(*batch)
        oracle.train_step(*batch)
    assert_same_weights(pipe, oracle.model)  # Adam's moments and step counts were taken back too
    pipe.close()


def test_nan_in_the_gradients_changes_nothing(cluster: rp.Cluster) -> None:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
    before = pipe.state_dict()
    x, y = next(batches(1))
    result = pipe.train_step(x * float("nan"), y)
    assert not result.applied
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
    assert pipe.train_step(x, y).applied
    pipe.close()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunks": 0}, rp.ArgumentError, "chunks must be at least 1, not 0"),
        ({"balance": [3, 3]}, rp.PartitionError, "sum to the model's 8 layers"),
        ({"balance": [1] * 8}, rp.PartitionError, "8 stages need 8 workers, the cluster has 4"),
        ({"balance": "luck"}, rp.ArgumentError, "balance must be"),
        ({"schedule": "2f2b"}, rp.ArgumentError, "unknown schedule '2f2b'"),
        ({"dispatch": "pigeon"}, rp.ArgumentError, "dispatch must be one of"),
        ({"loss": "mse"}, rp.ArgumentError, "loss must be callable"),
        ({"optimizer": 3}, rp.ArgumentError, "optimizer must be a function"),
        ({"model": mlp(3)}, rp.PartitionError, "3 layers and the schedule 4 stages"),
        ({"model": nn.Linear(2, 2)}, rp.ArgumentError, "not Linear"),
        ({"model": [nn.Linear(2, 2), 5, 6, 7]}, rp.ArgumentError, "layer 1 is a int"),
    ],
)
def test_wrong_arguments_are_refused_with_the_values(
    cluster: rp.Cluster, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": mlp(), "loss": cross_entropy, "optimizer": sgd, **change}
    with pytest.raises(error, match=message):
        rp.Pipeline(arguments.pop("model"), cluster, **arguments)
    assert not list(cluster.pipelines)


def test_an_optimizer_that_is_none_is_refused(cluster: rp.Cluster) -> None:
    with pytest.raises(rp.ModelError, match=r"must return a torch\.optim\.Optimizer, not NoneType"):
        rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=lambda params: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"workers": 2, "threads": 0}, "threads must be at least 1, not 0"),
        ({"workers": 2.0}, "workers must be a whole number of at least 1, not 2.0"),
        ({"workers": 2, "timeout": 0}, r"timeout must be a number above 0 \(seconds\), not 0"),
        ({"workers": 2, "device": "cuda:7"}, r"is not there: this host has \d CUDA"),
        ({"workers": 2, "device": "mps"}, "runs on cpu and cuda"),
    ],
)
def test_wrong_launch_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(rp.ArgumentError, match=message):
        rp.launch(**arguments)


def broken_pipe(*_: Any) -> None:
    """What torch's remote has been seen to do, if the worker died while calls were being made."""
    raise RuntimeError("EPIPE: broken pipe")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_is_named(sign: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    with rp.launch(workers=2, threads=1, heal=False) as cluster:
        pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=2)
        batch = next(batches(1))
        pipe.train_step(*batch)
        os.kill(cluster.workers[1].pid, sign)
        start = time.perf_counter()
        with pytest.raises(rp.WorkerLost, match=f"worker1 .* was killed by {sign.name}"):
            pipe.train_step(*batch)
        assert time.perf_counter() - start < 2.0
        with pytest.raises(rp.WorkerLost):
            pipe.train_step(*batch)
        monkeypatch.setattr(rpc._BINDINGS, "_invoke_remote_python_udf", broken_pipe)
        with pytest.raises(rp.WorkerLost, match=f"was killed by {sign.name}"):
            cluster.transport.remote("worker1", "clock")
        with pytest.raises(RuntimeError, match="EPIPE"):
            cluster.transport.remote("worker0", "clock")  # which lives
    assert not psutil.pid_exists(cluster.workers[0].pid)


# --- what is left behind ---

PROGRAM = textwrap.dedent("""
    import sys, torch, rpcpipe as rp
    from torch import nn
    from typing import NamedTuple
    class Local(nn.Linear): pass
    class Batch(NamedTuple):
        x: torch.Tensor
        name: str
    class Unpack(nn.Module):
        def forward(self, batch): return batch.x
    def loss(output, target):
        if END == "exception": raise RuntimeError("on purpose")
        return ((output - target) ** 2).mean()
    END = sys.argv[1]
    cluster = rp.launch(workers=2, threads=1)
    print(*[worker.pid for worker in cluster.workers], flush=True)
    model = [Unpack(), Local(4, 4), Local(4, 4)]
    pipe = rp.Pipeline(model, cluster, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    result = pipe.train_step(Batch(torch.randn(4, 4), 'a name'), torch.randn(4, 4))
    if END == "close": cluster.close()
    if END == "exit": sys.exit(3)
""")


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("rpcpipe-*")]


@pytest.mark.parametrize(("end", "status"), [("close", 0), ("nothing", 0), ("exit", 3), ("exception", 1)])
def test_nothing_is_left_behind(end: str, status: int, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), end], capture_output=True, text=True, timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)  # their sockets went with them
    assert not leftovers(tmp_path)
    if end == "exception":
        assert "on purpose" in done.stderr
