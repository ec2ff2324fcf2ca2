"""Every line of docs/cheatsheet.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config

import rpcpipe as rp
from support.models import batches, cross_entropy, mlp

PAGE = (Path(__file__).parents[2] / "docs" / "cheatsheet.md").read_text()


class Scale(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = torch.relu(self.down(image))
        return self.head(torch.cat([self.middle(skip), skip], dim=1))


def correct(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (output.argmax(1) == target).sum(), len(target)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def test_every_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = next(batches(1))
    space: dict[str, Any] = {
        "rp": rp, "torch": torch, "nn": nn, "GPT2Config": GPT2Config, "Scale": Scale, "UNet": UNet,
        "images": torch.randn(4, 3, 8, 8), "adamw": adamw, "x": x, "y": y,
        "model": mlp(), "loss": cross_entropy, "correct": correct, "batches": list(batches(2)),
        "make": lambda: [(torch.ones(8, 12), torch.zeros(8, dtype=torch.long))] * 2,
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, space)
    assert "run.jsonl" in {path.name for path in tmp_path.iterdir()}
    space["cluster"].close()
