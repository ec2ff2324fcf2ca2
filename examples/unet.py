"""Train a U-Net as it is: its forward is recorded on a sample, cut between its submodules, and held against itself.

python examples/unet.py
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import rpcpipe as rp


class Twice(nn.Module):
    """Two convolutions, each normalised."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(4, outer), nn.GroupNorm(4, outer)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip((self.first, self.second), self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        return x


class UNet(nn.Module):
    """Ronneberger, Fischer, Brox, "U-Net" (2015), with three levels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([Twice(1, width), Twice(width, 2 * width)])
        self.middle = Twice(2 * width, 4 * width)
        self.widen = nn.ModuleList([nn.ConvTranspose2d((4 >> at) * width, (2 >> at) * width, 2, 2) for at in (0, 1)])
        self.up = nn.ModuleList([Twice(4 * width, 2 * width), Twice(2 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = []
        for part in self.down:
            skipped.append(x := part(x))
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for widen, part in zip(self.widen, self.up, strict=True):
            x = part(torch.cat([skipped.pop(), widen(x)], dim=1))
        out: torch.Tensor = self.head(x)
        return out


def discs(count: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images, (count, 1, size, size), of one disc each, and the pixels' classes, (count, size, size)."""
    middle = torch.rand(count, 2, 1, 1, generator=generator) * size / 2 + size / 4
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    inside = (((grid - middle) ** 2).sum(1) < (size / 5) ** 2).long()
    return (inside + 0.5 * torch.randn(count, size, size, generator=generator))[:, None], inside


def main() -> None:
    """Print the layers, train, and compare with the model's own forward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, generator = UNet(), torch.Generator().manual_seed(1)
    with rp.launch(workers=2) as cluster:
        pipe = rp.Pipeline(
            model, cluster, sample=discs(2, 32, generator)[0], loss=nn.functional.cross_entropy, chunks=4,
            optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        )  # fmt: skip
        print(pipe)
        for step in range(args.steps):
            result = pipe.train_step(*discs(16, 32, generator))
            if step % 10 == 0 or step == args.steps - 1:
                print(f"step {result.step:3}  loss {result.loss:.3f}", flush=True)
        images, _ = discs(4, 32, generator)
        found = pipe(images)
        model.load_state_dict(pipe.state_dict())  # the names are the model's own
    print("the model's own forward:", torch.allclose(found, model.eval()(images), atol=1e-5))


if __name__ == "__main__":
    main()
