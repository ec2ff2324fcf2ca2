"""Show a run live: as a page on loopback, and as text in a terminal."""

from rpcpipe.view.view import View, view

__all__ = ["View", "view"]
