"""Workers forked from a template: what they inherit, how they end, and what happens where forking cannot be."""

from __future__ import annotations

import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch

import rpcpipe as rp
from rpcpipe.cluster import template as module
from rpcpipe.cluster.template import templates
from support.faults import ended, wait_for


def launch(workers: int = 1, **options: object) -> rp.Cluster:
    """A cluster that is not the live one of before."""
    rp.launch(workers=3 - workers, threads=1)
    return rp.launch(workers=workers, threads=1, **options)  # type: ignore[arg-type]


def parent(cluster: rp.Cluster, worker: int = 0) -> psutil.Process:
    found = psutil.Process(cluster.workers[worker].pid).parent()
    assert found is not None
    return found


def test_workers_of_all_launches_are_children_of_one_template() -> None:
    first = parent(launch(1))
    cluster = launch(2)
    assert parent(cluster, 0) == parent(cluster, 1) == first
    assert first.ppid() == os.getpid()
    assert first.num_threads() == 1
    cluster.close()
    # It reaps them, and keeps nothing but its stdio and its socket.
    wait_for(lambda: not first.children() and first.num_fds() == 4)


def test_a_worker_has_what_the_driver_has_when_it_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = parent(launch())
    monkeypatch.setenv("RPCPIPE_TESTED", "a launch")
    monkeypatch.setenv("LONG", "x" * 100_000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a program", "an argument"])
    affinity, core = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CORE)
    umask = os.umask(0o077)
    try:
        os.sched_setaffinity(0, {min(affinity)})
        resource.setrlimit(resource.RLIMIT_CORE, (0, core[1]))
        cluster = launch()
    finally:
        os.umask(umask)
        os.sched_setaffinity(0, affinity)
        resource.setrlimit(resource.RLIMIT_CORE, core)

    def seen() -> tuple[object, ...]:
        return (
            os.environ["RPCPIPE_TESTED"], len(os.environ["LONG"]), os.environ["OMP_NUM_THREADS"], os.getcwd(), sys.argv,
            sys.path, os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CORE)[0], os.umask(0),
            os.getsid(0) == os.getpid(), os.readlink("/proc/self/fd/0"), torch.get_num_threads(),
        )  # fmt: skip

    assert parent(cluster) == template
    assert cluster.call(1, seen) == (
        "a launch", 100_000, "1", str(tmp_path), ["a program", "an argument"],
        sys.path, {min(affinity)}, 0, 0o077, True, os.devnull, 1,
    )  # fmt: skip
    monkeypatch.delenv("RPCPIPE_TESTED")
    assert launch().call(1, lambda: "RPCPIPE_TESTED" not in os.environ and os.getenv("CHILD") is None)


def test_random_numbers_are_a_fresh_processes() -> None:
    cluster = launch(2)

    def drawn() -> tuple[float, float, float]:
        import numpy as np

        return random.random(), float(np.random.rand()), float(torch.rand(1))

    (a, b, c), (d, e, f) = (cluster.call(worker, drawn) for worker in (1, 2))
    assert (a != d, b != e, c != f) == (True, True, True)


def test_what_decides_imports_takes_another_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = parent(launch())
    (tmp_path / "found_here.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    cluster = launch()
    assert parent(cluster) != before

    def seen() -> tuple[int, int]:
        import found_here  # type: ignore[import-not-found]

        return found_here.VALUE, hash("rpcpipe")

    expected = subprocess.run([sys.executable, "-c", "print(hash('rpcpipe'))"], capture_output=True, check=True)
    assert cluster.call(1, seen) == (3, int(expected.stdout))
    wait_for(lambda: ended(before))  # nobody forks from it any more


def test_a_killed_template_is_named_and_replaced() -> None:
    cluster = launch(heal=False)
    template = parent(cluster)
    template.kill()
    wait_for(lambda: not cluster.healthy)
    words = rf"was killed by SIGKILL \(the process it was forked from, {template.pid}, was killed by SIGKILL\)"
    with pytest.raises(rp.WorkerLost, match=words):
        cluster.check()
    again = launch()
    assert again.call(1, os.getpid) > 0
    assert parent(again) != template
    assert parent(again).ppid() == os.getpid()


def test_a_template_killed_between_two_launches_is_replaced() -> None:
    cluster = launch()
    template = parent(cluster)
    cluster.close()
    template.kill()
    assert parent(launch()) != template


def test_a_template_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = launch()
    template = parent(cluster)
    monkeypatch.setattr(module, "_FORK_SECONDS", 0.2)
    template.suspend()
    cluster = rp.launch(workers=3, threads=1)
    assert parent(cluster) not in (template, psutil.Process())


@pytest.fixture
def at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that every Python process imports at its start."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "sitecustomize.py"


THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
CUDA = """
import importlib.abc, sys
class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "rpcpipe.worker":
            import torch
            torch.cuda.is_initialized = lambda: True
sys.meta_path.insert(0, Patch())
"""
DEATH = "import os, sys\nif 'RPCPIPE_TEMPLATE_FD' in os.environ: sys.exit('no luck')\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (THREAD, r"what Python imports at its start has made threads \(1\)"),
        (CUDA, "CUDA is initialized by what Python imports at its start"),
        (DEATH, r"the process to fork them from \(\d+\) exited with status 1; its last line: .*no luck"),
    ],
    ids=["thread", "cuda", "death"],
)
def test_where_forking_cannot_be_workers_are_spawned_and_the_log_says_why(
    at_start: Path, program: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    at_start.write_text(program)
    with caplog.at_level(logging.WARNING, "rpcpipe"):
        cluster = rp.launch(workers=1, threads=1, heal=False)
    assert parent(cluster) == psutil.Process()
    [line] = [record.getMessage() for record in caplog.records if "spawned" in record.getMessage()]

    assert re.search(reason, line), line
    # A spawned worker is a worker: its death is named, and it ends with the cluster.
    os.kill(cluster.workers[0].pid, signal.SIGSEGV)
    wait_for(lambda: not cluster.healthy)
    with pytest.raises(rp.WorkerLost, match=r"worker0 .* was killed by SIGSEGV"):
        cluster.check()
    pids = [worker.pid for worker in cluster.workers]
    cluster.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


# --- nobody outlives the driver ---

DRIVER = textwrap.dedent("""
    import ctypes, os, signal, sys, psutil
    import rpcpipe as rp
    from rpcpipe.transport.user_pickling import named_dumps
    cluster = rp.launch(workers=3, threads=1)
    print(psutil.Process(cluster.workers[0].pid).ppid(), *[worker.pid for worker in cluster.workers], flush=True)
    def hold():
        print("holding", file=sys.stderr, flush=True)
        ctypes.PyDLL(None).sleep(30)
    os.kill(cluster.workers[0].pid, signal.SIGSTOP)
    cluster.transport.call("worker1", "run", named_dumps((hold, ()), ""))
    sys.stdin.readline()
    if sys.argv[1] == "_exit":
        os._exit(4)
    os.kill(os.getpid(), int(sys.argv[1]))
""")


@pytest.mark.alone
@pytest.mark.parametrize(
    ("end", "stopped"),
    [("_exit", False), (str(int(signal.SIGTERM)), False), (str(int(signal.SIGKILL)), True)],
    ids=["_exit", "SIGTERM", "SIGKILL, the template stopped"],
)
def test_template_and_workers_end_with_the_driver_whatever_their_state(end: str, stopped: bool, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    with subprocess.Popen(
        [sys.executable, str(script), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as driver:  # fmt: skip
        assert driver.stdout is not None
        assert driver.stderr is not None
        processes = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(processes) == 4
        assert "holding" in driver.stderr.readline()
        if stopped:
            processes[0].suspend()
        driver.communicate("\n", timeout=10)
        wait_for(lambda: all(map(ended, processes)), timeout=1.0)
    assert list(tmp_path.iterdir()) == [script]


FORKED = textwrap.dedent("""
    import multiprocessing, os, sys
    import rpcpipe as rp
    def drive():
        cluster = rp.launch(workers=2, threads=1)
        assert cluster.call(1, os.getpid) == cluster.workers[0].pid
        cluster.close()
        sys.exit(7)
    child = multiprocessing.get_context("fork").Process(target=drive)
    child.start()
    child.join(30)
    print(child.exitcode)
    cluster = rp.launch(workers=1, threads=1)
    print(cluster.call(1, lambda: 5))
""")


def test_a_driver_that_is_a_forked_child_itself(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(FORKED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["7", "5"], "", 0)


def test_a_fork_of_the_driver_leaves_its_template_alone() -> None:
    cluster = launch()
    template = parent(cluster)
    if (child := os.fork()) == 0:
        templates.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert template.is_running()
    assert cluster.call(1, os.getpid) == cluster.workers[0].pid


# --- spares ---


def test_spares_are_idle_workers_of_the_cluster(caplog: pytest.LogCaptureFixture) -> None:
    cluster = rp.launch(workers=2, threads=1, spares=1)
    assert rp.launch(workers=2, threads=1, spares=1) is cluster
    assert [worker.name for worker in cluster.workers] == ["worker0", "worker1"]
    [spare] = cluster.spares
    assert cluster.call(spare, os.getpid) == cluster.call("spare0", os.getpid) == spare.pid
    assert "Cluster(2 workers, 1 spare, live)" in repr(cluster)
    assert f"spare0   {spare.host}:{spare.pid}" in repr(cluster)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    pipe = rp.Pipeline(
        model, cluster, loss=torch.nn.functional.mse_loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )  # fmt: skip
    x = torch.ones(8, 4)
    pipe.train_step(x, x)
    assert cluster.stages_on("spare0") == ()
    # Training goes on without it.
    with caplog.at_level(logging.WARNING, "rpcpipe"):
        os.kill(spare.pid, signal.SIGKILL)
        wait_for(lambda: "1 lost" in repr(cluster))
    assert "spare0" in caplog.text
    assert "was killed by SIGKILL" in caplog.text
    assert cluster.healthy
    assert pipe.train_step(x, x).applied
    with pytest.raises(rp.WorkerLost, match="spare0"):
        cluster.call(spare, os.getpid)
    cluster.close()
    with pytest.raises(ValueError, match="spares must be at least 0, not -1"):
        rp.launch(workers=2, spares=-1)
