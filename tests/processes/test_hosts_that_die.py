"""A rank's agent or host dies: a spare takes its worker's place, or a process of the driver's host; ranks join."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import rpcpipe as rp
from support import network_namespaces as networks
from support.faults import ended, wait_for
from support.ranks import SECRET, popen, ranks, worker_of


def agents(cluster: rp.Cluster) -> dict[str, int]:
    """By worker the rank of its agent."""
    return {name: int(domain.partition("#")[2]) for name, domain in cluster.hosts().items()}


def check_calls(cluster: rp.Cluster) -> None:
    """Everybody answers, and is who the cluster says."""
    cluster.check()
    everybody = cluster.workers + cluster.spares
    assert [cluster.call(worker.name, os.getpid) for worker in everybody] == [worker.pid for worker in everybody]


def memory() -> int:
    return os.memfd_create("kept")


def test_a_rank_whose_agent_dies_is_followed_by_a_spare_then_a_stand_in_then_a_rank_that_joins() -> None:
    with ranks(4) as group, closing(group), group.connect(spares=1, heal="shrink") as cluster:
        assert [worker.name for worker in cluster.workers + cluster.spares] == ["worker0", "worker1", "spare0"]
        assert (agents(cluster), cluster.spread, cluster.heal) == ({"worker0": 1, "worker1": 2}, True, 3)
        kept = [cluster.keep(one.name, one.pid, cluster.call(one, memory)) for one in cluster.workers]
        spare = cluster.spares[0]

        # A process dies: its agent starts another, whatever spares there are, for there its memory is.
        os.kill(cluster.workers[1].pid, signal.SIGKILL)
        wait_for(lambda: not cluster.healthy)
        check_calls(cluster)
        assert (last(cluster), agents(cluster)["worker1"], cluster.spares) == ("replaced", 2, (spare,))
        assert [one.alive for one in kept] == [True, True]

        # An idle process dies, and then an agent: the spare is started again, then used.
        os.kill(spare.pid, signal.SIGKILL)
        wait_for(lambda: last(cluster) == "died")
        group.kill(cluster, 2)
        check_calls(cluster)
        kinds = [event.kind for event in cluster.events[-4:]]
        assert (kinds, cluster.spares) == (["died", "died", "joined", "spare used"], ())
        assert agents(cluster) == {"worker0": 1, "worker1": 3}
        assert [one.alive for one in kept] == [True, False]
        with pytest.raises(rp.WorkerLost, match="does not keep"):
            cluster.keep("worker0", 1 << 22, 0)
        with pytest.raises(rp.StateError, match=r"1 workers are to be added and 0 spares are there: start 1 more rank"):
            cluster.add_workers()

        newcomer = group.start(2, WORLD_SIZE="9")  # it takes some seconds
        group.kill(cluster, 3)
        check_stand_in(cluster)

        wait_for(lambda: cluster.check() is None and len(cluster.spares) == 1, timeout=20.0)
        assert (last(cluster), cluster.events[-1].pid) == ("joined", worker_of(newcomer).pid)
        [added] = cluster.add_workers()
        cluster.remove_workers(*cluster.stand_ins)
        assert [worker.name for worker in cluster.workers] == ["worker0", "worker2"]
        check_calls(cluster)
        assert agents(cluster) == {"worker0": 1, "worker2": 2}
        cluster.remove_workers(added)
        assert newcomer.wait(5) == 0
        check_calls(cluster)


def check_stand_in(cluster: rp.Cluster) -> None:
    """A process of this host is worker1, and is replaced like any."""
    check_calls(cluster)
    [first] = cluster.stand_ins
    assert (first.name, last(cluster), cluster.hosts()["worker1"]) == ("worker1", "stands in", first.host)
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not cluster.healthy)
    check_calls(cluster)
    [second] = cluster.stand_ins
    assert (second.name, last(cluster), second.pid == first.pid) == ("worker1", "replaced", False)


def last(cluster: rp.Cluster) -> str:
    return cluster.events[-1].kind


def test_a_rank_that_says_nothing_any_more_is_cut_off_and_its_successor_comes_later() -> None:
    with ranks(3) as group, closing(group), group.connect() as cluster:
        check_calls(cluster)
        wait_for(lambda: "not reported yet" not in repr(cluster))
        first, still = group.agents[1], group.freeze(1)
        wait_for(lambda: not cluster.healthy)
        with pytest.raises(rp.WorkerLost, match=r"Start the rank again.* rp\.connect\(spares=…\)"):
            cluster.check()
        assert cluster.events[-1].kind == "silent"
        assert not any(ended(one) for one in still)
        group.start(1)
        wait_for(lambda: _heals(cluster), timeout=20.0)
        assert [event.kind for event in cluster.events] == ["silent", "joined", "spare used"]
        check_calls(cluster)
        for one in still:  # who comes back is nobody's, and goes
            one.send_signal(signal.SIGCONT)
        assert first.wait(5) == 1
        wait_for(lambda: ended(still[1]))
        check_calls(cluster)
        group.start(7, WORLD_SIZE="8")
        wait_for(lambda: "Cluster(2 workers, 1 waiting, live)" in repr(cluster), timeout=20.0)


def _heals(cluster: rp.Cluster) -> bool:
    try:
        cluster.check()
    except rp.WorkerLost:
        return False
    return True


PULLED = textwrap.dedent("""
    import os, sys, time, rpcpipe as rp
    from torch.distributed import rpc
    def calls():
        cluster.check()
        everybody = cluster.workers + cluster.spares
        return [cluster.call(worker.name, os.getpid) for worker in everybody] == [worker.pid for worker in everybody]
    cluster = rp.connect(timeout=60.0)
    while "not reported yet" in repr(cluster):  # only who has beaten falls silent
        time.sleep(0.01)
    def ask(name):
        from rpcpipe.transport.rpc import this_process  # torch's own RPC, of which the transport knows nothing
        to = this_process.served[0].seats[name].wire
        sys.modules["asked"] = rpc.rpc_async(to, time.sleep, args=(600,))
    def has_failed():
        until = time.monotonic() + 10.0
        while not sys.modules["asked"].done() and time.monotonic() < until:
            time.sleep(0.01)
        return sys.modules["asked"].done()
    ask("worker1")
    cluster.call("worker0", ask, "worker1")
    print("formed", len(cluster.workers), len(cluster.spares), flush=True)
    while cluster.healthy:
        time.sleep(0.01)
    print(calls(), [event.kind for event in cluster.events], flush=True)
    print(has_failed(), cluster.call("worker0", has_failed), flush=True)
    sys.stdin.readline()
    print(calls(), len(cluster.events), flush=True)
    cluster.close()
    print("closed", flush=True)
""")
_WHY_NOT = networks.why_not()


@pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
def test_a_host_whose_cable_is_pulled_is_cut_off_and_stays_so_when_it_is_back(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(PULLED)
    with networks.hosts(4) as hosts, ExitStack() as stack:
        four = {"WORLD_SIZE": "4", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500", "RPCPIPE_BIND": "eth0"}
        more = {"RPCPIPE_SECRET": SECRET, "RPCPIPE_SPARES": "1", "OMP_NUM_THREADS": "1"}
        driver, *agents = [
            popen(
                stack,
                [
                    "ip",
                    "netns",
                    "exec",
                    host.name,
                    sys.executable,
                    *(["-m", "rpcpipe.worker"] if rank else [str(script)]),
                ],
                {**os.environ, **four, **more, "RANK": str(rank)},
            )
            for rank, host in enumerate(hosts)
        ]
        assert driver.stdout is not None
        assert driver.stdin is not None
        assert driver.stdout.readline() == "formed 2 1\n"
        lost = worker_of(agents[1])
        hosts[2].pull()
        assert driver.stdout.readline() == "True ['silent', 'spare used']\n"
        assert driver.stdout.readline() == "True True\n"
        hosts[2].plug_in()
        assert agents[1].wait(10) == 1
        wait_for(lambda: ended(lost))
        out, err = driver.communicate("go on\n", timeout=20)
        assert out == "True 2\nclosed\n", err
        assert [driver.returncode, agents[0].wait(5), agents[2].wait(5)] == [0, 0, 0]
