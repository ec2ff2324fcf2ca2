"""Whoever else can reach the RPC ports of a job: other users of its hosts, and other hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rpcpipe as rp
from support import network_namespaces as networks
from support.replacement import kill, train_and_compare
from support.strangers import NOBODY, gate, ports, send_as_stranger

root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


def everybody(cluster: rp.Cluster) -> list[int]:
    return [os.getpid(), *(worker.pid for worker in cluster.workers)]


def test_no_connection_is_taken_while_a_job_runs(trio: rp.Cluster) -> None:
    """Of no user, this one among them, and after a replacement neither."""
    for user in (NOBODY, os.geteuid()):
        assert send_as_stranger(ports(everybody(trio)), user=user) == []
    kill(trio, 0)
    trio.replace()
    places = ports(everybody(trio))
    assert len(places) == 4
    assert send_as_stranger(places) == []
    train_and_compare(trio)


@root
def test_what_another_user_sends_while_gates_are_open_arrives_nowhere(trio: rp.Cluster) -> None:
    """He is connected, and heard by nobody: neither his bytes nor his end; whoever joins meanwhile is heard."""
    for member in trio.workers:
        trio.call(member, lambda: gate().open())
    gate().open()
    places = ports(everybody(trio))
    assert len(send_as_stranger(places)) == len(places)
    kill(trio, 0)
    trio.replace()
    assert gate().listening
    assert all(trio.call(member, lambda: gate().listening) for member in trio.workers)
    assert send_as_stranger(ports(everybody(trio))) == []
    train_and_compare(trio)


_LANES = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for line in open("/proc/net/unix"):
    name = line.split()[-1]
    if name.startswith(f"@rpcpipe-{sys.argv[1]}-worker") and ">" not in name:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as lane:
            lane.settimeout(5)
            lane.connect("\\0" + name[1:])
            try:
                print(lane.recv(1) == b"")
            except ConnectionError:
                print(True)
"""


@root
def test_another_users_lanes_are_closed(trio: rp.Cluster) -> None:
    """To the workers, whose compute threads take lanes while they wait."""
    generation = trio.transport.roster.generation
    done = subprocess.run(
        [sys.executable, "-c", _LANES, generation], capture_output=True, text=True, timeout=60, check=True
    )
    assert len(done.stdout.split()) >= 3
    assert set(done.stdout.split()) == {"True"}
    train_and_compare(trio)


_FIRE = """
import os, socket, sys, time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
connections = []
print("ready", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    rows = [line.split() for line in open("/proc/net/tcp").read().splitlines()[1:]]
    for port in [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"]:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", port))
        connections.append(connection)
    for connection in connections:
        try:
            connection.send(bytes([255]) * 8)
        except OSError:
            pass
    del connections[:-300]
"""

_UNDER_FIRE = """
import os, signal, subprocess, sys
import rpcpipe as rp
from support.faults import wait_for
stranger = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, cwd="/")
stranger.stdout.readline()
for workers in (2, 3):
    with rp.launch(workers, threads=1, timeout=20.0) as cluster:
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        wait_for(lambda: not cluster.healthy)
        cluster.check()
        assert cluster.call(1, max, 1, 2) == 2
stranger.kill()
stranger.wait()
"""


@pytest.mark.skipif(bool(networks.why_not()), reason=networks.why_not())
def test_launches_and_replacements_under_fire() -> None:
    """In a network of their own: another user connects to every port as soon as he sees it, and sends."""
    with networks.hosts(1) as [host]:
        driver = host.popen(
            sys.executable, "-c", _UNDER_FIRE, _FIRE, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE
        )
        _, errors = driver.communicate(timeout=60)
    assert (driver.returncode, errors.count("terminate called"), errors.count("Traceback")) == (0, 0, 0), errors
