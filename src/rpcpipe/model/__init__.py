"""A model as named layers in one process: building, wiring, tied weights, seeding, and splitting into micro-batches."""

from rpcpipe.model.layers import LayerSpec, Wired
from rpcpipe.model.microbatch import Batched, MicroBatches, Replicated
from rpcpipe.model.splitting import split

__all__ = ["Batched", "LayerSpec", "MicroBatches", "Replicated", "Wired", "split"]
