"""Compute one stage: forward, full or split backward, recomputation, optimizer. Nothing here sends a message."""

from rpcpipe.stage.stage import Stage

__all__ = ["Stage"]
