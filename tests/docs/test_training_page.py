"""What docs/guide/training.md shows runs, block by block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, mlp

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "training.md").read_text()


def test_the_blocks_run() -> None:
    normed = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    x, y = next(batches(1, 12))
    space: dict[str, Any] = {"rp": rp, "nn": nn, "torch": torch, "model": mlp(), "normed": normed, "x": x, "y": y}
    space |= {"cluster": LocalCluster(2), "batches": list(batches(8, 12))}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for block in blocks:
        exec(block, space)
    assert len(blocks) == 6
    assert space["scheduler"].last_epoch == 2
    assert space["pipe"].train_step(x, y).applied
    chosen = rp.Pipeline(mlp(), LocalCluster(2), loss=nn.functional.cross_entropy,
                         optimizer=space["no_decay_for_vectors"])  # fmt: skip
    assert [group["weight_decay"] for group in chosen.optimizer.param_groups] == [0.1, 0.0]
    assert chosen.train_step(x, y).applied
