from __future__ import annotations

import itertools

import torch

from rpcpipe.model import rng


def test_seeds_are_a_function_of_all_four() -> None:
    seeds = {rng.derive(*parts) for parts in itertools.product(range(5), repeat=4)}
    assert len(seeds) == 5**4
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert rng.derive(1, 2) != rng.derive(2, 1)
    assert rng.derive(-1, 2) != rng.derive(1, 2)


def test_the_same_place_draws_the_same_numbers() -> None:
    draws = []
    for layer in (0, 1, 0):
        rng.seed_layer(3, 4, 5, layer)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    rng.seed_init(3, 0)
    assert not torch.equal(draws[0], torch.rand(4))
