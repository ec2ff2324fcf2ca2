"""What torch RPC does, pinned: these break when an upgrade changes what transport/rpc.py relies on."""

from __future__ import annotations

import inspect
import os

import pytest
import torch.distributed.autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc import api, internal

import rpcpipe as rp
from rpcpipe.errors import Failure
from rpcpipe.transport import rpc as transport


def test_the_private_names_are_there() -> None:
    assert list(inspect.signature(api._init_rpc_states).parameters) == ["agent"]
    assert callable(dist_autograd._init)  # type: ignore[attr-defined]
    assert callable(rpc._is_current_rpc_agent_set)  # type: ignore[attr-defined]
    assert internal.PythonUDF._fields == ("func", "args", "kwargs")
    assert hasattr(internal, "_thread_local_tensor_tables")
    for name in ("_invoke_rpc_python_udf", "_invoke_remote_python_udf"):
        assert callable(getattr(transport._BINDINGS, name))


def listeners(pids: list[int]) -> list[str]:
    """Addresses, as /proc/net/tcp and tcp6 have them, on which the processes listen."""
    inodes = set()
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.append(fields[1].rpartition(":")[0])
    return found


def test_nothing_listens_but_on_loopback(cluster: rp.Cluster) -> None:
    found = listeners([os.getpid(), *[worker.pid for worker in cluster.workers]])
    assert len(found) == 5  # one per agent
    assert set(found) == {"0100007F"}


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
    stranger = transport.RpcTransport("a generation that is no more")
    reply = stranger.post("worker0", "progress")
    assert reply.result(5) is None
    mine = cluster.transport.post("worker0", "progress")
    assert mine.result(5)[1] == "nothing to do" or "waits" in mine.result(5)[1]


def test_calls_of_a_closed_pipeline_are_answered(cluster: rp.Cluster) -> None:
    answer = cluster.transport.post("worker0", "submit", "no such pipeline", 0, 0, [("begin", ())])
    outcome = answer.result(5)
    assert isinstance(outcome, Failure)
    assert outcome.cancelled


def test_a_second_group_in_one_process_is_refused(cluster: rp.Cluster) -> None:
    with pytest.raises(rp.RpcPipeError, match="already runs torch RPC"):
        transport.join(None, "x", 0, 1, interface="lo", timeout=1.0)  # type: ignore[arg-type]
