"""The manifest of a checkpoint: every value that is not a tensor, and the location of each tensor."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rpcpipe.checkpoint.directory import MANIFEST
from rpcpipe.checkpoint.files import read_text, sync
from rpcpipe.checkpoint.manifest_check import check
from rpcpipe.checkpoint.tensor_file import Stored
from rpcpipe.errors import CheckpointError

_FORMAT = 1


@dataclass(kw_only=True)
class Manifest:
    """The contents of one checkpoint.

    ``weights`` locates tensors by the unsplit model's names, ``tensors`` all other tensors by the names that
    the encoded values give them. ``plain_state.encode`` has encoded ``state`` (per trainable parameter its
    optimizer state), ``groups`` (hyperparameters), ``position``, the caller's ``stateful`` and the pipeline's
    ``parts``, and by key ``extra``, what modules' ``get_extra_state`` returned, and
    ``loss``, what the loss has changed of its ``state_dict``.
    ``shared`` maps further names of a parameter to its first name.
    """

    step: int
    position: Any
    stateful: dict[str, Any]
    parts: dict[str, Any]
    seed: int = 0
    optimizer: str | None = None
    groups: list[Any] = field(default_factory=list)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Stored] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``; return once it is on the disk."""
        content = asdict(self)
        _write(folder / MANIFEST, {"format": _FORMAT, "crc32": _checksum(content), "content": content})

    def write_index(self, folder: Path, total_size: int) -> None:
        """Write the index of weights that transformers and other libraries look for; ``load`` does not read it.

        ``total_size``: the bytes of all weights.
        """
        weight_map = {name: stored.file for name, stored in self.weights.items()}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write(folder / "model.safetensors.index.json", index)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest in ``folder``. Raises CheckpointError with the path for one that is not intact."""
        path = folder / MANIFEST
        try:
            document = json.loads(read_text(path))
            version, checksum, content = document["format"], document["crc32"], document["content"]
            intact = checksum == _checksum(content)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if version != _FORMAT:
            raise CheckpointError(
                f"{path} has format {version!r}, this rpcpipe reads {_FORMAT}; use the one that wrote it"
            )
        if not intact:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one that was saved")
        try:
            check(content, [one.name for one in fields(cls)])
        except (CheckpointError, RecursionError) as error:
            raise CheckpointError(f"{path} is not of rpcpipe: {error}; load another checkpoint") from error
        for kind in ("weights", "tensors"):
            content[kind] = {
                name: Stored(file, dtype, tuple(shape), crc)
                for name, (file, dtype, shape, crc) in content[kind].items()
            }
        return cls(**content)

    def state_of(self, name: str) -> dict[str, Any] | None:
        """Return the optimizer state of the parameter that has ``name`` among its names; None if none was saved."""
        return self.state.get(name, self.state.get(self.shared.get(name, name)))


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
    sync(path)
