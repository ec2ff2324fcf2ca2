"""Saved state on disk: a folder per checkpoint, a shard per worker, published by a rename, without pickle."""

from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.checkpoint.plain_state import Stateful

__all__ = ["Manifest", "Stateful"]
