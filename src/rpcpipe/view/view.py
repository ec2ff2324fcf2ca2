"""Open a live view of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rpcpipe._arguments import require_count, require_kind
from rpcpipe.driver.result import StepResult
from rpcpipe.errors import DependencyError, StateError, require
from rpcpipe.pipeline import Pipeline
from rpcpipe.view.recorder import Recorder
from rpcpipe.view.source import Source

_PORTS = 65535


class Served(Protocol):
    """A page that is served until it is closed."""

    url: str

    def close(self) -> None:
        """End the server."""
        ...


class View:
    """A live view of a pipeline, made by ``rp.view``. A context manager that closes it.

    ``url``: the page's address on this host, with the token that it takes to see it.
    """

    def __init__(self, recorder: Recorder, server: Served, forget: Callable[[Callback], None]) -> None:
        self.url = server.url
        self._recorder, self._server, self._forget = recorder, server, forget
        self.callback = Callback(recorder, self)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the page and record no further steps; the pipeline goes on. Closing twice is allowed."""
        self._forget(self.callback)
        self._recorder.closed = True
        self._server.close()

    def __repr__(self) -> str:
        return f"View({self.url!r})"


class Callback:
    """What ``pipe.callbacks`` holds of a view: it is called after every step, and closed with the pipeline."""

    def __init__(self, recorder: Recorder, view: View) -> None:
        self._recorder, self._view = recorder, view

    def __call__(self, result: StepResult) -> None:
        self._recorder.add(result)

    def close(self) -> None:
        """Close the view."""
        self._view.close()

    def __repr__(self) -> str:
        return f"rp.view, {self._view.url}"


def view(pipe: Pipeline, *, port: int = 0) -> View:
    """Serve a page on loopback that shows ``pipe`` as it trains; return its handle, whose ``url`` opens it.

    The page shows the last step's timeline by worker, planned above measured, tokens or samples per second, bubble,
    loss and gradient norm over time, what every worker holds and does, and events: losses of workers, replacements,
    resizes, checkpoints. It is read-only, needs the token in its URL, and ends with ``close``, with the pipeline, or
    with this process. It shows the steps that are done from now on, those by hand as well. ``port``: 0 for a free one.

    Raises DependencyError where the extra ``view`` is not installed, StateError for a closed pipeline, and
    ArgumentError for a port that is taken.
    """
    require_kind("pipe", pipe, Pipeline, "an rp.Pipeline")
    require_count("port", port, _PORTS, least=0)
    require(not pipe.runtime.closed, "the pipeline is closed; make a new one", error=StateError)
    recorder = Recorder(pipe)

    def forget(callback: Callback) -> None:
        if callback in pipe.callbacks:
            pipe.callbacks.remove(callback)

    opened = View(recorder, serve(recorder, port), forget)
    pipe.on_step(opened.callback)
    return opened


def serve(source: Source, port: int) -> Served:
    """Return the running server of ``source``; raises DependencyError without the extra ``view``."""
    try:
        from rpcpipe.view.server import Server
    except ImportError as error:
        raise DependencyError(
            f"a live view needs starlette and uvicorn: pip install 'rpcpipe[view]' ({error})"
        ) from error
    return Server(source, port)
