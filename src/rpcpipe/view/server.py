"""Serve a run's page on loopback, from a thread of its own, to who has the token.

Needs the extra ``view`` (starlette, uvicorn). Only GET is answered, and nothing that is answered changes the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator
from importlib import resources
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rpcpipe.errors import ArgumentError
from rpcpipe.schedules.action import NAMES
from rpcpipe.schedules.render.plot import COLOURS
from rpcpipe.transport.owner import Owner
from rpcpipe.view.source import Source, message

log = logging.getLogger("rpcpipe")
# What strangers send is no matter for the driver's terminal, unless the user configures logging.
logging.getLogger("uvicorn").addHandler(logging.NullHandler())

_HOST = "127.0.0.1"
_LOOPBACK = ("127.0.0.1", "localhost")  # a tunnel has another port, so any port is fine
_INTERVAL = 1.0  # seconds between two messages to a page, at least
_SHARE = 0.005  # of a core: what the thread takes at most while pages are open
_CONNECTIONS = 32
_STOP_SECONDS = 3.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Refuses requests for another host than loopback (DNS rebinding), without the token, or other than GET."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await (self._refusal(Request(scope)) or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if not _is_loopback(request.headers.get("host", "")):
            return PlainTextResponse("this page is for loopback alone\n", 403, _HEADERS)
        if not hmac.compare_digest(request.query_params.get("token", "").encode(), self._token):
            return PlainTextResponse("the token is missing or wrong: open the whole URL of the view\n", 403, _HEADERS)
        if request.method != "GET":
            return PlainTextResponse("a view can be read only\n", 405, {**_HEADERS, "Allow": "GET"})
        return None


def _is_loopback(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in _LOOPBACK
    except ValueError:
        return False


class Pace:
    """Bounds the processor time that a thread takes, by the pauses between what it does.

    After work of t seconds each of ``clients`` waits t / share, so that together they take that share of a core.
    """

    def __init__(self, share: float = _SHARE, interval: float = _INTERVAL) -> None:
        self.clients = 0
        self._share, self._interval = share, interval

    def pause(self, spent: float) -> float:
        """Return how long a client waits now, in seconds; ``spent``: the processor time of what it got last."""
        return max(self._interval, spent / self._share * max(1, self.clients))


class _Sleeping(uvicorn.Server):
    """Sleeps until a request comes or ``closing`` is set. uvicorn's own loop wakes ten times a second, for a clock."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing

    async def main_loop(self) -> None:
        """Return once the server is to be closed."""
        await self._closing.wait()


class Server:
    """Serves ``source`` on ``port`` of loopback (0: a free one) until ``close``. ``url`` has the token."""

    def __init__(self, source: Source, port: int = 0) -> None:
        self._source, self._pace, self._polls = source, Pace(), Pace(interval=0.0)
        self._owner = Owner()
        self._token = secrets.token_urlsafe(24)
        self._socket = _listen(port)
        self._listening = self._socket.dup()  # the server closes the other one
        self.url = f"http://{_HOST}:{self._socket.getsockname()[1]}/?token={self._token}"
        app = Starlette(
            routes=[Route("/", self._page), Route("/state", self._state), Route("/events", self._events)],
            middleware=[Middleware(Guard, token=self._token)],
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none", http="h11", loop="asyncio",
            server_header=False, date_header=False, limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._closing, self._polling, self._next_poll = asyncio.Event(), asyncio.Lock(), 0.0
        self._server = _Sleeping(config, self._closing)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="rpcpipe-view")
        self._thread.start()
        self._started.wait(_STOP_SECONDS)

    def close(self) -> None:
        """End the server and its thread. Closing twice is allowed; a fork's call does nothing."""
        if not self._owner.here:
            return
        self._server.should_exit = True  # seen at the end of its start, if it has not begun
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._closing.set)
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_SECONDS)
        self._socket.close()
        with contextlib.suppress(OSError):  # closed already
            self._listening.shutdown(socket.SHUT_RDWR)  # else a fork of this process would go on listening
        self._listening.close()

    # --- on the server's thread ---

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            log.warning("the live view has ended; training goes on", exc_info=True)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._server.serve(sockets=[self._socket])

    async def _page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = resources.files("rpcpipe.view").joinpath("page.html").read_text(encoding="utf-8")
        kinds = {kind: [NAMES[kind], COLOURS[kind]] for kind in COLOURS}
        text = text.replace("__NONCE__", nonce).replace("__KINDS__", json.dumps(kinds))
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
            " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {**_HEADERS, "Content-Security-Policy": policy}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    async def _state(self, request: Request) -> Response:
        """Answer with everything; who asks often waits, so that this too stays within the share of a core."""
        async with self._polling:
            await self._wait(self._next_poll - time.monotonic())
            begun = time.thread_time()
            text, _, _ = self._message(0, -1)
            self._next_poll = time.monotonic() + self._polls.pause(time.thread_time() - begun)
        return Response(text, media_type="application/json", headers=_HEADERS)

    async def _events(self, request: Request) -> Response:
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=_HEADERS)

    async def _stream(self) -> AsyncIterator[str]:
        """Yield a message, then what is new from time to time. A client that does not read waits by itself."""
        cursor, version = 0, -1
        self._pace.clients += 1
        try:
            while not self._closing.is_set():
                begun = time.thread_time()
                text, cursor, version = self._message(cursor, version)
                yield f"data: {text}\n\n"
                pause = self._pace.pause(time.thread_time() - begun)
                await self._wait(pause)
        finally:
            self._pace.clients -= 1

    async def _wait(self, seconds: float) -> None:
        """Wait, but no longer than until the server closes."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), seconds)

    def _message(self, cursor: int, version: int) -> tuple[str, int, int]:
        try:
            return message(self._source, cursor, version)
        except Exception as error:
            if not self._failed:
                log.warning("the live view cannot show the run's state and goes on", exc_info=True)
            self._failed = True
            return json.dumps({"error": f"{type(error).__name__}: {error}"}), cursor, version


def _listen(port: int) -> socket.socket:
    """Return a socket that listens on loopback; raises ArgumentError if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen(_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ArgumentError(
            f"port={port} of {_HOST} cannot be used: {error.strerror}; port=0 takes a free one"
        ) from error
    listener.setblocking(False)
    return listener
