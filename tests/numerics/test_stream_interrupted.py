"""Other calls while a stream is open: each flushes it and sees one version of the weights on all stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rpcpipe as rp
from rpcpipe.driver import StreamResult
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Versioned, assert_same_weights, train
from support.stream import SIZES, pipeline


def test_evaluation_and_the_rest_see_one_consistent_version() -> None:
    """Each drains the stream, which goes on from there as after a flush."""
    pipe = pipeline(3, "stash")
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    fed: list[int] = []

    def counted() -> Iterator[Any]:
        for number, batch in enumerate(batches(24)):
            fed.append(number)
            yield batch

    flushed = []
    for result in pipe.train(counted()):
        if result.step == 7:
            loss = pipe.evaluate(batches(2))
            flushed.append(len(fed))
            assert pipe.trained == len(fed)
            state = {name: value.clone() for name, value in pipe.state_dict().items()}
    k = 0
    for number, (x, y) in enumerate(batches(24)):
        if number in flushed:
            model = mlp().eval()
            model.load_state_dict(state)
            expected = sum(cross_entropy(model(x2), y2).item() for x2, y2 in batches(2)) / 2
            assert loss == pytest.approx(expected, rel=1e-6)
            for name, value in oracle.model.state_dict().items():
                assert torch.equal(state[name], value)
            oracle.flush()
            k = 0
        k += 1
        oracle.step([(x, y, 1.0)], [max(0, k - (2 - r) - 1) for r in range(3)])
    assert flushed
    assert_same_weights(pipe, oracle.model)


def test_leaving_the_loop_finishes_what_was_fed() -> None:
    pipe = pipeline(3, "stash")
    for result in pipe.train(batches(30)):
        if result.step == 4:
            break
    assert pipe.trained == 10  # 5 results and the 5 batches fed ahead
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    train(oracle, batches(10), "stash", 3, 1)
    assert_same_weights(pipe, oracle.model)


def test_a_single_step_flushes_and_a_synchronous_schedule_takes_over() -> None:
    pipe = pipeline(2, "stash", chunks=2)
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[2])
    x, y = next(batches(1))
    assert pipe.train_step(x, y).loss == train(oracle, [(x, y)], "stash", 2, 2)[0]
    assert_same_weights(pipe, oracle.model)
    pipe.schedule = "1f1b"
    assert not isinstance(pipe.train_step(x, y), StreamResult)
    pipe.schedule = "pipedream"
    result = pipe.train_step(x, y)
    assert isinstance(result, StreamResult)
    assert result.versions
    with pytest.raises(rp.ScheduleError, match="needs a synchronous schedule"):
        pipe.step()


def test_a_schedule_that_becomes_synchronous_ends_the_loop() -> None:
    pipe = pipeline(2, "stash")
    results = pipe.train(batches(20))
    next(results)
    pipe.schedule = "gpipe"
    with pytest.raises(rp.ScheduleError, match="has become 'gpipe', which does not stream"):
        list(results)
    assert pipe.train_step(*next(batches(1))).step == pipe.trained - 1


def test_closing_the_pipeline_in_the_loop_ends_it() -> None:
    pipe = pipeline(2, "stash")
    for result in pipe.train(batches(20)):
        if result.step == 3:
            pipe.close()
            break
    with pytest.raises(rp.StateError, match="the pipeline is closed"):
        pipe.state_dict()


def test_a_batch_of_too_few_micro_batches_flushes_2bw() -> None:
    pipe = pipeline(3, "2bw")
    oracle = Versioned(mlp(), sgd, cross_entropy, SIZES[3])
    sizes = [10, 10, 2, 10, 10, 10]
    data = [(x[:size], y[:size]) for size, (x, y) in zip(sizes, batches(6), strict=True)]
    losses = [result.loss for result in pipe.train(data)]
    expected = train(oracle, data[:3], "2bw", 3, 4)
    oracle.flush()
    assert losses == expected + train(oracle, data[3:], "2bw", 3, 4)
    assert_same_weights(pipe, oracle.model)
