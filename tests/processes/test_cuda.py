"""Workers on a GPU: the plain loop on the same GPU is the oracle, as on the CPU."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Versioned, assert_same_weights
from support.oracle import train as serial
from support.stream import SIZES
from support.stream import pipeline as stream_pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SYNCHRONOUS = ["naive", "gpipe", "1f1b", "eager-1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v"]


@pytest.fixture
def gpus() -> rp.Cluster:
    return rp.launch(workers=2, device="cuda", threads=1, timeout=60.0)


def pipeline(cluster: rp.Cluster, **changed: Any) -> rp.Pipeline:
    options: dict[str, Any] = {"loss": cross_entropy, "optimizer": adamw, "schedule": "1f1b", "chunks": 4} | changed
    model = options.pop("model", None) or mlp(width=64)
    virtual = rp.schedules.fewest_virtual_stages(options["schedule"])
    return rp.Pipeline(model, cluster, virtual_stages=virtual, **options)


def batch(size: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    return next(batches(1, size, 64))


def convolutions() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_a_pipeline_on_a_gpu_computes_what_one_process_computes_there(gpus: rp.Cluster, schedule: str) -> None:
    with closing(pipeline(gpus, schedule=schedule)) as pipe:
        assert {worker.device for worker in gpus.workers} == {"cuda:0"} or torch.cuda.device_count() > 1
        assert pipe.stages[0].call(lambda module: next(module.parameters()).device.type) == "cuda"
        found = rp.verify(pipe, *batch())
        assert found.ok, str(found)
        # The norm of all gradients is added up on the CPU; all else has the GPU's bits.
        assert {difference.quantity for difference in found.differences} <= {"the gradient's norm"}


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint": "always"},
        {"clip_grad_norm": 0.1},
        {"loss": summed},
        {"autocast": torch.bfloat16},
        {"autocast": torch.float16},
        {"accumulate": 2},
        {"dispatch": "batched"},
        {"model": convolutions()},
        {"model": convolutions(), "schedule": "zb-v"},
    ],
    ids=["recompute", "clip", "sum-count", "bfloat16", "float16", "accumulate", "batched", "conv", "conv-zb-v"],
)
def test_options_on_a_gpu(gpus: rp.Cluster, options: dict[str, Any]) -> None:
    with closing(pipeline(gpus, **options)) as pipe:
        found = rp.verify(pipe, *batch())
        assert found.ok, str(found)


def test_weights_after_steps_are_the_plain_loops(gpus: rp.Cluster) -> None:
    model = mlp(width=64, dropout=0.0).cuda()
    optimizer = adamw(list(model.parameters()))
    with closing(pipeline(gpus, model=mlp(width=64, dropout=0.0))) as pipe:
        for x, y in batches(3, 16, 64):
            for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
                (cross_entropy(model(a.cuda()), b.cuda()) / 4).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            # A GPU user's batch is on the GPU; it is sent from the driver's memory all the same.
            assert pipe.train_step(x.cuda(), y.cuda()).applied
        for name, value in pipe.state_dict().items():
            assert torch.equal(value.cpu(), model.state_dict()[name].cpu()), name


def test_inference_and_checkpoints_on_a_gpu(gpus: rp.Cluster, tmp_path: Path) -> None:
    with closing(pipeline(gpus)) as pipe, closing(pipeline(gpus, schedule="zb-v")) as other:
        x, y = batch()
        pipe.train_step(x, y)
        pipe.save(tmp_path / "saved")
        other.load(tmp_path / "saved")
        assert torch.equal(pipe(x).cpu(), other(x).cpu())
        assert pipe.evaluate([(x, y)]) == other.evaluate([(x, y)])
        assert pipe.train_step(x, y).loss == other.train_step(x, y).loss


@pytest.mark.parametrize("policy", ["stash", "2bw"])
def test_streams_on_a_gpu(gpus: rp.Cluster, policy: str) -> None:
    chunks = 4 if policy == "2bw" else 1
    oracle = Versioned(mlp(dropout=0.0).cuda(), sgd, cross_entropy, SIZES[2])
    with closing(stream_pipeline(2, policy, gpus, model=mlp(dropout=0.0))) as pipe:
        on_gpu = [(x.cuda(), y.cuda()) for x, y in batches(5)]
        losses = [result.loss for result in pipe.train(batches(5))]
        assert losses == pytest.approx(serial(oracle, on_gpu, policy, 2, chunks), rel=1e-6)
        assert_same_weights(pipe, oracle.model.cpu())


def test_replicas_on_a_gpu(gpus: rp.Cluster) -> None:
    with closing(pipeline(gpus, replicas=2, shard_optimizer=True)) as pipe:
        found = rp.verify(pipe, *batch())
        assert found.ok, str(found)


def test_the_caller_s_batch_may_be_on_the_gpu(gpus: rp.Cluster) -> None:
    with closing(pipeline(gpus)) as pipe:
        x, _ = batch()
        assert torch.equal(pipe(x).cpu(), pipe(x.cuda()).cpu())
        values = [values.cpu() for values in pipe.predict([x.cuda()])]
        assert torch.equal(values[0], pipe(x).cpu())


def test_an_error_on_a_gpu_is_named_and_changes_no_weight(gpus: rp.Cluster) -> None:
    with closing(pipeline(gpus)) as pipe:
        before = {name: value.cpu().clone() for name, value in pipe.state_dict().items()}
        x, y = batch()
        with pytest.raises(rp.StageError, match="stage 0"):
            pipe.train_step(x[:, :5].contiguous(), y)
        assert all(torch.equal(before[name], value.cpu()) for name, value in pipe.state_dict().items())
        assert pipe.train_step(x, y).applied
