"""Peak activation memory by schedule and checkpoint: predicted from a profile, then measured on the workers.

python examples/memory.py --workers 4 --chunks 8
"""

from __future__ import annotations

import argparse
import functools
from itertools import accumulate, islice, pairwise

import rpcpipe as rp
from gpt import adamw, batches, read
from gpt_model import gpt, next_token_loss
from rpcpipe.model.layers import named_layers
from rpcpipe.planning.activation_peaks import peak_activation_bytes
from rpcpipe.stage.profiler import profile

MIB = 2**20


def _below(limit: int, stage: int, chunk: int) -> bool:
    return stage < limit


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    args = parser.parse_args()
    (x, y), (x2, y2) = islice(batches(read(None), 2 * args.chunks, args.context), 2)
    model = gpt(256, args.dim, 4, 2 * args.workers, args.context)
    layers = profile(named_layers(model), x[:2].clone(), loss=next_token_loss, target=y[:2].clone())
    print("| schedule | checkpoint | predicted, MiB by stage | measured | seconds a step | layers recomputed |")
    print("|---|---|---|---|---|---|")
    with rp.launch(workers=args.workers) as cluster:
        for schedule in ("gpipe", "1f1b", "zb-h1"):
            for checkpoint in ("never", "except_last", "always"):
                pipe = rp.Pipeline(
                    model, cluster, loss=next_token_loss, optimizer=adamw, schedule=schedule, chunks=args.chunks,
                    checkpoint=checkpoint,
                )  # fmt: skip
                ends = [0, *accumulate(pipe.balance)]
                dropping = {"never": 0, "except_last": len(pipe.balance) - 1, "always": len(pipe.balance)}[checkpoint]
                predicted = peak_activation_bytes(
                    pipe.schedule,
                    [sum(layer.activation_bytes for layer in layers[a:b]) for a, b in pairwise(ends)],
                    [x[:2].nbytes, *(layers[end - 1].output_bytes for end in ends[1:-1])],
                    functools.partial(_below, dropping),
                )
                pipe.train_step(x, y)
                result = pipe.train_step(x2, y2)
                sizes = (
                    " ".join(f"{size / MIB:.1f}" for size in of) for of in (predicted, result.peak_activation_bytes)
                )
                row = [schedule, checkpoint, *sizes, f"{result.seconds:.3f}", str(sum(result.recomputed))]
                print(f"| {' | '.join(row)} |")
                pipe.close()


if __name__ == "__main__":
    main()
