"""What layers cost, and the cuts made of it."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.layers import named_layers
from rpcpipe.planning.partition import Fits, balance
from rpcpipe.stage.profiler import profile


class Slow(nn.Module):
    """Takes ``rounds`` products of its 64 × 64 weight."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(64))
        self.rounds = rounds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.rounds):
            x = x @ self.weight
        return x


def test_a_layers_figures() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 8, bias=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(16, 32)
    found = profile(named_layers(model), x)
    assert [layer.parameter_bytes for layer in found] == [4 * 64 * 33, 0, 4 * 128, 4 * 64 * 8]
    assert [layer.output_bytes for layer in found] == [4 * 16 * 64] * 3 + [4 * 16 * 8]
    assert [found[at].activation_bytes for at in (0, 1, 3)] == [4 * 16 * 32, 4 * 16 * 64, 4 * 16 * 64]
    assert all(layer.forward > 0 for layer in found)
    # The sample and the model, its statistics included, are as they were.
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_time_follows_the_work() -> None:
    layers = [rp.LayerSpec(Slow, rounds) for rounds in (2, 40, 2, 2, 2, 40)]
    found = profile(named_layers(layers), torch.randn(256, 64))
    slow, fast = (min, max)
    assert slow(found[at].seconds for at in (1, 5)) > 4 * fast(found[at].seconds for at in (0, 2, 3, 4))
    assert rp.balance_by_time(layers, 2, torch.randn(256, 64))[0] in (2, 3, 4, 5)


def test_memory_counts_parameters_and_activations() -> None:
    wide = [nn.Linear(8, 8), nn.Linear(8, 1000), nn.Linear(1000, 8), nn.Linear(8, 8)]
    assert rp.balance_by_memory(nn.Sequential(*wide), 2, torch.randn(4, 8)) == [2, 2]
    assert rp.balance_by_parameters(nn.Sequential(*wide), 2) == [2, 2]
    # Few parameters and many activations: only the measured cut sees them.
    narrow = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Tanh())
    assert rp.balance_by_memory(narrow, 2, torch.randn(4096, 8)) == [3, 3]
    assert rp.balance_by_parameters(narrow, 2)[0] == 1


def cuts(layers: int, stages: int) -> itertools.chain[list[int]]:
    borders = itertools.combinations(range(1, layers), stages - 1)
    return itertools.chain([[b - a for a, b in itertools.pairwise((0, *ends, layers))] for ends in borders])


def test_the_cheapest_of_the_best_cuts() -> None:
    """Equals brute force on 1,000 random cases: least maximum first, then least communication, then evenness."""
    draw = random.Random(0)
    for _ in range(1000):
        layers = draw.randint(1, 9)
        stages = draw.randint(1, layers)
        costs = [draw.randint(0, 9) for _ in range(layers)]
        sends = [draw.randint(0, 9) for _ in range(layers)]

        def judged(sizes: list[int], costs: list[int] = costs, sends: list[int] = sends) -> tuple[int, ...]:
            ends = [0, *itertools.accumulate(sizes)]
            loads = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            return max(loads), sum(sends[end - 1] for end in ends[1:-1]), sum(load**2 for load in loads)

        found = balance(costs, stages, sends)
        assert len(found) == stages
        assert min(found) >= 1
        assert judged(found) == min(judged(sizes) for sizes in cuts(layers, stages))


def test_the_best_of_the_cuts_that_fit() -> None:
    """Equals brute force on 1,000 random cases with a limit of its own for every stage."""
    draw = random.Random(2)
    refused = 0
    for _ in range(1000):
        layers = draw.randint(1, 9)
        stages = draw.randint(1, layers)
        costs, sizes, sends = ([draw.randint(0, 9) for _ in range(layers)] for _ in range(3))
        limits = [draw.randint(0, 30) for _ in range(stages)]

        def fits(stage: int, start: int, stop: int, sizes: list[int] = sizes, limits: list[int] = limits) -> bool:
            return sum(sizes[start:stop]) <= limits[stage]

        def judged(cut: list[int], costs: list[int] = costs, sends: list[int] = sends) -> tuple[int, ...]:
            ends = [0, *itertools.accumulate(cut)]
            loads = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            return max(loads), sum(sends[end - 1] for end in ends[1:-1]), sum(load**2 for load in loads)

        def allowed(cut: list[int], fits: Fits = fits) -> bool:
            ends = [0, *itertools.accumulate(cut)]
            return all(fits(stage, a, b) for stage, (a, b) in enumerate(itertools.pairwise(ends)))

        possible = [cut for cut in cuts(layers, stages) if allowed(cut)]
        if possible:
            found = balance(costs, stages, sends, fits)
            assert allowed(found)
            assert judged(found) == min(map(judged, possible))
            assert judged(balance(costs, stages, fits=fits))[0] == judged(found)[0]
        else:
            refused += 1
            with pytest.raises(rp.PartitionError, match="fits"):
                balance(costs, stages, sends, fits)
    assert 100 < refused < 900


def test_ten_thousand_layers_in_a_second() -> None:
    draw = random.Random(1)
    costs = [draw.random() for _ in range(10_000)]
    start = time.perf_counter()
    sizes = balance(costs, 64, costs)
    assert time.perf_counter() - start < 2  # 0.14 s where nothing else runs
    assert sum(sizes) == 10_000
    assert balance([1.0] * 22, 8, [1.0] * 22) and max(balance([1.0] * 22, 8, [1.0] * 22)) == 3  # noqa: PT018


def test_what_a_layer_has_at_once_and_what_its_optimizer_keeps() -> None:
    """By hand, for a product whose output is squared: 16 × 64 values each, and gradients of 32 × 64 weights."""
    x, kept = torch.randn(16, 32, requires_grad=True), 4 * 16 * 64

    class Squared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 2

    for optimizer, moments in ((torch.optim.AdamW, 2), (torch.optim.SGD, 0)):
        [cost] = profile(named_layers([Squared(32, 64, bias=False)]), x, optimizer=lambda ps: optimizer(ps, lr=0.1))  # noqa: B023
        assert cost.state_bytes is not None
        assert 0 <= cost.state_bytes - moments * cost.parameter_bytes <= 8  # Adam's step
        # The product, its square and the gradient of it, and what the power's derivative makes of them.
        assert 3 * kept <= cost.peak_bytes - 4 * 16 * 32 <= 5 * kept + cost.parameter_bytes


def test_autocast_keeps_half_of_the_activations_and_the_weights_cast() -> None:
    layers, x = named_layers([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)]), torch.randn(256, 64)
    single, half = (profile(layers, x, autocast=dtype)[1] for dtype in (None, torch.bfloat16))
    assert single.activation_bytes == 4 * 256 * 64
    assert half.activation_bytes == 2 * 256 * 64 + 2 * 64 * 64
    assert half.output_bytes == single.output_bytes // 2
