"""What docs/guide/data.md shows runs, block by block."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import mlp

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "data.md").read_text()


def test_the_blocks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"rp": rp, "nn": nn, "torch": torch, "functools": functools, "__name__": "__main__"}
    space |= {"DataLoader": DataLoader, "TensorDataset": TensorDataset, "model": mlp(), "cluster": LocalCluster(2)}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for block in blocks:
        exec(block, space)
    assert len(blocks) == 4
    assert len(space["rest"]) == 4
    assert space["pipe"].trained == 14 + 7 + 2 + 1
