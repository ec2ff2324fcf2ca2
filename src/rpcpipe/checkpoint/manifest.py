"""A checkpoint's table of contents: all that is not a tensor, and where each tensor lies."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rpcpipe.checkpoint.directory import MANIFEST, sync
from rpcpipe.checkpoint.tensor_file import Stored
from rpcpipe.errors import CheckpointError

_FORMAT = 1


@dataclass
class Manifest:
    """``weights`` by the unsplit model's names, every other tensor by the name that the JSON gives it.

    ``state``: per trainable parameter its optimizer state; ``groups``: hyperparameters; both as
    ``encoding`` writes them, and so are ``position``, the caller's ``stateful`` and the pipeline's own
    ``parts``; ``extra``, by key what ``get_extra_state`` of modules has returned, too.
    ``shared``: a parameter's further names and its first one.
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
    weights: dict[str, Stored] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Into ``folder``, on the disk."""
        content = asdict(self)
        _write(folder / MANIFEST, {"format": _FORMAT, "crc32": _checksum(content), "content": content})

    def write_index(self, folder: Path, total_size: int) -> None:
        """The index of the weights that transformers and others look for; ``load`` does not."""
        weight_map = {name: stored.file for name, stored in self.weights.items()}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write(folder / "model.safetensors.index.json", index)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError with the path unless it is whole."""
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text())
            version, checksum, content = found["format"], found["crc32"], found["content"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if version != _FORMAT:
            raise CheckpointError(
                f"{path} has format {version!r}, this rpcpipe reads {_FORMAT}; use the one that wrote it"
            )
        if checksum != _checksum(content):
            raise CheckpointError(f"{path} is damaged: its checksum is not the one that was saved")
        for kind in ("weights", "tensors"):
            content[kind] = {
                name: Stored(file, dtype, tuple(shape), crc)
                for name, (file, dtype, shape, crc) in content[kind].items()
            }
        return cls(**content)

    def state_of(self, name: str) -> dict[str, Any] | None:
        """The optimizer state of parameter ``name``, by whichever of its names it was saved; None if there is none."""
        return self.state.get(name, self.state.get(self.shared.get(name, name)))


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
    sync(path)
