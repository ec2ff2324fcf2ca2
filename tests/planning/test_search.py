"""The search finds what trying everything finds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from rpcpipe import schedules
from rpcpipe.errors import ScheduleError
from rpcpipe.planning import CostModel, Search
from rpcpipe.planning.cost_model import SIMPLEST, Candidate, Estimate
from rpcpipe.planning.machine import Machine
from rpcpipe.planning.overheads import Overheads
from rpcpipe.planning.search import CHECKPOINTS, VIRTUAL
from support.layer_costs import layer
from support.seeds import some


def case(seed: int) -> Search:
    source = random.Random(seed)
    layers, workers = source.randrange(2, 7), source.randrange(1, 5)
    batch = source.randrange(1, 7)
    sizes = sorted(source.sample(range(1, batch + 1), min(2, batch)))
    machine = Machine(
        workers,
        memory=source.choice([math.inf, source.uniform(300, 1500)]),
        latency=source.choice([0.0, 0.05]),
        bandwidth=source.choice([math.inf, 100.0]),
        cores=source.choice([None, None, 2]),
        overheads=source.choice([Overheads(), Overheads(1.0, 0.02, 0.05, 0.01, 0.02, 0.001)]),
    )
    layer_costs = {size: [layer(source, str(at)) for at in range(layers)] for size in sizes}
    layouts = [(workers // count, count) for count in (1, 2, 3) if workers % count == 0]
    return Search(CostModel(layer_costs, machine, input_bytes=source.randrange(20)), batch, layouts=layouts)


def everything(search: Search) -> Iterator[Estimate]:
    """All candidates with all cuts, without a bound and without the search's own enumeration."""
    layers = search.layers
    for (workers, replicas), size, name, virtual, checkpoint, sharded in itertools.product(
        search.layouts, search.cost_model.layer_costs, SIMPLEST, (1, *VIRTUAL), CHECKPOINTS, (False, True)
    ):
        share = math.ceil(search.batch / replicas)
        chunks = math.ceil(share / size)
        try:
            schedule = schedules.get(name, workers, chunks, virtual)
        except ScheduleError:
            continue
        if size > share or (sharded and replicas == 1):
            continue  # a profile of more samples than a replica has; nothing to share
        if virtual == 1 and schedule.stages > workers:
            virtual = 2  # a V says so by itself
        for ends in itertools.combinations(range(1, layers), schedule.stages - 1):
            balance = [b - a for a, b in itertools.pairwise((0, *ends, layers))]
            found = search.cost_model.estimate(
                Candidate(
                    schedule=name, depth=workers, replicas=replicas, virtual_stages=virtual, micro_batch=size,
                    chunks=chunks, checkpoint=checkpoint, sharded=sharded,
                ),
                balance,
            )  # fmt: skip
            if max(found.memory) <= search.machine.memory:
                yield found


@pytest.mark.parametrize("seed", some(range(200), 50))
def test_nothing_is_faster_than_what_is_found(seed: int) -> None:
    search = case(seed)
    fastest = min((estimate.seconds for estimate in everything(search)), default=None)
    found = search.best()
    assert search.exact
    if fastest is None:
        assert found is None
    else:
        assert found is not None
        assert found.seconds <= fastest * (1 + 1e-9)
        assert max(found.memory) <= search.machine.memory


def test_the_bounds_never_exceed_what_is_simulated() -> None:
    tight = 0
    for seed in range(40):
        search = case(seed)
        for estimate in itertools.islice(everything(search), 200):
            ends = [0, *itertools.accumulate(estimate.balance)]
            of_cut, of_all = search._bound_of_cut(estimate.candidate, ends), search.bound(estimate.candidate)
            assert max(of_cut, of_all) <= estimate.seconds * (1 + 1e-9)
            tight += of_cut > 0.8 * estimate.seconds
    assert tight > 100  # they are worth having
