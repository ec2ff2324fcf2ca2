from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

import rpcpipe as rp
from rpcpipe.planning.partition import balance, check_balance


def largest(costs: list[float], sizes: list[int]) -> float:
    ends = list(itertools.accumulate(sizes))
    return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *ends]))


def brute_force(costs: list[float], stages: int) -> float:
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    return min(largest(costs, [b - a for a, b in itertools.pairwise([0, *cut, len(costs)])]) for cut in cuts)


def test_equals_brute_force() -> None:
    random.seed(0)
    for _ in range(2000):
        costs = [random.choice([0, 1, 2, 3.5, 7, random.random()]) for _ in range(random.randint(1, 8))]
        stages = random.randint(1, len(costs))
        sizes = balance(costs, stages)
        assert len(sizes) == stages
        assert sum(sizes) == len(costs)
        assert min(sizes) >= 1
        assert largest(costs, sizes) == pytest.approx(brute_force(costs, stages), abs=1e-9)


def judged(costs: Sequence[float], sizes: list[int]) -> tuple[Any, ...]:
    """Least maximum, then most even, then the shortest last stages: the smaller the better."""
    loads = [sum(costs[a:b]) for a, b in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    return max(loads), sum(load**2 for load in loads), sizes[::-1]


def test_the_most_even_of_the_best_cuts() -> None:
    """Equals brute force on 2,000 random cases of whole numbers, zeros and equal layers among them."""
    draw = random.Random(3)
    for case in range(2000):
        layers = draw.randint(1, 10)
        stages = draw.randint(1, layers)
        costs = [draw.randint(0, (1, 3, 9, 10**12)[case % 4]) for _ in range(layers - 1)] + [1]
        borders = itertools.combinations(range(1, layers), stages - 1)
        cuts = [[b - a for a, b in itertools.pairwise((0, *ends, layers))] for ends in borders]
        assert balance(costs, stages) == min(cuts, key=lambda cut, costs=costs: judged(costs, cut))


@pytest.mark.parametrize("cost", [0, 0.0, 1, 1.0, 0.1, 1 / 3, 1e-300, 1e300, 7e6, 10**22, 2**70 + 1])
def test_equal_layers_are_cut_evenly_whatever_they_cost(cost: float) -> None:
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            size, longer = divmod(layers, stages)
            assert balance([cost] * layers, stages) == [size + 1] * longer + [size] * (stages - longer)


def test_communication_comes_before_evenness_and_evenness_breaks_its_ties() -> None:
    assert balance([1] * 10, 4) == [3, 3, 2, 2]
    assert balance([1] * 10, 4, communication=[5] * 10) == [3, 3, 2, 2]
    assert balance([1] * 10, 4, communication=[9, 0, 9, 9, 0, 9, 9, 0, 9, 9]) == [2, 3, 3, 2]
    assert balance([1] * 10, 4, communication=[0, 9, 9, 0, 9, 9, 0, 9, 9, 9]) == [1, 3, 3, 3]


def test_large() -> None:
    random.seed(1)
    start = time.process_time()
    assert sum(balance([random.random() for _ in range(10_000)], 64)) == 10_000
    assert time.process_time() - start < 0.5


def test_large_with_a_layer_that_costs_as_much_as_many_stages() -> None:
    start = time.process_time()
    sizes = balance([1.0] * 2_000 + [500.0] + [1.0] * 2_000, 32)
    assert sorted(sizes)[:2] == [1, 125]
    assert max(sizes) == 134
    assert time.process_time() - start < 3


def test_what_cannot_be_cut_is_refused_with_the_values() -> None:
    with pytest.raises(rp.PartitionError, match="cannot cut 2 layers into 3 stages"):
        balance([1, 1], 3)
    for given in ([1, 2], [0, 4], [4], [1, 2, 2]):
        with pytest.raises(rp.PartitionError, match="must have 2 entries"):
            check_balance(given, 4, 2)
    assert check_balance([1, 3], 4, 2) == [1, 3]
