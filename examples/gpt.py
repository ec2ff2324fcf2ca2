"""Train a byte-level GPT on real text through worker processes, driven from this one script.

./scripts/demo                      # pydoc's topics, 465,000 characters of the standard library
./scripts/demo --text book.txt      # any other text
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpt_model import gpt, next_token_loss
from torch import nn
from tqdm import tqdm

import rpcpipe as rp


def batches(text: bytes, size: int, context: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random windows: (size, context) inputs and the same windows one byte later."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - context - 1, (size,), generator=generator)
        windows = torch.stack([ids[start : start + context + 1] for start in starts.tolist()])
        yield windows[:, :-1], windows[:, 1:]


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW at the usual settings of a small GPT."""
    return torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def read(path: Path | None) -> bytes:
    """The text to learn."""
    if path is not None:
        return path.read_bytes()
    return "\n".join(pydoc_data.topics.topics.values()).encode()


def main() -> None:
    """Train, and show what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file to learn instead of pydoc's topics")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--schedule", default="1f1b", choices=rp.schedules.names())
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--context", type=int, default=64)
    args = parser.parse_args()
    data = batches(read(args.text), args.batch, args.context)
    held_out = [next(batches(read(args.text), 64, args.context, seed=1))]
    with rp.launch(workers=args.workers) as cluster:
        pipe = rp.Pipeline(
            gpt(256, args.dim, 4, 2 * args.workers, args.context, dropout=0.1),
            cluster,
            loss=next_token_loss,
            optimizer=adamw,
            schedule=args.schedule,
            chunks=args.chunks,
            clip_grad_norm=1.0,
        )
        print(cluster, pipe, sep="\n")
        scheduler = torch.optim.lr_scheduler.OneCycleLR(pipe.optimizer, 2e-3, total_steps=args.steps)
        start, bubbles = time.perf_counter(), []
        with tqdm(total=args.steps, unit="step") as bar:
            for step, (inputs, targets) in zip(range(args.steps), data, strict=False):
                result = pipe.train_step(inputs, targets)
                scheduler.step()
                bubbles.append(result.bubble)
                if step % (args.steps // 6 or 1) == 0:
                    bar.write(f"step {step:4}  loss {result.loss:.3f}")
                bar.set_postfix(loss=f"{result.loss:.3f}")
                bar.update()
        seconds = time.perf_counter() - start
        characters = args.steps * args.batch * args.context
        print(f"step {args.steps:4}  loss {result.loss:.3f}, on held-out windows {pipe.evaluate(held_out):.3f}")
        print(f"{characters / seconds:,.0f} characters a second")
        measured = sorted(bubbles)[len(bubbles) // 2]
        formula = pipe.schedule.simulate().bubble
        print(f"bubble: {measured:.1%} measured (median), {formula:.1%} by formula for {args.workers} free cores")
        print(f"the last step, {result.seconds * 1e3:.0f} ms, as it was measured:")
        print(result.timeline.to_text())


if __name__ == "__main__":
    main()
