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


def test_a_spare_takes_the_place_of_a_rank_whose_agent_dies_and_other_ranks_join() -> None:
    with ranks(4) as group, closing(group), group.connect(spares=1) as cluster:
        assert [worker.name for worker in cluster.workers + cluster.spares] == ["worker0", "worker1", "spare0"]
        assert agents(cluster) == {"worker0": 1, "worker1": 2}
        assert cluster.spread
        kept = {name: cluster.keep(name, os_pid, cluster.call(name, memory)) for name, os_pid in _pids(cluster).items()}
        spare = cluster.spares[0]

        # A process: its agent starts another, whatever spares there are, for there its memory is.
        os.kill(cluster.workers[1].pid, signal.SIGKILL)
        wait_for(lambda: not cluster.healthy)
        check_calls(cluster)
        assert (cluster.events[-1].kind, agents(cluster)["worker1"]) == ("replaced", 2)
        assert cluster.spares == (spare,)
        assert [one.alive for one in kept.values()] == [True, True]

        # Its agent.
        group.kill(cluster, 2)
        check_calls(cluster)
        assert (cluster.events[-1].kind, cluster.workers[1].pid) == ("spare used", spare.pid)
        assert agents(cluster) == {"worker0": 1, "worker1": 3}
        assert [one.alive for one in kept.values()] == [True, False]
        assert cluster.spares == ()
        with pytest.raises(rp.StateError, match=r"1 workers are to be added and 0 spares are there: start 1 more rank"):
            cluster.add_workers()

        # Whoever comes now is a spare, or is sent away if it has the rank of one who lives.
        first, twin = group.agents[1], group.start(1)
        group.agents[1] = first
        newcomer = group.start(2, WORLD_SIZE="9")
        _, words = twin.communicate(timeout=20)
        assert "its rank 1 lives" in words
        assert twin.returncode == 1
        wait_for(lambda: cluster.check() is None and len(cluster.spares) == 1, timeout=20.0)
        assert (cluster.events[-1].kind, cluster.events[-1].pid) == ("joined", worker_of(newcomer).pid)
        [added] = cluster.add_workers()
        assert (added.name, added.rank, cluster.spares) == ("worker2", 3, ())
        check_calls(cluster)
        assert agents(cluster) == {"worker0": 1, "worker1": 3, "worker2": 2}
        cluster.remove_workers(added)
        assert newcomer.wait(5) == 0
        check_calls(cluster)
        assert all(one.alive == (name == "worker0") for name, one in kept.items())


def _pids(cluster: rp.Cluster) -> dict[str, int]:
    return {worker.name: worker.pid for worker in cluster.workers}


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


def test_a_process_of_the_drivers_host_stands_in() -> None:
    with ranks(3) as group, closing(group), group.connect(heal="shrink") as cluster:
        assert (cluster.heal, cluster.stand_ins) == (3, ())
        group.kill(cluster, 2)
        check_calls(cluster)
        [stand_in] = cluster.stand_ins
        assert (stand_in.name, cluster.events[-1].kind) == ("worker1", "stands in")
        assert cluster.hosts()["worker1"] == stand_in.host
        os.kill(stand_in.pid, signal.SIGKILL)
        wait_for(lambda: not cluster.healthy)
        check_calls(cluster)
        assert [one.name for one in cluster.stand_ins] == ["worker1"]
        assert cluster.events[-1].kind == "replaced"
        [another] = cluster.stand_ins
        cluster.remove_workers(*cluster.stand_ins)
        assert (cluster.stand_ins, [worker.name for worker in cluster.workers]) == ((), ["worker0"])
        assert not os.path.exists(f"/proc/{another.pid}")
        check_calls(cluster)


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
        while not sys.modules["asked"].done():
            time.sleep(0.01)
        return True
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
