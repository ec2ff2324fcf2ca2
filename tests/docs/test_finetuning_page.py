"""What docs/guide/finetuning.md shows runs, block by block, in one folder."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import rpcpipe as rp
from support.local_cluster import LocalCluster

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "finetuning.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rp, "launch", lambda workers: nullcontext(LocalCluster(workers)))
    space: dict[str, Any] = {}
    read, classify, adapt = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(read, space)
    inputs, _ = space["batches"][0]
    torch.testing.assert_close(space["model"](**inputs).logits, space["pipe"](inputs), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="score"):
        exec(classify, space)
    assert (
        space["classifier"]({"input_ids": inputs["input_ids"] + 1 - (inputs["input_ids"] == 255).long()}).shape[1] == 3
    )
    exec(adapt, space)
    torch.testing.assert_close(space["again"](**inputs).logits, space["pipe"](inputs), atol=1e-5, rtol=1e-5)
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert losses[4] < losses[0]
    assert losses[9] < losses[5]
