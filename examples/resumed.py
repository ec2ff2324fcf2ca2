"""Train a GPT with tied embeddings, warm-up, clipping and bfloat16; after a kill the same command goes on, to the bit.

python examples/resumed.py --out RUN                # killed at any moment, run it again
python examples/resumed.py --out RUN --die-after 9  # dies of SIGKILL itself after nine steps
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch

import rpcpipe as rp
from gpt import batches
from gpt_model import Block, Embed, Head, next_token_loss

DIM, HEADS, CONTEXT = 32, 4, 32


def layers(blocks: int) -> list[rp.LayerSpec]:
    """A GPT whose logits have the token embedding's weight, on whatever stages the two are."""
    return [
        rp.LayerSpec(Embed, 256, DIM, CONTEXT, tied={"tokens": "token.weight"}),
        *(rp.LayerSpec(Block, DIM, HEADS, dropout=0.1) for _ in range(blocks)),
        rp.LayerSpec(Head, DIM, 256, tied={"tokens": "logits.weight"}),
    ]


def main() -> None:
    """Go on from the newest checkpoint, if there is one, and save every few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--die-after", type=int)
    args = parser.parse_args()
    with rp.launch(workers=2) as cluster:
        pipe = rp.Pipeline(
            layers(4), cluster, loss=next_token_loss, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
            chunks=4, clip_grad_norm=1.0, autocast=torch.bfloat16,
        )  # fmt: skip
        warm_up = torch.optim.lr_scheduler.LambdaLR(pipe.optimizer, lambda step: min(1.0, (step + 1) / 10))
        pipe.load(args.out, stateful={"warm-up": warm_up}, missing_ok=True)
        print(f"begins after step {pipe.trained}", flush=True)
        data = batches(Path(__file__).read_bytes(), 8, CONTEXT)
        for number, batch in zip(range(args.steps), data, strict=False):
            if number < pipe.trained:
                continue  # a batch that was trained on before the kill
            result = pipe.train_step(*batch)
            warm_up.step()
            print(f"step {pipe.trained} loss {result.loss!r}", flush=True)
            if pipe.trained % args.every == 0:
                pipe.save(args.out, stateful={"warm-up": warm_up})
            if pipe.trained == args.die_after:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
