from __future__ import annotations

import itertools
import random
import time

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


def test_equal_layers() -> None:
    assert max(balance([1.0] * 22, 8)) == 3


def test_large() -> None:
    random.seed(1)
    start = time.process_time()
    assert sum(balance([random.random() for _ in range(10_000)], 64)) == 10_000
    assert time.process_time() - start < 1


def test_what_cannot_be_cut_is_refused_with_the_values() -> None:
    with pytest.raises(rp.PartitionError, match="cannot cut 2 layers into 3 stages"):
        balance([1, 1], 3)
    for given in ([1, 2], [0, 4], [4], [1, 2, 2]):
        with pytest.raises(rp.PartitionError, match="must have 2 entries"):
            check_balance(given, 4, 2)
    assert check_balance([1, 3], 4, 2) == [1, 3]
