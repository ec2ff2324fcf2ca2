"""Which rank of which group this process is, and on which network: read from the environment.

torchrun sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and more; Slurm's srun sets SLURM_PROCID and
SLURM_NTASKS; by hand one sets the first four. Every complaint names the variables and their values.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from rpcpipe.errors import RendezvousError

_FOUR = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_PORT, _SLURM_PORTS = 29500, 10000
_SECRET_LENGTH = 16


@dataclass(frozen=True)
class Place:
    """This process among all. ``address:port`` is where the driver (rank 0) is to be found.

    ``local_size``: ranks on this host. ``agent_store``: torchrun's own store listens at that port,
    and tells where the driver does. ``run`` tells restarts of one job apart.
    """

    rank: int
    world_size: int
    address: str
    port: int
    local_size: int
    agent_store: bool
    run: str

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Place:
        """From RANK and its like, else from Slurm's variables; raises RendezvousError."""
        found = {name: environ[name] for name in _FOUR if environ.get(name)}
        if "RANK" not in found and "SLURM_PROCID" in environ:
            found = {**_slurm(environ), **found}
        missing = [name for name in _FOUR if name not in found]
        if missing:
            given = ", ".join(f"{name}={found[name]}" for name in _FOUR if name in found) or "none of the four"
            raise RendezvousError(
                f"{', '.join(missing)} not set (set: {given}). Every process of rp.connect needs {', '.join(_FOUR)};"
                " torchrun and srun set them. On one host rp.launch needs none"
            )
        rank, world_size = _number(found, "RANK", 0), _number(found, "WORLD_SIZE", 2)
        if rank >= world_size:
            raise RendezvousError(
                f"RANK={rank} contradicts WORLD_SIZE={world_size}: ranks count from 0, the driver's, to WORLD_SIZE - 1"
            )
        port = _number(found, "MASTER_PORT", 1)
        if port > 65535:
            raise RendezvousError(f"MASTER_PORT={port} is no port")
        return cls(
            rank,
            world_size,
            found["MASTER_ADDR"],
            port,
            int(environ.get("LOCAL_WORLD_SIZE") or environ.get("SLURM_NTASKS_PER_NODE") or 1),
            environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            f"{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        )


def _number(found: Mapping[str, str], name: str, least: int) -> int:
    try:
        value = int(found[name])
    except ValueError:
        value = least - 1
    if value < least:
        what = "the driver and at least one worker" if name == "WORLD_SIZE" else f"a whole number from {least} on"
        raise RendezvousError(f"{name}={found[name]!r} must be {what}")
    return value


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    found = {"RANK": environ["SLURM_PROCID"]}
    if "SLURM_NTASKS" in environ:
        found["WORLD_SIZE"] = environ["SLURM_NTASKS"]
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if hosts:
        found["MASTER_ADDR"] = first_host(hosts)
    if "SLURM_JOB_ID" in environ:
        # The same on all hosts, another for every job.
        found["MASTER_PORT"] = str(_SLURM_PORT + int(environ["SLURM_JOB_ID"]) % _SLURM_PORTS)
    return found


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed list: ``gpu[03-06,9],login`` gives ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise RendezvousError(f"SLURM_JOB_NODELIST={nodes!r} cannot be read; set MASTER_ADDR")
    return match[1] + (match[2] or "")


# --- the network ---


@dataclass(frozen=True)
class Interface:
    """A network interface and the address of it that is used."""

    name: str
    address: str


def interfaces() -> list[Interface]:
    """All addresses of this host's interfaces that are up."""
    states = psutil.net_if_stats()
    return [
        Interface(name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and name in states and states[name].isup
    ]


def choose_interface(bind: str | None, master: str) -> Interface:
    """The interface to listen on: ``bind`` is a name, an address or a CIDR; loopback needs none.

    Raises RendezvousError where it is missing, a wildcard, or not of this host.
    """
    known = interfaces()
    here = ", ".join(f"{found.name} {found.address}" for found in known)
    if bind is None:
        if not ipaddress.ip_address(resolve(master)).is_loopback:
            raise RendezvousError(
                "say on which network to listen: RPCPIPE_BIND=eth0 or RPCPIPE_BIND=10.0.0.0/8, or"
                f" rp.connect(bind=…). This host has {here}"
            )
        bind = "127.0.0.1"
    try:
        network = ipaddress.ip_network(bind, strict=False)
    except ValueError:
        found = [one for one in known if one.name == bind]
    else:
        if network.prefixlen == 0 or network.network_address.is_unspecified:
            raise RendezvousError(f"bind={bind!r} is every network; name the private one. This host has {here}")
        found = [one for one in known if ipaddress.ip_address(one.address) in network]
    if not found:
        raise RendezvousError(f"bind={bind!r} fits no interface of this host, which has {here}")
    return min(found, key=lambda one: ":" in one.address)  # IPv4 first: torch's agent takes it


def resolve(host: str) -> str:
    """The address of ``host``; RendezvousError if it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise RendezvousError(f"MASTER_ADDR={host} has no address here: {error}") from error


# --- the secret ---


def secret(environ: Mapping[str, str]) -> bytes:
    """RPCPIPE_SECRET, or what the file RPCPIPE_SECRET_FILE holds; raises RendezvousError."""
    given, path = environ.get("RPCPIPE_SECRET"), environ.get("RPCPIPE_SECRET_FILE")
    if given is None and path is not None:
        given = _read(Path(path))
    if given is None:
        raise RendezvousError(
            "no secret: every rank needs the same RPCPIPE_SECRET (or RPCPIPE_SECRET_FILE), for instance from"
            " `openssl rand -hex 32`; without it anybody who reaches the port could run code here"
        )
    if len(given) < _SECRET_LENGTH:
        raise RendezvousError(
            f"the secret has {len(given)} characters, too few to withstand guessing: use {_SECRET_LENGTH} or more"
        )
    return given.encode()


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise RendezvousError(f"RPCPIPE_SECRET_FILE={path} is open to others: chmod 600 {path}")
            return file.read().strip()
    except OSError as error:
        raise RendezvousError(f"RPCPIPE_SECRET_FILE={path} cannot be read: {error}") from error
