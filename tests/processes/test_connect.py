"""Several ranks by environment variables: on this host, under torchrun, and on hosts of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import network_namespaces as networks
from support.faults import wait_for
from support.ranks import SECRET, free_port, popen, worker_of

SCRIPT = textwrap.dedent("""
    import os, sys, torch, rpcpipe as rp
    from torch import nn
    class Local(nn.Linear): pass
    cluster = rp.connect(timeout=float(os.environ.get("WITHIN", "30")), heal=False)
    torch.manual_seed(0)
    pipe = rp.Pipeline([Local(4, 4) for _ in cluster.workers], cluster, loss=nn.functional.mse_loss,
                       optimizer=lambda params: torch.optim.SGD(params, lr=0.1), chunks=2)
    x = torch.ones(4, 4)
    print("loss", pipe.train_step(x, x).loss, len(cluster.workers), flush=True)
    assert "torch._dynamo" not in sys.modules  # importing it takes as long as importing torch; workers need it
    cluster.call(1, lambda: print("hello from rank 1"))
    try:
        while "stay" in sys.argv:
            pipe.train_step(x, x)
    except rp.WorkerLost as error:
        print("lost", str(error).replace("\\n", " "), flush=True)
    cluster.close()
    print("closed", flush=True)
""")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a rank on this host; all are gone after the test."""
    port = free_port()
    with ExitStack() as stack:

        def begin(rank: int, *command: str, world: int = 3, **changes: str | None) -> subprocess.Popen[str]:
            four = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environ = {**os.environ, **four, "RPCPIPE_SECRET": SECRET, **changes}
            return popen(stack, [sys.executable, *(command or ("-m", "rpcpipe.worker"))], environ)

        yield begin


def test_ranks_of_one_host(start: Start, script: Path) -> None:
    workers = [start(1), start(2, str(script))]  # a rank may run the same script or none
    driver = start(0, str(script))
    out, err = driver.communicate(timeout=60)
    assert out.startswith("loss ")
    assert " 2\n" in out
    assert "hello from rank 1" in out
    assert out.endswith("closed\n")
    assert (driver.returncode, err) == (0, "")
    assert [worker.wait(5) for worker in workers] == [0, 0]


def test_slurms_variables(start: Start, script: Path) -> None:
    none = dict.fromkeys(("RANK", "WORLD_SIZE", "MASTER_PORT"))
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_port()), "MASTER_ADDR": "127.0.0.1", "SLURM_NODELIST": "x"}
    worker = start(1, **none, **slurm, SLURM_PROCID="1")
    driver = start(0, str(script), **none, **slurm, SLURM_PROCID="0")
    out, err = driver.communicate(timeout=60)
    assert out.endswith("closed\n"), err
    assert worker.wait(5) == 0


def test_torchrun(script: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    where = ["--master-addr", "127.0.0.1", "--master-port", port, "--log-dir", str(script.parent), str(script)]
    environ = {**os.environ, "RPCPIPE_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        nodes = [popen(stack, [*command, "--node-rank", str(node), *where], environ) for node in (0, 1)]
        out, err = nodes[0].communicate(timeout=90)
        assert " 3\n" in out, err
        assert out.endswith("closed\n")
        assert [node.wait(30) for node in nodes] == [0, 0]


def refusal(process: subprocess.Popen[str], within: float = 40.0) -> str:
    """The one line of error of a process that ends with status 1."""
    _, err = process.communicate(timeout=within)
    assert process.returncode == 1, err
    return err.strip().splitlines()[-1]


def test_a_rank_given_twice(start: Start, script: Path) -> None:
    driver = start(0, str(script))
    twice = [start(1), start(1)]
    words = refusal(driver)
    assert "RendezvousError: RANK=1 was given twice: to " in words
    assert all("RANK=1 was given twice" in refusal(one) or "the driver" in refusal(one) for one in twice)


def test_contradictions_are_named_on_both_sides(start: Start, script: Path) -> None:
    driver = start(0, str(script))
    other = start(1, world=4)
    assert "has WORLD_SIZE=4, the driver 3" in refusal(driver)
    assert "has WORLD_SIZE=4, the driver 3" in refusal(other)


def test_another_version(start: Start, script: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        "from rpcpipe.cluster import authentication, host_agent\n"
        "authentication.versions = lambda real=authentication.versions: {**real(), 'torch': '1.0'}\n"
        "host_agent.serve_rank()\n"
    )
    driver = start(0, str(script))
    worker = start(1, str(other))
    assert "has other versions: torch 1.0 there, 2." in refusal(driver)
    assert "has other versions: torch 1.0 there, 2." in refusal(worker)


def test_another_secret(start: Start, script: Path) -> None:
    driver = start(0, str(script), WITHIN="4")
    worker = start(1, RPCPIPE_SECRET="some other secret")
    assert "refused rank 1: the secrets differ" in refusal(worker)
    assert "ranks 1, 2 of 3 did not join in time" in refusal(driver)


def test_no_secret_and_rank_0(start: Start) -> None:
    assert "no secret" in refusal(start(1, RPCPIPE_SECRET=None))
    assert "RANK=0 is the driver" in refusal(start(0))


def test_no_driver(start: Start, script: Path) -> None:
    worker = start(1, str(script), WITHIN="1")
    assert "rank 1 found no driver at 127.0.0.1:" in refusal(worker)


@pytest.mark.alone
def test_a_late_rank_is_sent_away(start: Start, script: Path) -> None:
    driver = start(0, str(script), "stay", world=2)
    start(1, world=2)
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("loss")
    began = time.monotonic()
    assert start(1, "-c", "import rpcpipe.worker.main").wait(30) == 0
    importing = time.monotonic() - began
    began = time.monotonic()
    late = start(1, world=2)
    assert "the group is complete and its rank 1 lives" in refusal(late)
    assert time.monotonic() - began < 2.0 + 1.5 * importing  # 2 s from when it can be known
    assert driver.poll() is None


@pytest.mark.alone
def test_a_killed_driver_ends_all_ranks(start: Start, script: Path) -> None:
    driver = start(0, str(script), "stay")
    ranks = [start(1), start(2)]
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("loss")
    workers = [worker_of(rank) for rank in ranks]
    workers[0].suspend()
    driver.kill()
    began = time.monotonic()
    assert [rank.wait(5) for rank in ranks] == [1, 1]
    assert not any(worker.is_running() for worker in workers)
    assert time.monotonic() - began < 5.0


def test_a_remote_death_is_named_with_its_signal(start: Start, script: Path) -> None:
    driver = start(0, str(script), "stay")
    ranks = [start(1), start(2)]
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("loss")
    victim = worker_of(ranks[1])
    victim.kill()
    out, _ = driver.communicate(timeout=10)
    assert f":{victim.pid}) was killed by SIGKILL" in out
    assert "lost stage 1 on worker1" in out
    assert ranks[1].wait(5) == 1
    assert ranks[0].wait(5) == 0


REPLACED = textwrap.dedent("""
    import ctypes, os, signal, torch, rpcpipe as rp
    from torch import nn
    cluster = rp.connect(timeout=30.0)
    def hang():
        ctypes.PyDLL(None).sleep(30)  # keeps the GIL
    def losses(steps, optimizer, killing=False):
        torch.manual_seed(0)
        pipe = rp.Pipeline([nn.Linear(4, 4) for _ in cluster.workers], cluster, loss=nn.functional.mse_loss,
                           optimizer=lambda params: optimizer(params, lr=0.1), chunks=2)
        found = []
        for number in range(steps):
            if killing and number % 2:
                os.kill(cluster.workers[number // 2 % 2].pid, signal.SIGKILL)  # of any host here
            found.append(pipe.train_step(torch.ones(4, 4), torch.ones(4, 4)).loss)
        weights = [value.tolist() for value in pipe.state_dict().values()]
        pipe.close()
        return found, weights
    first = losses(3, torch.optim.SGD)
    for number, death in enumerate([(os._exit, 3), (hang,), (os.abort,), (os._exit, 0)]):
        worker = cluster.workers[number % 2]
        try:
            cluster.call(worker, *death)
        except rp.WorkerLost as error:
            print("lost", str(error).splitlines()[0], flush=True)
        [new] = cluster.replace()
        assert cluster.call(new, os.getpid) == new.pid != worker.pid
        assert losses(3, torch.optim.SGD) == first
    print(len(cluster.events), "events", flush=True)
    healed = losses(8, torch.optim.Adam, killing=True) == losses(8, torch.optim.Adam)
    print(healed, [event.kind for event in cluster.events[8:]].count("replaced"), flush=True)
    cluster.close()
    print("closed", flush=True)
""")


def check_replaced(driver: subprocess.Popen[str], ranks: list[subprocess.Popen[str]]) -> None:
    out, err = driver.communicate(timeout=60)
    lines = out.splitlines()
    assert lines[-3:] == ["8 events", "True 4", "closed"], err
    assert [line.split(") ")[1] for line in lines[:4]] == [
        "exited with status 3.", lines[1].split(") ")[1], "was killed by SIGABRT.", "exited with status 0.",
    ]  # fmt: skip
    assert "no sign of life" in lines[1]
    assert [rank.wait(5) for rank in ranks] == [0, 0]


def test_a_ranks_worker_is_replaced_by_its_agent_and_training_goes_on_through_deaths(
    start: Start, script: Path
) -> None:
    script.write_text(REPLACED)
    ranks = [start(1), start(2)]
    check_replaced(start(0, str(script)), ranks)


def test_a_rank_that_has_ended_cannot_be_replaced(start: Start, script: Path) -> None:
    script.write_text(
        SCRIPT.replace("cluster.close()", "try_to_replace(cluster)").replace("cluster =", NOT_REPLACED, 1)
    )
    driver = start(0, str(script), "stay")
    ranks = [start(1), start(2)]
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("loss")
    ranks[1].kill()
    out, err = driver.communicate(timeout=20)
    assert f"worker1 could not be replaced: nobody can take the place of worker1 ({socket.gethostname()}#2): " in out, (
        err
    )
    assert ranks[0].wait(5) == 0


NOT_REPLACED = textwrap.dedent("""
    def try_to_replace(cluster):
        try:
            cluster.replace()
        except rp.WorkerLost as error:
            print("not replaced:", error, flush=True)
        cluster.close()
    cluster =""").lstrip()


@pytest.mark.skipif(bool(networks.why_not()), reason=networks.why_not())
def test_workers_of_three_hosts_are_replaced_and_training_goes_on_through_deaths(script: Path) -> None:
    script.write_text(REPLACED)
    with networks.hosts(3) as hosts, ExitStack() as stack:
        check_replaced(*_three(stack, hosts, script))


def _three(
    stack: ExitStack, hosts: Sequence[networks.Host], script: Path
) -> tuple[subprocess.Popen[str], list[subprocess.Popen[str]]]:
    """Start ``script`` on the first host, ranks on the others."""
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"}
    found = []
    for rank, host in enumerate(hosts):
        environ = {**os.environ, **shared, "RANK": str(rank), "RPCPIPE_SECRET": SECRET, "RPCPIPE_BIND": "eth0"}
        command = ["-m", "rpcpipe.worker"] if rank else [str(script)]
        found.append(popen(stack, ["ip", "netns", "exec", host.name, sys.executable, *command], environ))
    return found[0], found[1:]


# --- hosts of their own ---

_WHY_NOT = networks.why_not()


@pytest.mark.alone
@pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
def test_three_hosts_and_a_pulled_cable(script: Path) -> None:
    with networks.hosts(3) as hosts, ExitStack() as stack:
        shared = {"WORLD_SIZE": "3", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"}
        found = []
        for rank, host in enumerate(hosts):
            environ = {**os.environ, **shared, "RANK": str(rank), "RPCPIPE_SECRET": SECRET, "RPCPIPE_BIND": "eth0"}
            command = ["-m", "rpcpipe.worker"] if rank else [str(script), "stay"]
            found.append(popen(stack, ["ip", "netns", "exec", host.name, sys.executable, *command], environ))
        driver, *ranks = found
        assert driver.stdout is not None
        assert driver.stdout.readline().startswith("loss")
        assert networks.listeners([driver.pid]) == [hosts[0].address] * 2  # torch's agent and the join port
        workers = [worker_of(rank) for rank in ranks]
        assert networks.listeners([workers[0].pid]) == [hosts[1].address]
        began = time.monotonic()
        hosts[2].pull()
        out = [driver.stdout.readline() for _ in range(2)]
        assert time.monotonic() - began < 2.5
        assert "lost stage 1 on worker1" in "".join(out)
        assert "the host or the network may be down" in "".join(out)
        assert ranks[1].wait(10) == 1
        assert time.monotonic() - began < 5.0
        assert ranks[0].wait(10) == 0
        assert driver.wait(10) == 0
        wait_for(lambda: not any(worker.is_running() for worker in workers), timeout=2.0)


@pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
def test_hosts_that_do_not_say_where_to_listen(script: Path) -> None:
    script.write_text(NOT_SAID)
    with networks.hosts(1) as [host], ExitStack() as stack:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": host.address, "MASTER_PORT": "29500", "RANK": "0"}
        environ = {**os.environ, **shared, "RPCPIPE_SECRET": SECRET}
        driver = popen(stack, ["ip", "netns", "exec", host.name, sys.executable, str(script)], environ)
        out, err = driver.communicate(timeout=40)
        assert (driver.returncode, err) == (0, "")
        unsaid, everywhere, elsewhere = out.splitlines()
        assert "say on which network to listen: RPCPIPE_BIND=eth0 or RPCPIPE_BIND=10.0.0.0/8" in unsaid
        assert "is every network" in everywhere
        assert "is not the address 127.0.0.1 of lo" in elsewhere


NOT_SAID = textwrap.dedent("""
    import os, rpcpipe as rp
    for bind in ({}, {"RPCPIPE_BIND": "0.0.0.0/0"}, {"RPCPIPE_BIND": "lo"}):
        os.environ.update(bind)
        try:
            rp.connect(timeout=2.0)
        except rp.RpcPipeError as error:
            print(str(error).replace("\\n", " "), flush=True)
""")
