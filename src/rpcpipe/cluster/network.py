"""Choose the network interface to listen on, and keep connections to other hosts honest."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil

from rpcpipe.errors import RendezvousError


@dataclass(frozen=True)
class Interface:
    """A network interface and the one of its addresses that is used."""

    name: str
    address: str


def interfaces() -> list[Interface]:
    """Return all addresses of this host's interfaces that are up."""
    states = psutil.net_if_stats()
    return [
        Interface(name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and name in states and states[name].isup
    ]


def choose_interface(bind: str | None, master: str) -> Interface:
    """Return the interface to listen on: ``bind`` is a name, an address or a CIDR; None means loopback.

    Raises RendezvousError where ``bind`` is missing although ``master``, the driver's host, is not loopback,
    where it is a wildcard, and where this host has no such interface.
    """
    known = interfaces()
    here = ", ".join(f"{interface.name} {interface.address}" for interface in known)
    if bind is None:
        masters = addresses(master)
        if not ipaddress.ip_address(masters[0]).is_loopback:
            raise RendezvousError(
                "say on which network to listen: RPCPIPE_BIND=eth0 or RPCPIPE_BIND=10.0.0.0/8, or"
                f" rp.connect(bind=…). This host has {here}"
            )
        # A name like localhost has two, and often ::1 comes first.
        bind = "127.0.0.1" if any(":" not in address for address in masters) else masters[0]
    try:
        network = ipaddress.ip_network(bind, strict=False)
    except ValueError:
        fitting = [interface for interface in known if interface.name == bind]
    else:
        if network.prefixlen == 0 or network.network_address.is_unspecified:
            raise RendezvousError(f"bind={bind!r} is every network; name the private one. This host has {here}")
        fitting = [interface for interface in known if ipaddress.ip_address(interface.address) in network]
    if not fitting:
        raise RendezvousError(f"bind={bind!r} fits no interface of this host, which has {here}")
    return min(fitting, key=lambda interface: ":" in interface.address)  # IPv4 first: torch's agent takes it


def addresses(host: str) -> list[str]:
    """Return the addresses of ``host``, of which there is one at least; raises RendezvousError if it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
    except OSError as error:
        raise RendezvousError(f"MASTER_ADDR={host} has no address here: {error}") from error


def enable_keepalive(sock: socket.socket, heartbeat: float) -> None:
    """Let the kernel notice, whatever this process does, that the host at the other end is gone.

    It takes between one and two heartbeats (seconds; infinity: never), whether something was being sent
    or not. Then the socket's reads and writes fail.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if heartbeat == float("inf"):
        return
    pause = max(1, round(heartbeat / 2))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1500 * heartbeat))
