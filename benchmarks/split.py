"""What a backward in two halves costs more than the whole one: I + W over B, alternating in one process."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

import rpcpipe as rp
from gpt_model import Block
from rpcpipe import _tables
from rpcpipe.stage import autograd
from rpcpipe.stage.autograd import Saved, StageInput
from rpcpipe.stage.split_backward import backward_input, backward_weight

BATCH, TIME = 4, 128


Case = tuple[nn.Module, torch.Tensor]


def gpt_block(dim: int) -> Case:
    """The block of the examples' GPT."""
    return Block(dim, dim // 64), torch.randn(BATCH, TIME, dim)


def encoder(dim: int) -> Case:
    """A layer of torch's encoder, with dropout."""
    layer = nn.TransformerEncoderLayer(dim, dim // 64, 4 * dim, dropout=0.1, batch_first=True)
    return layer, torch.randn(BATCH, TIME, dim)


def feed_forward(width: int) -> Case:
    """Four linear layers with a GELU after each."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers), torch.randn(BATCH * TIME, width)


def convolutions(channels: int) -> Case:
    """Two convolutions with batch norm and ReLU, as in a ResNet."""

    def convolution() -> nn.Module:
        convolved = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return nn.Sequential(convolved, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    return nn.Sequential(convolution(), convolution()), torch.randn(BATCH, channels, 32, 32)


CASES: dict[str, Callable[[], Case]] = {
    **{f"gpt-{dim}": partial(gpt_block, dim) for dim in (64, 128, 256, 512)},
    **{f"encoder-{dim}": partial(encoder, dim) for dim in (64, 256)},
    **{f"mlp-{width}": partial(feed_forward, width) for width in (64, 256, 1024)},
    **{f"conv-{channels}": partial(convolutions, channels) for channels in (16, 64)},
}


def times(layers: nn.Module, x: torch.Tensor, *, split: bool) -> tuple[float, float]:
    """Return the seconds of the whole backward and 0, or of I and of W, each with what it frees of the graph."""
    nest, entered = autograd.enter(StageInput(x, [True]))
    out = layers(nest)
    saved = Saved.of(out, entered)
    grads: list[torch.Tensor | None] = [torch.randn_like(out)]
    del out, nest, entered
    start = time.perf_counter()
    if not split:
        autograd.backward(saved, grads)
        del saved
        return time.perf_counter() - start, 0.0
    _, deferred = backward_input(saved, grads)
    del saved
    middle = time.perf_counter()
    backward_weight(deferred)
    del deferred
    return middle - start, time.perf_counter() - middle


def measure(name: str, seconds: float) -> tuple[list[float], float]:
    """Return the medians of B, I and W, in ms, and the median of (I + W) / B over neighbouring runs."""
    torch.manual_seed(0)
    layers, x = CASES[name]()
    found: list[tuple[float, float, float]] = []
    for split in (False, True) * 3:
        times(layers, x, split=split)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        halves = times(layers, x, split=True)
        found.append((times(layers, x, split=False)[0], *halves))
    ratio = statistics.median((first + second) / whole for whole, first, second in found)
    return [1e3 * statistics.median(column) for column in zip(*found, strict=True)], ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of the medians, one row per model, measured in a worker: it keeps memory that is freed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each model")
    args = parser.parse_args(arguments)
    cluster = rp.launch(1, threads=1)
    rows = []
    for name in args.models:
        (whole, first, second), ratio = cluster.call(1, measure, name, args.seconds)
        rows.append([name, *[f"{value:.3f}" for value in (whole, first, second)], f"{ratio:.3f}"])
    cluster.close()
    print(_tables.text(("model", "B, ms", "I, ms", "W, ms", "(I + W) / B"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
