"""autocast and the loss scale: the bits of a plain loop under torch's own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.schedules import weight_versions
from rpcpipe.stage import precision
from support.local_cluster import LocalCluster
from support.models import adamw, batches, cross_entropy, mlp, sgd, summed
from support.oracle import Natural, Versioned, assert_same_run, assert_same_weights, train
from support.stream import SIZES

SCHEDULES = [name for name in rp.schedules.names() if name not in weight_versions.POLICIES]
MODES: list[Any] = ["never", "except_last", "always", 0.5, lambda stage, chunk: (stage + chunk) % 2 == 0]


def small_scale() -> torch.amp.GradScaler:
    """Grows every second step, so that a few steps see growth and overflow."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=2)


def pipeline(cluster: Any, dtype: torch.dtype | None, **changed: Any) -> rp.Pipeline:
    arguments = {"model": mlp(), "loss": cross_entropy, "optimizer": adamw, "chunks": 3} | changed
    model = arguments.pop("model")
    pipe = rp.Pipeline(model, cluster, autocast=dtype, **arguments)
    if pipe.scaler is not None:
        pipe.scaler.load_state_dict(small_scale().state_dict())
    return pipe


def natural(dtype: torch.dtype | None, **changed: Any) -> Natural:
    arguments = {"model": mlp(), "optimizer": adamw, "loss": cross_entropy, "chunks": 3} | changed
    scaler = small_scale() if dtype is torch.float16 else None
    return Natural(autocast=dtype, scaler=scaler, **arguments)


@pytest.mark.parametrize("dtype", precision.DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_mode_of_recomputation(schedule: str, dtype: torch.dtype) -> None:
    """Dropout on, messages shuffled; split backwards among them."""
    virtual = rp.schedules.fewest_virtual_stages(schedule)
    for seed, checkpoint in enumerate(MODES if dtype is torch.bfloat16 else MODES[:3:2]):
        pipe = pipeline(LocalCluster(3, seed), dtype, schedule=schedule, virtual_stages=virtual, chunks=6,
                        checkpoint=checkpoint)  # fmt: skip
        assert_same_run(pipe, natural(dtype, chunks=6), batches(3, 16))


@pytest.mark.parametrize("dispatch", ["rref", "batched"])
@pytest.mark.parametrize("dtype", precision.DTYPES)
def test_through_rpc(cluster: rp.Cluster, dtype: torch.dtype, dispatch: str) -> None:
    """Uneven micro-batches, a loss of (sum, count), clipping; activations and their gradients travel in ``dtype``."""
    pipe = pipeline(cluster, dtype, loss=summed, clip_grad_norm=0.05, dispatch=dispatch, checkpoint="except_last")
    assert_same_run(pipe, natural(dtype, loss=summed, clip=0.05))
    pipe.close()


class Twice(nn.Module):
    """One weight used twice: autocast's cache casts it once, and its gradients add up in ``dtype``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(x).tanh())


def twice() -> nn.Sequential:
    torch.manual_seed(4)
    shared = nn.Linear(12, 12)
    return nn.Sequential(nn.Linear(12, 12), Twice(shared), nn.GELU(), Twice(shared), nn.Linear(12, 4))


def test_a_weight_that_is_used_twice_is_cast_once() -> None:
    for schedule, checkpoint in itertools.product(["1f1b", "zb-h1"], ["never", "always"]):
        pipe = pipeline(
            LocalCluster(3), torch.bfloat16, model=twice(), schedule=schedule, checkpoint=checkpoint, balance=[1, 3, 1]
        )
        assert_same_run(pipe, natural(torch.bfloat16, model=twice()))
    uncached = natural(torch.bfloat16, model=twice())
    uncached.context = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # type: ignore[method-assign]
    for batch in batches(4):
        uncached.train_step(*batch)
    assert not torch.equal(pipe.state_dict()["1.linear.weight"], uncached.model.state_dict()["1.linear.weight"])


class Noting(nn.Module):
    """Keeps the dtypes of its input and of that input's gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [x.dtype]
        if x.requires_grad:
            x.register_hook(lambda grad: self.seen.append(grad.dtype))
        return x * 1


def test_activations_and_their_gradients_travel_in_the_low_precision(cluster: rp.Cluster) -> None:
    model = nn.Sequential(nn.Linear(12, 12), Noting(), nn.Linear(12, 4))
    pipe = pipeline(cluster, torch.bfloat16, model=model, balance=[1, 2], chunks=1)
    pipe.train_step(*next(batches(1)))
    assert pipe.stages[1].call(lambda stage: stage[0].seen) == [torch.bfloat16] * 2
    assert pipe(torch.randn(2, 12)).dtype == torch.bfloat16
    pipe.close()


def test_inference_runs_under_autocast(cluster: rp.Cluster) -> None:
    pipe = pipeline(cluster, torch.bfloat16)
    loop = natural(torch.bfloat16)
    model = loop.model.eval()
    data = list(batches(2, 6))
    with torch.no_grad(), loop.context():
        assert torch.equal(pipe(data[0][0]), torch.cat([model(x) for x in data[0][0].chunk(3)]))
        expected = sum(cross_entropy(model(x), y).item() for x, y in data) / 2
    assert pipe.evaluate(data) == pytest.approx(expected, rel=1e-5)
    pipe.close()


@pytest.mark.parametrize("policy", ["stash", "vertical_sync", "2bw"])
def test_asynchronous_schedules_take_bfloat16(policy: str) -> None:
    chunks = 4 if policy == "2bw" else 1
    schedule = "pipedream-2bw" if policy == "2bw" else "pipedream"
    pipe = pipeline(LocalCluster(3), torch.bfloat16, schedule=schedule, weights=policy, chunks=chunks, optimizer=sgd,
                    balance=SIZES[3])  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    results = list(pipe.train(batches(12)))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        losses = train(oracle, batches(12), policy, 3, chunks)
    assert [result.loss for result in results] == losses
    assert_same_weights(pipe, oracle.model)


# --- the loss scale ---


def steep(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target) * 30


def test_the_scale_moves_as_torchs_does_and_overflows_are_skipped(cluster: rp.Cluster) -> None:
    pipe, loop = pipeline(cluster, torch.float16, loss=steep, nonfinite="stop"), natural(torch.float16, loss=steep)
    scales, applied = [], []
    for batch in batches(10):
        scales.append(loop.scaler.get_scale())
        [result] = assert_same_run(pipe, loop, iter([batch]))
        assert result.loss_scale == scales[-1]
        applied.append(result.applied)
    assert pipe.scaler is not None
    assert pipe.scaler.state_dict() == loop.scaler.state_dict()
    assert True in applied
    assert False in applied
    assert max(scales) > scales[-1] or min(scales) < scales[0]
    pipe.close()


@pytest.mark.parametrize("scale", [1000.0, 3.0])
def test_a_scale_that_is_no_power_of_two_rounds_as_torchs_does(scale: float) -> None:
    pipe, loop = pipeline(LocalCluster(3), torch.float16), natural(torch.float16)
    for scaler in (pipe.scaler, loop.scaler):
        assert scaler is not None
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
    assert_same_run(pipe, loop)


def test_the_scale_is_plain_state() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, autocast=torch.float16)
    assert pipe.scaler is not None
    state = pipe.scaler.state_dict()
    assert state == {
        "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0
    }  # fmt: skip
    pipe.train_step(*next(batches(1)))
    assert pipe.scaler.state_dict() == state | {"_growth_tracker": 1}
    other = rp.Pipeline(mlp(), LocalCluster(3), loss=cross_entropy, optimizer=sgd, autocast=torch.float16)
    assert other.scaler is not None
    other.scaler.load_state_dict(pipe.scaler.state_dict() | {"scale": 8.0})
    assert other.train_step(*next(batches(1))).loss_scale == 8.0
    assert pipeline(LocalCluster(2), torch.bfloat16).scaler is None


def test_a_failed_step_does_not_move_the_scale() -> None:
    pipe, loop = pipeline(LocalCluster(3), torch.float16), natural(torch.float16)
    for batch in batches(4):
        with pytest.raises(rp.StageError):
            pipe.train_step(batch[0], batch[1] + 100)
        assert_same_run(pipe, loop, iter([batch]))
    assert pipe.scaler is not None
    assert pipe.scaler.state_dict() == loop.scaler.state_dict()


def uncounted(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (output.float() * 0.0).sum(), target.sum() * 0


def test_a_batch_in_which_nothing_counts_is_no_overflow() -> None:
    pipe = pipeline(LocalCluster(2), torch.float16, loss=uncounted)
    assert pipe.scaler is not None
    before, state = pipe.scaler.get_scale(), pipe.state_dict()
    assert not pipe.train_step(*next(batches(1))).applied
    assert pipe.scaler.get_scale() == before
    assert all(torch.equal(state[name], value) for name, value in pipe.state_dict().items())


def infinite(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target) / 0.0


def steeper(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return (output.float() * 1e4).square().mean()


def test_stop_stops_at_what_no_scale_can_mend() -> None:
    """A loss that is not finite, and a gradient that overflows at a scale of 1."""
    pipe = pipeline(LocalCluster(2), torch.float16, loss=infinite, nonfinite="stop")
    with pytest.raises(rp.NonFiniteError, match="a gradient of stage 1 is not finite"):
        pipe.train_step(*next(batches(1)))
    pipe = pipeline(LocalCluster(2), torch.float16, loss=steeper, nonfinite="stop")
    inputs = next(batches(1))[0]
    for scale in (2.0, 1.0):
        assert pipe.scaler is not None
        pipe.scaler.load_state_dict(pipe.scaler.state_dict() | {"scale": scale})
        if scale == 1.0:
            with pytest.raises(rp.NonFiniteError):
                pipe.train_step(inputs, inputs)
        else:
            result = pipe.train_step(inputs, inputs)
            assert math.isfinite(result.loss)
            assert not result.applied


def test_float16_is_refused_where_stages_update_on_their_own() -> None:
    with pytest.raises(rp.ScheduleError, match=r"use torch\.bfloat16"):
        pipeline(LocalCluster(2), torch.float16, schedule="pipedream")
    pipe, loop = pipeline(LocalCluster(2), torch.float16), natural(torch.float16)
    with pytest.raises(rp.ScheduleError, match="a synchronous schedule"):
        pipe.schedule = "pipedream"
    assert_same_run(pipe, loop)
    with pytest.raises(ValueError, match=r"torch.bfloat16, torch.float16 or None, not torch.float32"):
        pipeline(LocalCluster(2), torch.float32)
