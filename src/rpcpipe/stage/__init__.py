"""Compute one stage: forward, backward in one or two halves, recomputation, its optimizer; knows no message."""

from rpcpipe.stage.stage import Stage

__all__ = ["Stage"]
