"""What dies, hangs or is stopped is replaced in the live cluster, whose other workers go on."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psutil
import pytest
import torch.distributed.autograd as dist_autograd

import rpcpipe as rp
from rpcpipe.cluster.process import WorkerProcess
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import Roster
from rpcpipe.transport.rpc import RpcTransport, this_process
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.operations import ReportStep, Task
from support.faults import wait_for
from support.models import batches, cross_entropy, mlp, sgd
from support.replacement import counts, kill, pids, train_and_compare
from support.strangers import lose_listener

_HELD: list[int] = []


def hold(value: int) -> None:
    """Runs on a worker: state that only this process has."""
    _HELD.append(value)


def held() -> list[int]:
    return _HELD


def by_sigkill(cluster: rp.Cluster, index: int) -> None:
    kill(cluster, index)


def by_sigstop(cluster: rp.Cluster, index: int) -> None:
    os.kill(cluster.workers[index].pid, signal.SIGSTOP)
    wait_for(lambda: not cluster.healthy)


def by_exit(cluster: rp.Cluster, index: int) -> None:
    with pytest.raises(rp.WorkerLost, match="exited with status 3"):
        cluster.call(cluster.workers[index], os._exit, 3)


def by_hanging(cluster: rp.Cluster, index: int) -> None:
    """A call that does not let go of the GIL."""
    with pytest.raises(rp.WorkerLost, match="no sign of life"):
        cluster.call(cluster.workers[index], hang)


def hang() -> None:
    ctypes.PyDLL(None).sleep(30)


@pytest.mark.parametrize("strike", [by_sigkill, by_sigstop, by_exit, by_hanging])
def test_a_lost_worker_is_replaced(
    trio: rp.Cluster, strike: Callable[[rp.Cluster, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    old = trio.workers
    for worker in old:
        trio.call(worker, hold, worker.rank)
    strike(trio, 1)
    lost = old[1]
    with pytest.raises(rp.WorkerLost, match="worker1"):
        trio.check()
    with caplog.at_level(logging.WARNING, "rpcpipe"):
        (successor,) = trio.replace()
    assert (successor.name, successor.rank, successor.device) == (lost.name, lost.rank, lost.device)
    assert trio.workers == (old[0], successor, old[2])
    assert pids(trio) == [old[0].pid, successor.pid, old[2].pid]
    assert successor.pid != lost.pid
    assert not psutil.pid_exists(lost.pid)
    assert [trio.call(worker, held) for worker in trio.workers] == [[1], [], [3]]
    assert trio.healthy
    assert f":{successor.pid} " in repr(trio)
    assert "worker1 (" in caplog.text
    assert f":{successor.pid}) took its place within" in caplog.text
    died, replaced = trio.events
    assert (died.kind, died.pid) == ("silent" if strike in (by_sigstop, by_hanging) else "died", lost.pid)
    assert (replaced.kind, replaced.worker, replaced.pid) == ("replaced", "worker1", successor.pid)
    assert replaced.seconds is not None
    assert trio.replace() == ()


def test_a_worker_is_replaced_on_request(trio: rp.Cluster) -> None:
    old = trio.workers[2]
    (new,) = trio.replace("worker2")
    assert pids(trio)[2] == new.pid != old.pid


def test_all_workers_at_once(trio: rp.Cluster) -> None:
    old = pids(trio)
    kill(trio, 0, 1, 2)
    assert len(trio.replace()) == 3
    assert set(pids(trio)).isdisjoint(old)
    train_and_compare(trio)


def test_the_template_goes_and_all_workers_with_it(trio: rp.Cluster) -> None:
    (template,) = {psutil.Process(worker.pid).ppid() for worker in trio.workers}
    os.kill(template, signal.SIGKILL)
    wait_for(lambda: len(trio.events) == 3)
    assert len(trio.replace()) == 3
    assert len(set(pids(trio))) == 3


def lanes() -> dict[str, bool]:
    """Runs on a worker: whether a lane leads to each process."""
    assert this_process.served is not None
    roster, executor = this_process.served
    return {name: executor._transport.is_near(name) for name in roster.seats}  # type: ignore[attr-defined]


@pytest.mark.parametrize("index", range(3))
def test_a_pipeline_on_survivors_and_successor_trains_with_one_process_bits(trio: rp.Cluster, index: int) -> None:
    train_and_compare(trio)
    kill(trio, index)
    (successor,) = trio.replace()
    train_and_compare(trio, 4)
    for worker in trio.workers:
        near = trio.call(worker, lanes)
        assert near == dict.fromkeys([DRIVER, "worker0", "worker1", "worker2"], True)
    assert trio.transport.is_near(successor.name)


def test_calls_under_way_to_the_dead_fail_and_later_ones_reach_the_successor(trio: rp.Cluster) -> None:
    waiting = trio.transport.call("worker1", "run", named_dumps((time.sleep, (30,)), "sleep"))
    kill(trio, 1)
    for reply in (waiting, trio.transport.call("worker1", "progress")):
        with pytest.raises(rp.WorkerLost):
            reply.result(5)
    trio.replace()
    assert trio.transport.call("worker1", "progress").result(5)[0] == 0


def test_tasks_by_lane_to_the_dead_fail_however_far_they_came_and_later_ones_reach_the_successor(
    trio: rp.Cluster,
) -> None:
    def submit() -> Future[Any]:
        return trio.transport.call("worker1", "submit", "no such pipeline", 0, 0, [Task(ReportStep())])

    first = submit()
    assert trio.transport.is_near("worker1")
    assert trio.transport.wait([first], 5.0)[0] == {first}
    answered = submit()  # and nobody waits, so its answer stays in the lane
    trio.transport.call("worker1", "run", named_dumps((os.getpid, ()), "getpid")).result(5)
    os.kill(trio.workers[1].pid, signal.SIGSTOP)
    unread = submit()
    wait_for(lambda: not trio.healthy)
    for reply in (answered, unread):
        with pytest.raises(rp.WorkerLost):
            reply.result(0)
    trio.replace()
    later = [submit() for _ in range(3)]
    for reply in later:
        assert trio.transport.wait([reply], 5.0)[0] == {reply}
        assert reply.result(0).cancelled  # as it knows no such pipeline
    train_and_compare(trio)


def test_another_worker_dies_while_one_is_replaced(trio: rp.Cluster, struck: list[Any]) -> None:
    kill(trio, 0)
    struck.append(lambda successor: os.kill(trio.workers[2].pid, signal.SIGKILL))
    assert [worker.name for worker in trio.replace()] == ["worker0", "worker2"]
    train_and_compare(trio)


def test_another_worker_is_stopped_while_one_is_replaced(trio: rp.Cluster, struck: list[Any]) -> None:
    trio.call(3, os.getpid)
    wait_for(lambda: "not reported yet" not in repr(trio))  # only who has beaten falls silent
    kill(trio, 0)
    struck.append(lambda successor: os.kill(trio.workers[2].pid, signal.SIGSTOP))
    assert [worker.name for worker in trio.replace()] == ["worker0", "worker2"]
    assert len(set(pids(trio))) == 3


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_successor_that_dies_or_is_stopped_as_it_joins_is_replaced(
    trio: rp.Cluster, struck: list[Any], sign: signal.Signals
) -> None:
    kill(trio, 0)
    struck.append(lambda successor: os.kill(successor.pid, sign))
    assert [worker.name for worker in trio.replace()] == ["worker0"]
    assert [event.worker for event in trio.events] == ["worker0"] * 3
    assert len(set(pids(trio))) == 3


def test_successors_that_all_die_give_up_with_every_cause(trio: rp.Cluster, struck: list[Any]) -> None:
    kill(trio, 0)
    victims: list[int] = []

    def strike(successor: WorkerProcess) -> None:
        victims.append(successor.pid)
        os.kill(successor.pid, signal.SIGKILL)

    struck += [strike] * 3
    with pytest.raises(rp.WorkerLost, match="worker0 could not be replaced") as caught:
        trio.replace()
    assert len(victims) == 3
    assert all(f":{pid}) was killed by SIGKILL" in str(caught.value) for pid in victims)
    assert caught.value.worker == "worker0"
    with pytest.raises(rp.WorkerLost):
        trio.call("worker0", os.getpid)
    assert [worker.name for worker in trio.replace()] == ["worker0"]
    train_and_compare(trio)


def test_a_process_that_dies_as_it_connects_costs_whom_it_connects_to(trio: rp.Cluster) -> None:
    """torch's listener closes for good then; a worker whose listener is closed is replaced, too."""
    lose_listener(trio, "worker2")
    kill(trio, 0)
    assert [worker.name for worker in trio.replace()] == ["worker0", "worker2"]
    assert any("takes no connections any more" in event.how for event in trio.events)
    train_and_compare(trio)


def test_an_interrupted_replacement_can_be_made_again(trio: rp.Cluster, struck: list[Any]) -> None:
    kill(trio, 1)

    def interrupt(successor: WorkerProcess) -> None:
        raise KeyboardInterrupt

    struck.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trio.replace()
    with pytest.raises(rp.WorkerLost):
        trio.check()
    assert [worker.name for worker in trio.replace()] == ["worker1"]
    train_and_compare(trio)


def test_fifty_replacements_leave_nothing_behind(trio: rp.Cluster) -> None:
    def replace_next(number: int) -> float:
        index = number % 2  # the third worker survives all
        begun = time.perf_counter()
        kill(trio, index)
        trio.replace()
        trio.call(trio.workers[index], os.getpid)
        return time.perf_counter() - begun

    def state() -> Any:
        children = sorted(one.name() for one in psutil.Process().children(recursive=True))
        return counts(), trio.call("worker2", counts), children

    for number in range(6):
        replace_next(number)
    settled: list[Any] = []

    def is_settled() -> bool:
        settled.append(state())
        return len(settled) > 1 and settled[-1] == settled[-2]

    wait_for(is_settled)
    before, memory = settled[-1], psutil.Process().memory_info().rss
    taken = [replace_next(number) for number in range(50)]
    wait_for(lambda: state() == before)
    assert psutil.Process().memory_info().rss - memory < 8 << 20
    assert max(taken) < 2.0
    train_and_compare(trio)


def contexts() -> int:
    return int(dist_autograd._get_debug_info()["num_autograd_contexts"])  # type: ignore[attr-defined]


def test_a_context_that_was_open_with_the_dead_is_left_by_the_others(trio: rp.Cluster) -> None:
    x, y = next(batches(1))

    def gradients(pipe: rp.Pipeline, strike: Callable[[], None] = lambda: None) -> None:
        with dist_autograd.context() as context_id:
            value: Any = x
            for stage in pipe.stages:
                value = stage.forward(value)
            loss = cross_entropy(value.to_here(), y)
            strike()
            dist_autograd.backward(context_id, [loss])  # type: ignore[attr-defined]

    first = rp.Pipeline(mlp(6, dropout=0.0), trio, loss=cross_entropy, optimizer=sgd, balance=[2, 2, 2])
    with pytest.raises(RuntimeError):
        gradients(first, lambda: kill(trio, 1))
    trio.replace()
    second = rp.Pipeline(mlp(6, dropout=0.0), trio, loss=cross_entropy, optimizer=sgd, balance=[2, 2, 2])
    for _ in range(2):
        gradients(second)
    second.close()
    assert contexts() == 0
    for worker in trio.workers:
        wait_for(lambda worker=worker: trio.call(worker, contexts) == 0)  # type: ignore[misc]
    train_and_compare(trio)


def test_what_the_successor_prints_has_its_label_and_is_its_own_last_word(
    trio: rp.Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    trio.call("worker1", print, "words of the first")
    kill(trio, 1)
    (successor,) = trio.replace()
    trio.call("worker1", print, "words of the second")
    seen: list[str] = []

    def is_printed() -> bool:
        seen.append(capfd.readouterr().out)
        return "words of the second" in "".join(seen)

    wait_for(is_printed)
    assert f":{successor.pid}] words of the second" in "".join(seen)
    kill(trio, 1)
    with pytest.raises(rp.WorkerLost) as caught:
        trio.check()
    assert "words of the second" in str(caught.value)
    assert "words of the first" not in str(caught.value)


def test_a_successor_is_watched_like_any_worker(trio: rp.Cluster) -> None:
    kill(trio, 1)
    (successor,) = trio.replace()
    wait_for(lambda: "not reported yet" not in repr(trio))
    os.kill(successor.pid, signal.SIGSTOP)
    wait_for(lambda: not trio.healthy)
    assert trio.events[-1].kind == "silent"


def test_a_closed_cluster_replaces_nothing() -> None:
    cluster = rp.launch(workers=1, threads=1, timeout=20.0)
    cluster.close()
    with pytest.raises(rp.StateError, match="closed"):
        cluster.replace()


def test_what_survivors_and_the_dead_have_sent_late_reaches_nobody(trio: rp.Cluster) -> None:
    before = trio.transport.roster
    dead, (own, wires) = dict(before.seats), (before.generation, before.seats["worker2"])
    kill(trio, 1)
    trio.replace()
    after = trio.transport.roster.seats
    of_the_dead = Roster(own, "worker1", dead)  # this process sends what the dead one might have
    assert after["worker2"] == wires
    assert RpcTransport(of_the_dead).call("worker2", "clock").result(5) is None
    meant_for_the_dead = Roster(own, DRIVER, dead)
    meant_for_the_dead.seats = after
    assert RpcTransport(meant_for_the_dead).call("worker1", "clock").result(5) is None
    assert isinstance(trio.transport.call("worker1", "clock").result(5), int)
