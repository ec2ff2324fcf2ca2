"""Make docs/run.svg: a step as it was planned, and as it was measured on this machine.

python scripts/pictures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import rpcpipe as rp  # noqa: E402
from gpt_model import gpt, next_token_loss  # noqa: E402

STEPS = 30

if __name__ == "__main__":
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (16, 128))
    with rp.launch(workers=2, threads=1) as cluster:
        pipe = rp.Pipeline(
            gpt(256, 256, 8, 4, 128), cluster, loss=next_token_loss, optimizer=torch.optim.AdamW, chunks=8,
            dispatch="batched", balance="time", sample=ids[:2],
        )  # fmt: skip
        best = min((pipe.train_step(ids, ids) for _ in range(STEPS)), key=lambda result: result.seconds)
        planned = pipe.schedule.simulate()
    print(rp.schedules.compare(planned, best.timeline, ROOT / "docs" / "run.svg", stretch=True))
    bubbles = f"bubble {planned.bubble:.1%} planned, {best.bubble:.1%} measured"
    print(f"the fastest of {STEPS} steps, {best.seconds:.3f} s; {bubbles}")
