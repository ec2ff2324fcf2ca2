"""Spares that take dead workers' places, and workers that are added and removed."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from typing import Any

import psutil
import pytest

import rpcpipe as rp
from support.faults import wait_for
from support.models import batches, cross_entropy, mlp, sgd
from support.oracle import Oracle, assert_same_weights
from support.replacement import kill, pids, train_and_compare


def test_a_spare_takes_a_dead_workers_place() -> None:
    with rp.launch(workers=2, threads=1, timeout=20.0, spares=2) as cluster:
        first, second = cluster.spares
        kill(cluster, 1)
        (successor,) = cluster.replace()
        assert (successor.name, successor.rank, successor.pid) == ("worker1", 2, first.pid)
        assert cluster.spares == (second,)
        assert cluster.events[-1].kind == "spare used"
        train_and_compare(cluster)
        os.kill(second.pid, signal.SIGKILL)  # a dead spare is not taken
        wait_for(lambda: cluster.events[-1].worker == second.name)
        kill(cluster, 0)
        (another,) = cluster.replace()
        assert another.pid not in (first.pid, second.pid)
        assert cluster.spares == ()
        train_and_compare(cluster)
        assert pids(cluster) == [another.pid, successor.pid]


def test_workers_are_added_and_removed(trio: rp.Cluster) -> None:
    before = pids(trio)
    added = trio.add_workers(2)
    assert [(worker.name, worker.rank) for worker in added] == [("worker3", 4), ("worker4", 5)]
    assert pids(trio) == [*before, *(worker.pid for worker in added)]
    train_and_compare(trio)
    trio.remove_workers("worker1", added[0])
    with pytest.raises(rp.WorkerLost, match="was removed on request"):
        trio.transport.call("worker1", "progress").result(5)
    trio.transport.send("worker1", "cancel", "no pipeline", 1, 0, 0)  # as any to the dead: nothing happens
    assert [worker.name for worker in trio.workers] == ["worker0", "worker2", "worker4"]
    assert not psutil.pid_exists(before[1])
    assert trio.healthy
    train_and_compare(trio)
    kill(trio, 1)
    trio.replace()
    assert [worker.name for worker in trio.add_workers()] == ["worker5"]
    train_and_compare(trio)


def test_a_pipeline_goes_on_over_its_workers_while_others_come_and_go(trio: rp.Cluster) -> None:
    oracle = Oracle(mlp(), sgd, cross_entropy, 4)
    with closing(rp.Pipeline(mlp(), trio, loss=cross_entropy, optimizer=sgd, chunks=4)) as pipe:
        for number, (inputs, targets) in enumerate(batches(4)):
            if number == 1:
                trio.add_workers()
            if number == 3:
                trio.remove_workers("worker3")
            assert pipe.train_step(inputs, targets).loss == oracle.train_step(inputs, targets)
        assert_same_weights(pipe, oracle.model)
        with pytest.raises(rp.StateError, match="worker1 holds stages 1"):
            trio.remove_workers("worker1")
    with pytest.raises(rp.StateError, match="at least one"):
        trio.remove_workers("worker0", "worker1", "worker2")


def test_workers_that_cannot_be_added_leave_the_cluster_as_it_was(trio: rp.Cluster, struck: list[Any]) -> None:
    struck += [lambda one: os.kill(one.pid, signal.SIGKILL)] * 3
    with pytest.raises(rp.WorkerLost, match="worker3 could not be added"):
        trio.add_workers()
    assert (len(trio.workers), trio.healthy) == (3, True)
    train_and_compare(trio)
    assert len(trio.add_workers()) == 1


def test_a_cluster_that_has_been_resized_is_not_launched_alike(trio: rp.Cluster) -> None:
    assert rp.launch(workers=3, threads=1, timeout=20.0, heal=False) is trio
    trio.remove_workers(trio.workers[0])
    assert rp.launch(workers=3, threads=1, timeout=20.0, heal=False) is not trio


@pytest.mark.parametrize(("given", "kept"), [(True, 3), (False, 0), (0, 0), (7, 7), ("shrink", 3)])
def test_how_often_a_step_is_tried_again(given: Any, kept: int) -> None:
    with rp.launch(workers=1, threads=1, timeout=20.0, heal=given) as cluster:
        assert cluster.heal == kept


@pytest.mark.parametrize("given", [-1, 1.5, "yes", ""])
def test_a_heal_that_is_no_number_of_tries_is_refused(given: Any) -> None:
    with pytest.raises(rp.ArgumentError, match="heal"):
        rp.launch(workers=1, heal=given)
