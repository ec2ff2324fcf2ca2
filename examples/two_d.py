"""2D parallelism: a pipeline of two stages in two replicas, four workers, and one process beside it.

python examples/two_d.py                    # the table of who is where, the losses, what was measured
python examples/two_d.py --shard            # each replica's optimizer holds half of the state (ZeRO-1)
python examples/two_d.py --schedule zb-v    # any synchronous schedule
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model import rng

STAGES, REPLICAS = 2, 2


def model(dim: int) -> nn.Sequential:
    """Blocks with dropout: random numbers are a function of seed, step, micro-batch and layer."""
    torch.manual_seed(1)
    blocks = [
        nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim)) for _ in range(7)
    ]
    return nn.Sequential(*blocks, nn.Linear(dim, 10))


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimizer over ``params``."""
    return torch.optim.AdamW(params, lr=1e-3)


class OneProcess:
    """The same training in this process: a plain loop over all micro-batches."""

    def __init__(self, dim: int, chunks: int) -> None:
        self.model, self.chunks, self.step = model(dim), chunks, 0
        self.optimizer = adamw(list(self.model.parameters()))

    def train_step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """The loss of one batch, and one update."""
        total = 0.0
        parts = [(a, b) for xs, ys in zip(x.chunk(REPLICAS), y.chunk(REPLICAS), strict=True)
                 for a, b in zip(xs.chunk(self.chunks), ys.chunk(self.chunks), strict=True)]  # fmt: skip
        for position, (inputs, targets) in enumerate(parts):
            for index, layer in enumerate(self.model):
                rng.seed_layer(0, self.step, position, index)
                inputs = layer(inputs)
            loss = nn.functional.cross_entropy(inputs, targets) * (len(targets) / len(y))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total


def main() -> None:
    """Train both, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as each worker: the bits of a product depend on it
    alone = OneProcess(args.dim, args.chunks)
    weights = torch.randn(args.dim, 10)
    with rp.launch(workers=STAGES * REPLICAS, threads=1) as cluster:
        pipe = rp.Pipeline(
            model(args.dim), cluster, loss=nn.functional.cross_entropy, optimizer=adamw, schedule=args.schedule,
            chunks=args.chunks, replicas=REPLICAS, shard_optimizer=args.shard,
        )  # fmt: skip
        print(pipe)
        print(f"\n{'step':>4} {'pipeline':>12} {'one process':>12} {'relative difference':>20}")
        for step in range(args.steps):
            x = torch.randn(args.batch, args.dim)
            y = (x @ weights).argmax(1)
            result, loss = pipe.train_step(x, y), alone.train_step(x, y)
            print(f"{step:4} {result.loss:12.6f} {loss:12.6f} {abs(result.loss - loss) / loss:20.1e}")
        print(f"\n{result}")


if __name__ == "__main__":
    main()
