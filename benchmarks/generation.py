"""Tokens per second of greedy generation, with and without keys and values on the stages, beside transformers' own.

A small GPT-2 on two workers with one thread each, and in this process with two threads (transformers' ``generate``, all
prompts in one batch). The tokens of all must be equal. Rounds alternate; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import rpcpipe as rp
from rpcpipe import _tables


def model(args: argparse.Namespace) -> Any:
    """Return a GPT-2 whose weights are large enough that no two logits are nearly equal."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=args.width, n_layer=args.layers, n_head=args.width // 32, n_positions=args.prompt + args.tokens,
        vocab_size=512, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def measured(calls: dict[str, Callable[[], list[list[int]]]], rounds: int, tokens: int) -> dict[str, float]:
    """Return the tokens per second of each call; raises AssertionError unless all find the same tokens."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Any] = {name: call() for name, call in calls.items()}  # warm
    assert all(rows == found["transformers"] for rows in found.values()), "not the same tokens"
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.monotonic()
            call()
            rates[name].append(tokens / (time.monotonic() - begun))
    return {name: statistics.median(several) for name, several in rates.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 256, "layers": 8, "rows": 16, "prompt": 64, "tokens": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    args = parser.parse_args()
    unsplit = model(args)
    prompts = torch.randint(1, 512, (args.rows, args.prompt))
    settings = {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with rp.launch(2, threads=1) as cluster:
        pipe = rp.from_transformers(unsplit, cluster, chunks=2)

        def pipelined(cache: bool) -> Callable[[], list[list[int]]]:
            return lambda: [row.tolist() for row in rp.generate(pipe, prompts, args.tokens, cache=cache)]

        rates = measured(
            {
                "transformers": lambda: unsplit.generate(prompts, **settings).tolist(),
                "pipeline, cached": pipelined(True),
                "pipeline, whole rows": pipelined(False),
            },
            args.rounds,
            args.rows * args.tokens,
        )
    rows = [(name, f"{rate:.0f}", f"{rate / rates['transformers']:.2f}") for name, rate in rates.items()]
    print(_tables.text(("way", "tokens/s", "of transformers'"), rows))


if __name__ == "__main__":
    main()
