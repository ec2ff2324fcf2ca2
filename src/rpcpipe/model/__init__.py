"""A model as named layers in one process: building, wiring, tied weights, seeding, and splitting into micro-batches."""

from rpcpipe.model.layers import LayerSpec, Sequential, Wired

__all__ = ["LayerSpec", "Sequential", "Wired"]
