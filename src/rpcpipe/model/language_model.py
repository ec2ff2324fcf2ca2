"""What generation has to know of a language model: its inputs, and whether its stages keep keys and values."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from rpcpipe.errors import StateError

# The input that says what a worker has in its cache: for every row (session, row, number of tokens seen), int64.
CACHED = "rpcpipe_cached"


class CacheLost(StateError):
    """A worker does not have the keys and values of the tokens before; generation begins again from all of them."""


class Releasable(Protocol):
    """Something that holds keys and values."""

    def release(self) -> None:
        """Let them go."""


_holders = threading.local()  # workers of one process compute in threads of their own


def holds_caches(holder: Releasable) -> None:
    """Remember that ``holder`` may hold keys and values of this thread's worker."""
    vars(_holders).setdefault("all", weakref.WeakSet()).add(holder)


def release_caches() -> None:
    """Let the keys and values of this thread's worker go."""
    for holder in vars(_holders).get("all", ()):
        holder.release()


@dataclass(frozen=True)
class LanguageModel:
    """A model whose inputs are a dict with input_ids, (batch, time).

    ``cached``: its stages keep keys and values between passes; ``takes_positions``: position_ids are an input;
    ``causal``: its tokens do not see later ones, so that it can generate.
    """

    cached: bool = False
    takes_positions: bool = False
    causal: bool = True

    def inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's inputs for whole rows of ``ids``, padded on the right."""
        return {"input_ids": ids}


class CachedRows:
    """Rows of one batch, padded on the left, numbered from ``first`` on in ``session``, one generation."""

    def __init__(self, model: LanguageModel, session: int, rows: Sequence[torch.Tensor], first: int) -> None:
        self._model = model
        self._names = torch.tensor([[session, first + index] for index in range(len(rows))])
        self._mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        self._new = pad_sequence(list(rows), batch_first=True, padding_side="left")
        self._past = 0

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the inputs of the next pass: the tokens that no worker has seen."""
        past = torch.full((len(self._new), 1), self._past)
        inputs = {
            "input_ids": self._new, "attention_mask": self._mask, CACHED: torch.cat([self._names, past], dim=1)
        }  # fmt: skip
        if self._model.takes_positions:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, self._past :]
        return inputs

    def last(self) -> torch.Tensor:
        """Return every row's last position in the next pass, (batch)."""
        return torch.full((len(self._new),), self._new.shape[1] - 1)

    def add(self, tokens: torch.Tensor) -> None:
        """Add the rows' next ``tokens``, (batch)."""
        self._past += self._new.shape[1]
        self._new = tokens[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._new)], dim=1)
