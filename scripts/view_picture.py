"""Make docs/view.png: a GPT trains, a worker is killed and replaced, and Chromium takes a picture of the live view.

To be run where Chromium is installed (`apt-get install chromium`):
    PYTHONPATH=examples python scripts/view_picture.py docs/view.png
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile

import torch
from playwright.sync_api import expect, sync_playwright

import rpcpipe as rp
from gpt_model import gpt, next_token_loss

STEPS = 40


def main(path: str) -> None:
    """Train ``STEPS`` steps while a browser shows them, and write the picture to ``path``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (16, 129))
    ids[:, 1::2] = ids[:, ::2][:, :64]  # every second token repeats the one before: something to learn
    with (
        sync_playwright() as driver,
        driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]) as browser,
        rp.launch(workers=2, threads=1, heal=True) as cluster,
        tempfile.TemporaryDirectory() as folder,
    ):
        pipe = rp.Pipeline(
            gpt(200, 128, 4, 4, 128), cluster, loss=next_token_loss, schedule="1f1b", chunks=8,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        )  # fmt: skip
        view = rp.view(pipe)
        page = browser.new_page(viewport={"width": 1240, "height": 830})
        for step in range(STEPS):
            if step == STEPS // 3:
                os.kill(cluster.workers[1].pid, signal.SIGKILL)
            if step == STEPS // 2:
                pipe.save(folder)
            pipe.train_step(ids[:, :-1], ids[:, 1:])
        page.goto(view.url)
        page.wait_for_selector("#timelines rect.span")
        pipe.train_step(ids[:, :-1], ids[:, 1:])
        expect(page).to_have_title(f"step {STEPS} · rpcpipe", timeout=20_000)
        page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
