"""Keys and values on worker processes, and what becomes of them when one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rpcpipe as rp


class DyingAt:
    """Selects the logits, and kills its process at one call in its life of many processes."""

    def __init__(self, calls: Path, fatal: int) -> None:
        self.calls, self.fatal = calls, fatal

    def __call__(self, output: Any) -> Any:
        with self.calls.open("a") as file:
            file.write(".")
        if self.calls.stat().st_size == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return output


@pytest.mark.timeout(120)
def test_generation_goes_on_where_a_worker_has_died(tmp_path: Path) -> None:
    """Neither the dead worker's keys and values nor what the other one had seen meanwhile are taken for the rows'."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    unsplit: Any = LlamaForCausalLM(config).eval()
    prompts = torch.randint(3, 99, (3, 4))
    expected = unsplit.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with rp.launch(2, threads=1, heal=4) as cluster:
        pipe = rp.from_transformers(unsplit, cluster, chunks=1)
        for fatal in (1, 7):
            calls = tmp_path / str(fatal)
            found = rp.generate(pipe, prompts, 8, logits=DyingAt(calls, fatal), cache=True)
            assert torch.equal(torch.stack(found), expected)
            assert calls.stat().st_size > 3 * 8  # some passes were made again
