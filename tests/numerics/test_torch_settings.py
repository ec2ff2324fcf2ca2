"""torch's process-wide settings are the driver's at the time a pipeline was made, whatever other pipelines have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.torch_settings import TorchSettings
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, sgd
from support.oracle import Natural, assert_same_run, assert_same_weights

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype, torch.float64),
    "device": (lambda: torch.set_default_device("meta"), lambda: str(torch.get_default_device()), "meta"),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), torch.get_deterministic_debug_mode, 2),
    "anomaly": (lambda: torch.set_anomaly_enabled(True), torch.is_anomaly_enabled, True),
    "warn only": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True), torch.get_deterministic_debug_mode, 1,
    ),
    "matmul": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision, "medium"),
    "cudnn.benchmark": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark, True,
    ),
    "tf32 of convolutions": (
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False), lambda: torch.backends.cudnn.allow_tf32, False,
    ),
    "attention": (
        lambda: torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.flash_sdp_enabled, False,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = TorchSettings.current()
    yield
    before.apply()


class Probe(nn.Module):
    """Notes what ``read`` says when it is built and when it runs."""

    notes: list[Any] = []  # noqa: RUF012  of all of them, in this process

    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__()
        self.read = read
        self.notes.append(read())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes.append(self.read())
        return x


def pipe_of(layers: Any) -> rp.Pipeline:
    return rp.Pipeline(layers, LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2, balance=[1, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "read", "value"), SETTINGS.values(), ids=SETTINGS)
def test_layers_are_built_and_run_under_the_settings_of_their_pipeline(
    change: Callable[[], Any], read: Callable[[], Any], value: Any
) -> None:
    before, initial, batch = TorchSettings.current(), read(), next(batches(1))
    assert initial != value
    layers = [nn.Linear(12, 4), rp.LayerSpec(Probe, read)]
    plain = pipe_of(layers)
    change()
    changed = pipe_of(layers)
    before.apply()
    Probe.notes.clear()
    for pipe, expected in (changed, value), (plain, initial), (changed, value):
        if value == "meta":  # on which a step has no numbers
            pipe.stages[1].call(lambda stage: stage[0](torch.ones(1, device="cpu")))
        else:
            pipe.train_step(*batch)
        assert set(Probe.notes) == {expected}
        Probe.notes.clear()


def test_two_pipelines_of_different_settings_train_as_in_one_process() -> None:
    layers = [rp.LayerSpec(nn.Linear, 12, 12), rp.LayerSpec(nn.Linear, 12, 4)]
    single, single_loop = pipe_of(layers), Natural(rp.layers.Sequential(layers), sgd, cross_entropy, 2)
    torch.set_default_dtype(torch.float64)
    double, double_loop = pipe_of(layers), Natural(rp.layers.Sequential(layers), sgd, cross_entropy, 2)
    assert double.state_dict()["0.weight"].dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    data = list(batches(2))
    for _ in range(2):
        assert_same_run(single, single_loop, iter(data))
        for x, y in data:  # the norm is computed in float32
            assert double.train_step(x.double(), y).loss == double_loop.train_step(x.double(), y)
        assert_same_weights(double, double_loop.model)


def test_settings_that_a_call_has_changed_on_a_worker_are_the_pipelines_in_the_next_step() -> None:
    layers = [nn.Linear(12, 4), rp.LayerSpec(Probe, torch.get_default_dtype)]
    pipe, batch = pipe_of(layers), next(batches(1))
    pipe.stages[1].call(lambda _: torch.set_default_dtype(torch.float64))
    Probe.notes.clear()
    pipe.train_step(*batch)
    assert set(Probe.notes) == {torch.float32}
