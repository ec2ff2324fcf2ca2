"""The commands ``rpcpipe top`` and ``rpcpipe view``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from rpcpipe.errors import ArgumentError, StateError, require
from rpcpipe.view.file_source import FileSource
from rpcpipe.view.source import message
from rpcpipe.view.text import render
from rpcpipe.view.view import serve

_TIMEOUT = 60.0  # a view lets who asks often wait
_VARIABLE = "RPCPIPE_VIEW"
_CLEAR, _HOME_AND_CLEAR = "\x1b[2J", "\x1b[H\x1b[J"
_WIDEST = 200

Number = Callable[[str], Any]


def add_parsers(commands: Any, port: Number, seconds: Number) -> None:
    """Add both commands; ``port`` and ``seconds`` read such an argument."""
    top = commands.add_parser("top", help="show a run as text in this terminal, until Ctrl-C")
    top.add_argument(
        "source", nargs="?", default=None,
        help=f"the URL of a live view (rp.view(pipe).url), or the file of rp.callbacks.JsonLines; by default what"
        f" {_VARIABLE} in the environment says, where other users of the machine cannot read the URL's token",
    )  # fmt: skip
    top.add_argument("--interval", type=seconds, default=1.0, help="seconds between two looks (default 1)")
    top.add_argument("--once", action="store_true", help="print once, as where the output is no terminal")
    page = commands.add_parser("view", help="show a file of rp.callbacks.JsonLines as a page, until Ctrl-C")
    page.add_argument("file", type=Path)
    page.add_argument("--port", type=port, default=0, help="of this host's loopback (default 0: a free one)")


def top(args: argparse.Namespace) -> None:
    """Print the run, again and again in a terminal. Raises ArgumentError for no run, StateError once it is gone."""
    source = args.source or os.environ.get(_VARIABLE, "")
    require(bool(source), f"rpcpipe top needs the URL of a live view or a file of JSON lines, or {_VARIABLE}")
    read = _of_url(source) if source.startswith(("http://", "https://")) else _of_file(source)
    if args.once or not sys.stdout.isatty():
        print(render(read(), _WIDEST))
        return
    print(_CLEAR, end="")
    try:
        while True:
            size = shutil.get_terminal_size()
            lines = render(read(), size.columns).splitlines()[: size.lines - 1]
            print(_HOME_AND_CLEAR + "\n".join(lines), flush=True)
            threading.Event().wait(args.interval)
    except KeyboardInterrupt:
        print()


def _of_file(path: str) -> Callable[[], dict[str, Any]]:
    source = FileSource(path)
    return lambda: cast(dict[str, Any], json.loads(message(source)[0]))


def _of_url(url: str) -> Callable[[], dict[str, Any]]:
    address = urlunsplit(urlsplit(url)._replace(path="/state"))
    # No proxy, which would learn the token.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read() -> dict[str, Any]:
        try:
            with opener.open(address, timeout=_TIMEOUT) as reply:
                content = cast(dict[str, Any], json.load(reply))
        except urllib.error.HTTPError as error:
            raise ArgumentError(f"the view refuses: {error.read(200).decode(errors='replace').strip()}") from error
        except (OSError, ValueError) as error:
            raise StateError(
                f"no live view answers at {urlsplit(url).netloc}: the run has ended, or {error}"
            ) from error
        if "error" in content:
            raise StateError(f"the view cannot show the run: {content['error']}")
        return content

    return read


def page(args: argparse.Namespace) -> None:
    """Serve the page of a file until Ctrl-C; raises ArgumentError for a file or port that cannot be used."""
    server = serve(FileSource(args.file), args.port)
    print(f"{args.file} is shown at {server.url} (Ctrl-C ends)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        server.close()
