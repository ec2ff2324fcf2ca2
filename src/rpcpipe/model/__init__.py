"""A model as named layers, in one process: how they are built, wired, tied, seeded, and cut into micro-batches."""

from rpcpipe.model.layers import LayerSpec, Sequential, Wired

__all__ = ["LayerSpec", "Sequential", "Wired"]
