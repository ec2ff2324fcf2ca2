"""Train a small ResNet on scikit-learn's handwritten digits: skip connections, also across stages, and BatchNorm.

python examples/image.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import nn

import rpcpipe as rp

WIDTHS = (16, 32, 64)
BLOCKS = 2  # per width


class Stem(nn.Module):
    """(batch, 1, 8, 8) images → (x, the same again as the first block's shortcut)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.conv(images)).relu()
        return x, x


class Half(nn.Module):
    """The first half of a residual block; may halve the image."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, stride=width // before, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(x)).relu()
        return out


class OtherHalf(nn.Module):
    """The second half: adds the shortcut, which comes straight from where the block began, on whatever stage."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (self.norm(self.conv(x)) + self.shortcut(shortcut)).relu()
        return x, x


class Head(nn.Module):
    """Feature maps → logits of the ten digits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x.mean(dim=(2, 3)))
        return out


def resnet() -> list[rp.LayerSpec | rp.Wired]:
    """The layers: a residual block is two of them, joined by a named value."""
    layers: list[rp.LayerSpec | rp.Wired] = [rp.Wired(rp.LayerSpec(Stem, WIDTHS[0]), gives="shortcut")]
    before = WIDTHS[0]
    for width in WIDTHS:
        for _ in range(BLOCKS):
            layers.append(rp.LayerSpec(Half, before, width))
            layers.append(rp.Wired(rp.LayerSpec(OtherHalf, before, width), takes="shortcut", gives="shortcut"))
            before = width
    return [*layers, rp.LayerSpec(Head, before)]


def batches(
    images: torch.Tensor, labels: torch.Tensor, size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order, moved by up to a pixel."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(len(labels), generator=generator).chunk(-(-len(labels) // size)):
        dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
        yield images[rows].roll((dy, dx), dims=(2, 3)), labels[rows]


def correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Digits recognized."""
    return (logits.argmax(-1) == labels).sum(), len(labels)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The usual settings of a ResNet."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def main() -> None:
    """Train, and show the accuracy on digits that were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    steps = -(-len(train) // args.batch) * args.epochs
    with rp.launch(workers=args.workers) as cluster:
        pipe = rp.Pipeline(
            resnet(), cluster, chunks=4, optimizer=sgd, loss=nn.functional.cross_entropy, batch_norm="deferred"
        )
        print(cluster, pipe, sep="\n")
        schedule = torch.optim.lr_scheduler.OneCycleLR(pipe.optimizer, 0.1, total_steps=steps + 1)
        for epoch in range(args.epochs):
            losses = []
            for result in pipe.train(batches(images[train], labels[train], args.batch, seed=epoch)):
                schedule.step()
                losses.append(result.loss)
            held_out = [(images[rows], labels[rows]) for rows in test.chunk(4)]
            accuracy = pipe.evaluate(held_out, {"accuracy": correct})["accuracy"]
            print(f"epoch {epoch}  loss {sum(losses) / len(losses):.3f}  accuracy {accuracy:.1%} on held-out digits")
        model = rp.layers.Sequential(resnet())  # the same in one process
        model.load_state_dict(pipe.state_dict())
        with torch.no_grad():
            alone = (model.eval()(images[test]).argmax(-1) == labels[test]).float().mean()
        print(f"the same weights in one process: {alone:.1%}")


if __name__ == "__main__":
    main()
