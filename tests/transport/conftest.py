"""Both transports, asked for the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import rpcpipe as rp
from rpcpipe.transport import Transport
from rpcpipe.transport.local import LocalTransport
from support.recorder import WORKER, Recorder, serve_recorder


@pytest.fixture(params=["rpc", "local"])
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    """A transport that reaches a Recorder, named ``WORKER``."""
    if request.param == "local":
        local = LocalTransport(seed=3)
        local.serve(WORKER, Recorder())
        yield local
        local.leave()
        return
    with rp.launch(workers=1, threads=1, timeout=20.0) as cluster:
        cluster.call(1, serve_recorder)
        yield cluster.transport
