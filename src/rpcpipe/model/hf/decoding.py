"""Key-value caches of generation, each kept by the worker whose blocks it is of.

A pass over new tokens says which tokens the worker has seen of these rows. The model's own forward makes masks and
positions from a cache of the right length whose keys and values are one number wide; a block is called with this
cache, in which its own layer is the one that it has filled before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rpcpipe.model.language_model import CACHED, CacheLost, holds_caches


def cache_of(config: Any, blocks: int) -> DynamicCache | None:
    """Return an empty cache for a model of ``blocks`` blocks, None if it keeps more than keys and values."""
    cache = DynamicCache(config=config)
    layers = cache.layers
    return cache if len(layers) == blocks and all(isinstance(one, DynamicLayer) for one in layers) else None


@dataclass
class Decoding:
    """What a worker keeps of one micro-batch of rows between passes.

    ``narrow``: the cache from which masks are made, of ``length`` tokens; ``width``: how many tokens the pass under
    way adds, in which the blocks ``called`` have been called; ``filled``: by block, its keys and values;
    ``arguments``: of the blocks in the pass under way.
    """

    narrow: DynamicCache
    length: int = 0
    width: int = 0
    called: set[int] = field(default_factory=set)
    filled: dict[int, Any] = field(default_factory=dict)
    arguments: Any = None

    def begin(self, past: int, rows: int, width: int) -> None:
        """Begin the pass that adds ``width`` tokens to ``past``, unless it is under way.

        Raises CacheLost if other tokens have been seen.
        """
        if past == self.length and self.width in (0, width):
            self.width = width
            return
        if past != self.length + self.width:
            raise CacheLost(
                f"{self.length + self.width} tokens of these rows are in this worker's cache, not {past}: another"
                " process had it"
            )
        new = torch.zeros(rows, 1, self.width, 1)
        for index in range(len(self.narrow.layers)):
            self.narrow.update(new, new, index)
        self.length, self.width, self.arguments = past, width, None
        self.called.clear()

    def wide(self, index: int) -> DynamicCache:
        """Return the cache for block ``index``.

        Raises CacheLost the second time in a pass: the pass is made again because another worker has died, and the
        block's keys and values are those after it.
        """
        if index in self.called:
            raise CacheLost(f"block {index} has seen the tokens from {self.length} on of these rows already")
        self.called.add(index)
        cache = copy.copy(self.narrow)
        cache.layers = list(self.narrow.layers)
        if index not in self.filled:
            self.filled[index] = copy.copy(self.narrow.layers[index])
        cache.layers[index] = self.filled[index]
        return cache


class Decodings:
    """The decodings of one generation at a time, by their first row."""

    def __init__(self) -> None:
        self._session: int | None = None
        self._by_row: dict[int, Decoding] = {}
        holds_caches(self)

    def current(self, config: Any, blocks: int, inputs: Mapping[str, Any], width: int) -> Decoding | None:
        """Return the decoding of the rows in ``inputs``, in the pass that adds ``width`` tokens; None without one."""
        cached = inputs.get(CACHED)
        if cached is None:
            return None
        session, row, past = cached[0].tolist()
        if session != self._session:
            self.release()
            self._session = session
        if row not in self._by_row:
            narrow = cache_of(config, blocks)
            assert narrow is not None  # else the driver would not ask for it
            self._by_row[row] = Decoding(narrow)
        decoding = self._by_row[row]
        decoding.begin(past, len(cached), width)
        return decoding

    def release(self) -> None:
        """Let all caches go."""
        self._by_row.clear()
        self._session = None
