"""The page's server over HTTP on loopback."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import pytest

import rpcpipe as rp
from rpcpipe.transport.local import LocalTransport
from rpcpipe.view.server import Pace
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.sent import Sent

SECONDS = 20.0


def make() -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=2)


@pytest.fixture
def pipe() -> rp.Pipeline:
    return make()


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """The view of a pipeline that does nothing."""
    with rp.view(make()) as opened:
        yield opened


@pytest.fixture
def view(pipe: rp.Pipeline) -> Iterator[Any]:
    with rp.view(pipe) as opened:
        yield opened


def connection(view: Any) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(view.url).netloc, timeout=SECONDS)


def token(view: Any) -> str:
    return urlsplit(view.url).query


def ask(view: Any, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    made = connection(view)
    made.request(method, path, headers=headers)
    return made.getresponse()


def train(pipe: rp.Pipeline, count: int = 1) -> list[rp.StepResult]:
    return [pipe.train_step(*batch) for batch in batches(count)]


def event(reply: http.client.HTTPResponse) -> dict[str, Any]:
    """Return the next message of a stream."""
    line = reply.readline()
    assert line.startswith(b"data: ")
    assert reply.readline() == b"\n"
    return dict(json.loads(line.removeprefix(b"data: ")))


@pytest.mark.parametrize("path", ["/", "/state", "/events", "/other"])
@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", "?token=%ff", "?token=%C3%A9", "?token=a&token=b"])
def test_without_the_token_nothing_is_shown(shared: Any, path: str, query: str) -> None:
    reply = ask(shared, path + query)
    assert reply.status == 403
    assert b"token" in reply.read()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::", "0.0.0.0"])
def test_another_host_is_refused(shared: Any, host: str) -> None:
    """As a page that lets its own name lead to 127.0.0.1 would send it."""
    reply = ask(shared, f"/state?{token(shared)}", Host=host)
    assert reply.status in ((400, 403) if not host else (403,))
    assert b"title" not in reply.read()


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:1"])
def test_a_tunnel_may_have_another_port(shared: Any, host: str) -> None:
    assert ask(shared, f"/state?{token(shared)}", Host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/state", "/events"])
def test_it_is_read_only(shared: Any, method: str, path: str) -> None:
    reply = ask(shared, f"{path}?{token(shared)}", method)
    assert (reply.status, reply.getheader("Allow")) == (405, "GET")


def test_what_is_not_there_is_not_found(shared: Any) -> None:
    assert ask(shared, f"/../pyproject.toml?{token(shared)}").status == 404


def test_it_listens_on_loopback_alone(shared: Any) -> None:
    port = urlsplit(shared.url).port
    with socket.socket() as other:  # another address of this host: were the port bound to all, it would be taken
        other.bind(("127.0.0.2", port or 0))


def test_the_page_brings_all_it_needs(shared: Any) -> None:
    reply = ask(shared, f"/?{token(shared)}")
    text = reply.read().decode()
    assert reply.getheader("Content-Type") == "text/html; charset=utf-8"
    assert reply.getheader("Referrer-Policy") == "no-referrer"
    policy = reply.getheader("Content-Security-Policy") or ""
    assert "default-src 'none'" in policy
    assert policy.split("'nonce-")[1].split("'")[0] in text
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere
    assert "__" not in text


def test_the_state_is_the_runs(pipe: rp.Pipeline, view: Any) -> None:
    results = train(pipe, 2)
    content = json.loads(ask(view, f"/state?{token(view)}").read())
    assert content["figures"]["loss"] == results[-1].loss
    assert [one["name"] for one in content["timelines"]] == ["planned", "measured"]


def test_a_page_gets_everything_and_then_what_is_new(pipe: rp.Pipeline, view: Any) -> None:
    train(pipe, 2)
    reply = ask(view, f"/events?{token(view)}")
    assert reply.getheader("Content-Type") == "text/event-stream; charset=utf-8"
    first = event(reply)
    assert first["full"]
    assert [one[0] for one in first["points"]] == [0, 1]
    train(pipe)
    later = event(reply)
    assert not later["full"]
    assert [one[0] for one in later["points"]] == [2]


def test_workers_get_no_message_of_a_view(pipe: rp.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it costs them nothing."""
    monkeypatch.setattr(LocalTransport, "is_near", lambda self, to: False)  # else at random, and so are the messages
    sent = Sent(pipe.cluster)
    train(pipe, 3)  # sends what workers keep
    counts = []
    for watched in (False, True):
        sent.clear()
        with rp.view(pipe) if watched else nullcontext() as opened:
            reply = ask(opened, f"/events?{token(opened)}") if watched else None
            for _ in range(2):
                train(pipe)
                if reply is not None:
                    event(reply)
        counts.append((sent.verbs.copy(), sent.operations.copy(), sent.kinds.copy()))
    assert counts[0] == counts[1]
    assert sum(sent.kinds.values()) > 0


def test_the_end_of_the_view_ends_its_streams(pipe: rp.Pipeline, view: Any) -> None:
    reply = ask(view, f"/events?{token(view)}")
    event(reply)
    view.close()
    assert pipe.callbacks == []
    assert reply.read() == b""  # the end, in time
    with pytest.raises(OSError):
        ask(view, f"/state?{token(view)}")
    view.close()
    train(pipe)


def test_a_closed_pipeline_closes_its_view_and_all_other_callbacks(pipe: rp.Pipeline, view: Any) -> None:
    closed = []

    class After:
        def __call__(self, result: rp.StepResult) -> None: ...
        def close(self) -> None:
            closed.append(self)

    pipe.on_step(After())
    pipe.close()
    assert len(closed) == 1
    with pytest.raises(OSError):
        ask(view, f"/state?{token(view)}")


def test_clients_that_hang_up_or_do_not_read_do_no_harm(
    pipe: rp.Pipeline, view: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    netloc = urlsplit(view.url)
    silent = []
    for _ in range(3):
        made = socket.create_connection((netloc.hostname or "", netloc.port or 0), timeout=SECONDS)
        made.sendall(f"GET /events?{token(view)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        silent.append(made)
    silent.pop().close()
    with socket.create_connection((netloc.hostname or "", netloc.port or 0), timeout=SECONDS) as made:
        made.sendall(b"\x00\xff no HTTP\r\n\r\n")
        assert b"400" in made.recv(100)
    train(pipe, 3)
    content = json.loads(ask(view, f"/state?{token(view)}").read())
    assert content["figures"]["step"] == 2
    for one in silent:
        one.close()
    assert capfd.readouterr() == ("", "")


def test_who_holds_all_connections_keeps_others_from_the_page_alone(
    pipe: rp.Pipeline, view: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    netloc = urlsplit(view.url)
    held = [socket.create_connection((netloc.hostname or "", netloc.port or 0), timeout=SECONDS) for _ in range(40)]
    assert ask(view, f"/state?{token(view)}").status == 503
    train(pipe)
    for one in held:
        one.close()
    assert capfd.readouterr() == ("", "")


def test_a_fault_of_the_state_is_said_and_training_goes_on(
    pipe: rp.Pipeline, view: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LocalCluster, "status", lambda self: 1 // 0)
    with caplog.at_level(logging.WARNING, "rpcpipe"):
        for _ in range(2):
            content = json.loads(ask(view, f"/state?{token(view)}").read())
            assert content == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    assert [record.message for record in caplog.records].count(
        "the live view cannot show the run's state and goes on"
    ) == 1
    train(pipe)
    monkeypatch.undo()
    assert json.loads(ask(view, f"/state?{token(view)}").read())["figures"]["step"] == 0


def test_a_fork_neither_ends_the_view_nor_keeps_its_port(pipe: rp.Pipeline, view: Any) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:  # holds the listening socket, too, until the test has looked
        view.close()
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        os.close(read)
        assert ask(view, f"/state?{token(view)}").status == 200
        view.close()
        with pytest.raises(ConnectionRefusedError):
            ask(view, "/")
    finally:
        os.close(write)
        assert os.waitpid(child, 0)[1] == 0


def test_a_port_that_is_taken_is_refused(pipe: rp.Pipeline, view: Any) -> None:
    with pytest.raises(rp.ArgumentError, match=r"port=.* cannot be used: Address already in use"):
        rp.view(pipe, port=urlsplit(view.url).port or 0)
    assert len(pipe.callbacks) == 1


def test_a_closed_pipeline_has_no_view(pipe: rp.Pipeline) -> None:
    pipe.close()
    with pytest.raises(rp.StateError, match="closed"):
        rp.view(pipe)


def test_the_extra_is_named_where_it_is_missing(pipe: rp.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rpcpipe.view.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(rp.DependencyError, match=r"pip install 'rpcpipe\[view\]'"):
        rp.view(pipe)
    assert pipe.callbacks == []


def test_a_client_waits_the_longer_the_more_it_costs() -> None:
    pace = Pace(share=0.01, interval=1.0)
    pace.clients = 1
    assert pace.pause(0.001) == 1.0
    assert pace.pause(0.05) == pytest.approx(5.0)
    pace.clients = 4
    assert pace.pause(0.05) == pytest.approx(20.0)
