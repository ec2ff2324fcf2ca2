"""Layers of random cost, for the tests that search for a plan or estimate one."""

from __future__ import annotations

import random

from rpcpipe.planning import LayerCost


def layer(source: random.Random, name: str) -> LayerCost:
    forward, inputs, weights = (source.uniform(0.1, 2.0) for _ in range(3))
    return LayerCost(
        name,
        forward,
        backward=(inputs + weights) * source.uniform(0.7, 1.1),
        input_gradient=inputs,
        weight_gradient=weights,
        activation_bytes=source.randrange(10, 100),
        parameter_bytes=source.randrange(0, 30),
        output_bytes=source.randrange(1, 20),
        update=source.uniform(0.0, 0.1),
    )
