"""Whether a manifest says what a checkpoint's does: names, types and sizes, before anything of it is used.

The checksum only tells that the text is as it was written, not by whom.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch

from rpcpipe.checkpoint.plain_state import check_encoded
from rpcpipe.errors import CheckpointError

_NO_STATE = "a dict of values that rpcpipe has written"


def check(content: Any, fields: Container[str]) -> None:
    """Raise CheckpointError with the first entry of ``content`` that no manifest has; ``fields``: their names."""
    _expect(isinstance(content, dict), "the content", content, "an object")
    unknown = [name for name in content if name not in fields]
    _expect(not unknown, "the content", unknown, "known entries alone")
    for kind in ("weights", "tensors"):
        _check_strings(kind, content.get(kind), lambda value: isinstance(value, list) and len(value) == 4)
        for name, stored in content[kind].items():
            _check_stored(f"{kind} {name!r}", *stored)
    _check_strings("shared", content.get("shared"), lambda value: isinstance(value, str))
    _check_numbers(content)
    _expect(isinstance(content.get("groups"), list), "groups", content.get("groups"), "a list")
    encoded = {name: content.get(name) for name in ("stateful", "parts", "state", "extra", "loss")}
    for name, value in encoded.items():
        _expect(isinstance(value, dict), name, value, _NO_STATE)
    for name in ("stateful", "parts", "state"):
        _check_strings(name, encoded[name], lambda value: True)
        tagged = next((key for key in content[name] if key.startswith("$")), None)
        _expect(tagged is None, name, tagged, "names")
    for index, group in enumerate(content["groups"]):
        _check_dict(f"groups {index}", group, content["tensors"])
    for name, value in content["state"].items():
        _check_dict(f"state of {name!r}", value, content["tensors"])
    _check_dict("loss", content["loss"], content["tensors"])
    for name in ("position", "stateful", "parts", "extra"):
        check_encoded(content.get(name), name, content["tensors"])


def _check_numbers(content: Mapping[str, Any]) -> None:
    step, seed, optimizer = content.get("step"), content.get("seed"), content.get("optimizer")
    _expect(type(step) is int and 0 <= step < 1 << 63, "step", step, "a number of steps")
    _expect(type(seed) is int, "seed", seed, "a whole number")
    _expect(optimizer is None or isinstance(optimizer, str), "optimizer", optimizer, "a class's name")


def _check_stored(where: str, file: Any, dtype: Any, shape: Any, crc32: Any) -> None:
    """Check the location of a tensor; a file's name with a slash would lead out of the checkpoint's folder."""
    plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & {"/", "\0"}
    _expect(plain, f"the file of {where}", file, "a plain name of a file in the folder")
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
    _expect(known, f"the dtype of {where}", dtype, "one of torch's")
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
    _expect(sizes, f"the shape of {where}", shape, "a list of sizes")
    _expect(type(crc32) is int and 0 <= crc32 < 1 << 32, f"the checksum of {where}", crc32, "a CRC-32")


def _check_strings(where: str, value: Any, fits: Callable[[Any], bool]) -> None:
    """Check a dict whose values ``fits`` accepts."""
    _expect(isinstance(value, dict), where, value, "an object")
    wrong = next((key for key, item in value.items() if not fits(item)), None)
    _expect(wrong is None, f"{where} {wrong!r}", value.get(wrong), "as rpcpipe writes it")


def _check_dict(where: str, value: Any, tensors: Container[str]) -> None:
    """Check an encoded dict."""
    _expect(
        isinstance(value, dict) and (next(iter(value), "")[:1] != "$" or [*value] == ["$dict"]), where, value, "a dict"
    )
    check_encoded(value, where, tensors)


def _expect(fine: bool, where: str, value: Any, wanted: str) -> None:
    if not fine:
        raise CheckpointError(f"{where} is {value!r:.80}, not {wanted}")
