"""Read and write tensors in safetensors files, with a checksum for each tensor, which the format lacks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rpcpipe.checkpoint.files import opened, sync
from rpcpipe.errors import CheckpointError


class Stored(NamedTuple):
    """The location of a tensor, and the dtype, shape and checksum that it must have."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    crc32: int


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """Write ``tensors`` to ``path``; return their locations once they are on the disk.

    Raises CheckpointError with the path.
    """
    dense = _dense(tensors)
    try:
        save_file(dense, path, {"format": "pt"})  # transformers requires this key
        sync(path)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {type(error).__name__}: {error}") from error
    return {name: Stored(path.name, str(t.dtype), tuple(t.shape), crc32(t)) for name, t in dense.items()}


def _dense(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` on the CPU, contiguous, and no two in one storage; copy only where necessary.

    Raises CheckpointError for a tensor that is not dense.
    """
    dense: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{name} is a {tensor.layout} tensor; a checkpoint holds dense ones only")
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        dense[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return dense


def crc32(tensor: torch.Tensor) -> int:
    """Return the checksum of a contiguous tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


class Reader:
    """Reads single tensors from the files in ``folder`` and checks each against its entry in ``stored``."""

    def __init__(self, folder: Path, stored: Mapping[str, Stored]) -> None:
        self._folder = folder
        self._stored = stored
        self._files: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def get(self, name: str) -> torch.Tensor:
        """Return a copy of tensor ``name`` in memory. Raises CheckpointError with file and tensor."""
        wanted = self._stored[name]
        where = f"{self._folder / wanted.file}: tensor {name!r}"
        try:
            tensor: torch.Tensor = self._file(wanted.file).get_tensor(name).clone()
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        if (str(tensor.dtype), tuple(tensor.shape)) != (wanted.dtype, wanted.shape):
            raise CheckpointError(
                f"{where} is {tensor.dtype} of shape {tuple(tensor.shape)}"
                f" and was saved as {wanted.dtype} of {wanted.shape}"
            )
        if crc32(tensor) != wanted.crc32:
            raise CheckpointError(f"{where} is damaged: its checksum is not the one that was saved")
        return tensor

    def _file(self, name: str) -> Any:
        """Return the open file ``name``; ``__exit__`` closes it."""
        if name not in self._files:
            # By the descriptor that was looked at: what has the name may be another file by now.
            descriptor = self._open.enter_context(opened(self._folder / name))
            self._files[name] = self._open.enter_context(safe_open(f"/proc/self/fd/{descriptor}", framework="pt"))
        return self._files[name]
