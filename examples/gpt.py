"""Train a GPT on real text through worker processes, driven from this one script, and let it write.

./scripts/demo                                     # a tiny one learns pydoc's topics, 465,000 characters
./scripts/demo --text book.txt                     # any other text
python examples/gpt.py --plan-only gpt3-175b       # how GPT-3 would be trained on 8 workers, without building it
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from tqdm import tqdm

import rpcpipe as rp
from gpt_model import gpt, next_token_loss
from rpcpipe.__main__ import main as command

# Layers, hidden size, heads: Brown et al., "Language models are few-shot learners" (2020), table 2.1. Where its heads
# do not divide the hidden size (1.3B: 24 and 2048; 13B: 40 and 5140), the nearest that do.
SIZES = {
    "tiny": (8, 96, 4),
    "gpt3-125m": (12, 768, 12),
    "gpt3-350m": (24, 1024, 16),
    "gpt3-760m": (24, 1536, 16),
    "gpt3-1.3b": (24, 2048, 16),
    "gpt3-2.7b": (32, 2560, 32),
    "gpt3-6.7b": (32, 4096, 32),
    "gpt3-13b": (40, 5120, 40),
    "gpt3-175b": (96, 12288, 96),
}


def plan(size: str, memory: str) -> None:
    """Of training GPT-3's architecture with 64 micro-batches on 8 workers, each as fast as an A100."""
    layers, hidden, heads = SIZES[size]
    model = f"gpt --layers {layers} --hidden {hidden} --heads {heads} --vocab 50257 --seq 2048"
    machine = f"--workers 8 --memory {memory} --flops 312e12 --bandwidth 300e9"
    raise SystemExit(command(["plan", *f"{model} {machine} --batch 64 --chunks 64 --replicas 1 --draw".split()]))


def windows(ids: torch.Tensor, size: int, context: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random windows: (size, context) inputs and the same windows one token later."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - context - 1, (size,), generator=generator)
        cut = torch.stack([ids[start : start + context + 1] for start in starts.tolist()])
        yield cut[:, :-1], cut[:, 1:]


def batches(text: bytes, size: int, context: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``windows`` whose tokens are the text's bytes."""
    return windows(torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), size, context, seed)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW at the usual settings of a small GPT."""
    return torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def read(path: Path | None) -> bytes:
    """The text to learn."""
    return "\n".join(pydoc_data.topics.topics.values()).encode() if path is None else path.read_bytes()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file to learn instead of pydoc's topics")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--plan-only", choices=SIZES, metavar="SIZE", help=f"one of {', '.join(SIZES)}")
    parser.add_argument("--memory", default="640GiB", help="of a worker, for the plan")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--schedule", default="1f1b", choices=rp.schedules.names())
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    return parser.parse_args()


def train(pipe: rp.Pipeline, args: argparse.Namespace, ids: torch.Tensor, width: float) -> None:
    """Train, and show what happened; ``width``: characters of a token."""
    data, held_out = windows(ids, args.batch, args.context), [next(windows(ids, 64, args.context, seed=1))]
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
    characters = args.steps * args.batch * args.context * width
    print(f"step {args.steps:4}  loss {result.loss:.3f}, on held-out windows {pipe.evaluate(held_out):.3f}")
    print(f"{characters / seconds:,.0f} characters a second")
    measured = sorted(bubbles)[len(bubbles) // 2]
    formula = pipe.schedule.simulate().bubble
    print(f"bubble: {measured:.1%} measured (median), {formula:.1%} by formula for {args.workers} free cores")
    print(f"the last step, {result.seconds * 1e3:.0f} ms, as it was measured:")
    print(result.timeline.to_text())


def main() -> None:
    """Train a GPT and print a sample, or show the plan of a large one."""
    args = parse()
    if args.plan_only:
        plan(args.plan_only, args.memory)
    text = read(args.text).decode()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(), vocab_size=args.vocabulary, show_progress=False)
    ids = torch.tensor(tokenizer.encode(text).ids)
    layers, hidden, heads = SIZES[args.size]
    with rp.launch(workers=args.workers) as cluster:
        pipe = rp.Pipeline(
            gpt(tokenizer.get_vocab_size(), hidden, heads, layers, args.context, dropout=0.1),
            cluster,
            loss=next_token_loss,
            optimizer=adamw,
            schedule=args.schedule,
            chunks=args.chunks,
            clip_grad_norm=1.0,
        )
        print(cluster, pipe, sep="\n")
        train(pipe, args, ids, len(text) / len(ids))
        prompt = torch.tensor([tokenizer.encode("A class ").ids])
        [written] = rp.generate(pipe, prompt, 60, temperature=0.7, top_k=20, context=args.context)
        print(f"it writes: {tokenizer.decode(written.tolist())}")


if __name__ == "__main__":
    main()
