"""Timelines as text, as pictures and as a trace; several in one, on one scale of time."""

from rpcpipe.schedules.render.files import save
from rpcpipe.schedules.render.html import to_html
from rpcpipe.schedules.render.perfetto import to_chrome
from rpcpipe.schedules.render.text import to_text

__all__ = ["save", "to_chrome", "to_html", "to_text"]
