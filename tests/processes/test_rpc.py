"""What torch RPC does, pinned: these break when an upgrade changes what transport/rpc.py relies on."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc import api, internal

import rpcpipe as rp
from rpcpipe.errors import Failure
from rpcpipe.transport import rpc as transport
from rpcpipe.transport.base import DRIVER
from rpcpipe.transport.roster import DRIVERS_SEAT, Roster
from rpcpipe.worker.operations import ReportStep, Task
from support.network_namespaces import listeners

ALONE = Roster("a generation", DRIVER, {DRIVER: DRIVERS_SEAT})


def test_the_private_names_are_there() -> None:
    assert list(inspect.signature(api._init_rpc_states).parameters) == ["agent"]
    assert callable(rpc.TensorPipeAgent._update_group_membership)  # type: ignore[attr-defined]
    assert callable(dist_autograd._init)  # type: ignore[attr-defined]
    assert callable(rpc._is_current_rpc_agent_set)  # type: ignore[attr-defined]
    assert internal.PythonUDF._fields == ("func", "args", "kwargs")
    assert hasattr(internal, "_thread_local_tensor_tables")
    for name in ("_invoke_rpc_python_udf", "_invoke_remote_python_udf"):
        assert callable(getattr(transport._BINDINGS, name))
    for name in ("_get_debug_info", "_current_context", "_release_context"):
        assert callable(getattr(transport._AUTOGRAD, name))


def test_nothing_listens_but_on_loopback(cluster: rp.Cluster) -> None:
    found = listeners([os.getpid(), *[worker.pid for worker in cluster.workers]])
    assert found == ["127.0.0.1"] * 5  # one per agent


def test_idle_workers_use_no_cpu(cluster: rp.Cluster) -> None:
    import time

    import psutil

    cluster.call(1, os.getpid)
    workers = [psutil.Process(worker.pid) for worker in cluster.workers]
    before = [sum(worker.cpu_times()[:2]) for worker in workers]
    time.sleep(1.0)  # what is measured is what an idle second costs
    after = [sum(worker.cpu_times()[:2]) for worker in workers]
    assert max(b - a for a, b in zip(before, after, strict=True)) < 0.2


def test_messages_of_another_generation_are_dropped(cluster: rp.Cluster) -> None:
    stranger = transport.RpcTransport(Roster("one that is no more", DRIVER, cluster.transport.roster.seats))
    reply = stranger.call("worker0", "progress")
    assert reply.result(5) is None
    mine = cluster.transport.call("worker0", "progress")
    assert mine.result(5)[1] == "idle" or "waits" in mine.result(5)[1]


def test_calls_of_a_closed_pipeline_are_answered(cluster: rp.Cluster) -> None:
    answer = cluster.transport.call("worker0", "submit", "no such pipeline", 0, 0, [Task(ReportStep())])
    assert cluster.transport.wait([answer], 5.0)[0] == {answer}
    outcome = answer.result(0)
    assert isinstance(outcome, Failure)
    assert outcome.cancelled


def test_a_second_group_in_one_process_is_refused(cluster: rp.Cluster) -> None:
    with pytest.raises(rp.StateError, match="already runs torch RPC"):
        transport.this_process.join(None, ALONE, interface="lo")  # type: ignore[arg-type]


GENERATIONS = """
import rpcpipe as rp
from support.faults import wait_for
from support.models import batches, cross_entropy, mlp, sgd
def owned():
    from torch.distributed import rpc
    return int(rpc._rref_context_get_debug_info()["num_owner_rrefs"])
rp.launch(workers=1, threads=1).close()
with rp.launch(workers=2, threads=1, timeout=20.0) as cluster:
    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=4)
    for inputs, targets in batches(10):
        pipe.train_step(inputs, targets)
    assert pipe.parameter_rrefs()[-1].owner().name.startswith("worker1-")
    pipe.evaluate(batches(1))
    for worker in (1, 2):
        # The last step's are held until the next one: 16 actions a step, 10 steps.
        wait_for(lambda worker=worker: cluster.call(worker, owned) <= 16 + 2)
"""

LOST_LISTENERS = """
import rpcpipe as rp
from support.strangers import lose_own_listener
for _ in range(2):
    with rp.launch(workers=2, threads=1) as cluster:
        assert cluster.call(2, max, 1, 2) == 2
        lose_own_listener()
rp.launch(workers=1, threads=1).close()
"""


ENDED = "torch's RPC agent has ended; a second one never lets RRefs go: use a fresh process\n"


@pytest.mark.parametrize(
    ("program", "warning"), [(GENERATIONS, ""), (LOST_LISTENERS, 2 * ENDED)], ids=["rrefs are let go", "lost listeners"]
)
def test_groups_that_follow_each_other(program: str, warning: str) -> None:
    """RRefs are let go also after the process's first group, which may have had fewer workers.

    torch's listener closes for good when a process dies as it connects; the next launch gets a new one.
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, warning)


def test_a_network_cannot_be_changed(cluster: rp.Cluster) -> None:
    cluster.close()
    with pytest.raises(rp.StateError, match="listens on lo and cannot change to eth0"):
        transport.this_process.join(None, ALONE, interface="eth0")  # type: ignore[arg-type]
