from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rpcpipe.cluster.authentication import read_secret
from rpcpipe.cluster.environment import RankEnvironment, find_driver, first_host
from rpcpipe.cluster.network import addresses, choose_interface
from rpcpipe.cluster.process import strings
from rpcpipe.errors import RendezvousError

FOUR = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_the_four_variables() -> None:
    env = RankEnvironment.read(FOUR)
    assert (env.rank, env.world_size, env.address, env.port) == (1, 3, "10.0.0.1", 29500)
    assert not env.torchrun_store


def test_torchruns() -> None:
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "job"}
    env = RankEnvironment.read({**FOUR, "LOCAL_WORLD_SIZE": "4", **more})
    assert env.torchrun_store
    assert (env.local_size, env.run_id) == (4, "job/2")


def test_slurms() -> None:
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "9", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[03-06,9]"}
    env = RankEnvironment.read({**slurm, "SLURM_NTASKS_PER_NODE": "3"})
    assert (env.rank, env.world_size, env.address, env.port) == (2, 9, "gpu03", 29500 + 3456)
    assert env.local_size == 3
    assert RankEnvironment.read({**slurm, "MASTER_PORT": "1234", "MASTER_ADDR": "head"}).port == 1234
    # torchrun inside of srun: its variables count, whatever Slurm's task is called.
    assert RankEnvironment.read({**slurm, **FOUR}).rank == 1


@pytest.mark.parametrize(
    ("nodes", "host"), [("a", "a"), ("a,b", "a"), ("n[1,3]", "n1"), ("n[08-11]", "n08"), ("n1-2[3-4],m", "n1-23")]
)
def test_slurms_list_of_nodes(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, r"RANK not set \(set: WORLD_SIZE=3, MASTER_ADDR=10.0.0.1, MASTER_PORT=29500\)"),
        ({"RANK": None, "WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "none of the four"),
        ({"RANK": "3"}, "RANK=3 contradicts WORLD_SIZE=3"),
        ({"RANK": "one"}, "RANK='one' must be a whole number"),
        ({"RANK": "-1"}, "RANK='-1' must be"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE='1' must be the driver and at least one worker"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"MASTER_PORT": ""}, "MASTER_PORT not set"),
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE='abc' must be a whole number from 1 on"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0' must be"),
        ({"SLURM_NTASKS_PER_NODE": "2(x3)"}, r"SLURM_NTASKS_PER_NODE='2\(x3\)' must be a whole number"),
        ({"RANK": None, "MASTER_PORT": None, "SLURM_PROCID": "1", "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' must be"),
        ({"WORLD_SIZE": "1000000000"}, "WORLD_SIZE=1000000000 is more than 65536"),
    ],
)
def test_what_is_missing_or_contradictory_is_named(change: dict[str, str | None], message: str) -> None:
    environ = {key: value for key, value in {**FOUR, **change}.items() if value is not None}
    with pytest.raises(RendezvousError, match=message):
        RankEnvironment.read(environ)


def test_the_interface() -> None:
    assert choose_interface(None, "127.0.0.1").name == "lo"
    assert choose_interface("lo", "10.0.0.1").address == "127.0.0.1"
    assert choose_interface("127.0.0.0/8", "10.0.0.1").name == "lo"
    for wildcard in ("0.0.0.0", "0.0.0.0/0", "::", "::/0"):
        with pytest.raises(RendezvousError, match="is every network"):
            choose_interface(wildcard, "10.0.0.1")
    with pytest.raises(RendezvousError, match=r"say on which network to listen.*This host has .*lo 127"):
        choose_interface(None, "10.0.0.1")
    for other in ("eth77", "203.0.113.0/24"):
        with pytest.raises(RendezvousError, match="fits no interface of this host, which has"):
            choose_interface(other, "10.0.0.1")


def test_a_name_without_address() -> None:
    with pytest.raises(RendezvousError, match=r"MASTER_ADDR=no-such-host\.invalid has no address here"):
        addresses("no-such-host.invalid")


ADDRESSES = {
    "IPv6 first": (["::1", "127.0.0.1"], "127.0.0.1"),
    "IPv4 first": (["127.0.0.1", "::1"], "127.0.0.1"),
    "IPv4 alone": (["127.0.0.1"], "127.0.0.1"),
}


@pytest.mark.parametrize(("found", "listened"), ADDRESSES.values(), ids=ADDRESSES)
def test_ranks_find_the_driver_whichever_address_of_its_name_comes_first(
    monkeypatch: pytest.MonkeyPatch, found: list[str], listened: str
) -> None:
    family = {True: socket.AF_INET6, False: socket.AF_INET}

    def getaddrinfo(host: str, port: int | None, *_: int, **__: int) -> list[Any]:
        return [(family[":" in one], socket.SOCK_STREAM, 6, "", (one, port or 0)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    interface = choose_interface(None, "localhost")
    assert interface.address == listened
    assert interface.address in addresses("localhost")
    with socket.create_server((interface.address, 0)) as server:
        environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        env = RankEnvironment.read({**environ, "MASTER_PORT": str(server.getsockname()[1])})
        socket.create_connection(find_driver(env, deadline=0.0), timeout=5).close()


def test_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    assert read_secret({"RPCPIPE_SECRET_FILE": str(path)}) == b"0123456789abcdef"
    assert read_secret({"RPCPIPE_SECRET": "fedcba9876543210", "RPCPIPE_SECRET_FILE": str(path)}) == b"fedcba9876543210"
    path.chmod(0o640)
    with pytest.raises(RendezvousError, match="is open to others: chmod 600"):
        read_secret({"RPCPIPE_SECRET_FILE": str(path)})
    with pytest.raises(RendezvousError, match="cannot be read"):
        read_secret({"RPCPIPE_SECRET_FILE": str(tmp_path / "none")})
    with pytest.raises(RendezvousError, match="no secret: every rank needs"):
        read_secret({})
    with pytest.raises(RendezvousError, match="has 5 characters"):
        read_secret({"RPCPIPE_SECRET": "short"})
    # It need not be text: the environment has its bytes as surrogates.
    binary = bytes(range(128, 160))
    assert read_secret({"RPCPIPE_SECRET": os.fsdecode(binary)}) == binary
    path.write_bytes(binary)
    path.chmod(0o600)
    assert read_secret({"RPCPIPE_SECRET_FILE": str(path)}) == binary


def test_paths_and_arguments_of_other_types_become_strings() -> None:
    assert strings(["a", Path("b/c"), os.fsencode("d"), None, 5]) == ["a", "b/c", "d"]
