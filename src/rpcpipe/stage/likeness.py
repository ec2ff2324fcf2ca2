"""Compare the kinds of values, to refuse a saved one that would not do in the place of the live one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def unlike(live: Any, saved: Any) -> str:
    """Return how ``saved`` is of another kind than ``live``, as "is …, not …"; "" if it can take its place.

    Kinds are compared, not values: numbers with numbers (also as tensors of one element), tensors by dtype and shape,
    containers entry by entry, where lists and dicts may be of other lengths. Nothing is known of None.
    """
    if live is None:
        return ""
    if isinstance(live, bool):
        return "" if saved is None or isinstance(saved, bool) else f"is {_kind(saved)}, not True or False"
    if _is_number(live):
        return "" if _is_number(saved) and not _is_nan(saved) else f"is {_kind(saved)}, not a number"
    if isinstance(live, torch.Tensor):
        return _unlike_tensor(live, saved)
    if isinstance(live, str):
        return "" if isinstance(saved, str) else f"is {_kind(saved)}, not a string"
    if isinstance(live, (list, tuple)):
        return _unlike_sequence(live, saved)
    if isinstance(live, Mapping):
        return _unlike_mapping(live, saved)
    return ""


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.dtype is not torch.bool
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_nan(value: Any) -> bool:
    return math.isnan(value) if isinstance(value, (int, float)) else bool(value.isnan())


def _kind(value: Any) -> str:
    """Return what ``value`` is, for a message: itself if it is short, else its type and size."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"{value!r}" if len(repr(value)) <= 60 else f"a {type(value).__name__}"


def _unlike_tensor(live: torch.Tensor, saved: Any) -> str:
    if isinstance(saved, torch.Tensor) and (saved.dtype, saved.shape) == (live.dtype, live.shape):
        return ""
    return f"is {_kind(saved)}, not {_kind(live)}"


def _unlike_sequence(live: Sequence[Any], saved: Any) -> str:
    if not isinstance(saved, type(live)) or (isinstance(live, tuple) and len(saved) != len(live)):
        size = f" of {len(live)}" if isinstance(live, tuple) else ""
        return f"is {_kind(saved)}, not a {type(live).__name__}{size}"
    # A list may grow: its further entries are as its first.
    expected = live if len(saved) == len(live) else [live[0]] * len(saved) if live else ()
    pairs = zip(expected, saved, strict=False)
    return next((f"[{at}] {how}" for at, pair in enumerate(pairs) if (how := unlike(*pair))), "")


def _unlike_mapping(live: Mapping[Any, Any], saved: Any) -> str:
    if not isinstance(saved, Mapping):
        return f"is {_kind(saved)}, not a dict"
    both = (key for key in live if key in saved)
    return next((f"[{key!r}] {how}" for key in both if (how := unlike(live[key], saved[key]))), "")
