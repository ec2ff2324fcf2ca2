from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpcpipe.checkpoint import tensor_file
from rpcpipe.checkpoint.tensor_file import Reader, Stored
from rpcpipe.errors import CheckpointError

FILE = "some.safetensors"
WEIGHT = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "float32": torch.randn(3, 4),
    "float64": torch.randn(2, dtype=torch.float64),
    "bfloat16": torch.randn(3, 5).bfloat16(),
    "float16": torch.randn(3).half(),
    "complex64": torch.randn(3, dtype=torch.complex64),
    "int64, no dimension": torch.tensor(-(1 << 62)),
    "bool": torch.tensor([True, False]),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "nan and inf": torch.tensor([float("nan"), -float("inf"), -0.0]),
    "empty": torch.empty(0, 3),
    "transposed": WEIGHT.t(),
    "its base": WEIGHT,
    "a part of it": WEIGHT[1:],
    "strided": WEIGHT[:, ::2],
    "expanded": torch.ones(1).expand(4),
    "a parameter": torch.nn.Parameter(torch.randn(2)),
}


def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path: Path) -> None:
    stored = tensor_file.write(tmp_path / FILE, TENSORS)
    with Reader(tmp_path, stored) as reader:
        for name, tensor in TENSORS.items():
            found = reader.get(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor)]
            assert torch.equal(*raw), name


def test_a_copy_outlives_its_file(tmp_path: Path) -> None:
    stored = tensor_file.write(tmp_path / FILE, TENSORS)
    with Reader(tmp_path, stored) as reader:
        found = reader.get("its base")
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(8)
    assert torch.equal(found, WEIGHT)


def error_of(folder: Path, stored: dict[str, Stored]) -> str | None:
    try:
        with Reader(folder, stored) as reader:
            for name in stored:
                reader.get(name)
    except CheckpointError as error:
        return str(error)
    return None


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / FILE
    stored = tensor_file.write(path, {"weight": torch.randn(5), "bias": torch.randn(3).bfloat16()})
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (0, 6)
    ]
    unnoticed = 0
    for content in damaged:
        path.write_bytes(content)
        error = error_of(tmp_path, stored)
        assert error is None or (str(path) in error and ("'weight'" in error or "'bias'" in error))
        unnoticed += error is None
    # The header's padding and its metadata, which nothing reads.
    assert unnoticed <= 2 * (len('{"__metadata__":{"format":"pt"},') + 8)


def test_what_cannot_be_written_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*/missing/some.safetensors"):
        tensor_file.write(tmp_path / "missing" / FILE, TENSORS)
    with pytest.raises(CheckpointError, match=r"odd is a torch.sparse_coo tensor"):
        tensor_file.write(tmp_path / FILE, {"odd": torch.eye(2).to_sparse()})
