"""Modules of many kinds, none of them a chain of layers, as people write them; with their inputs and losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Double(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Skip connections, and a branch on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Double(3, 4), Double(4, 8), Double(8, 8)
        self.up2, self.right2 = nn.ConvTranspose2d(8, 8, 2, 2), Double(16, 8)
        self.up1, self.right1 = nn.ConvTranspose2d(8, 4, 2, 2), Double(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        one = self.down1(image)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.middle(F.max_pool2d(two, 2)))
        if x.shape[-2:] != two.shape[-2:]:
            x = F.interpolate(x, size=two.shape[-2:])
        x = self.up1(self.right2(torch.cat([x, two], dim=1)))
        return self.head(self.right1(torch.cat([x, one], dim=1)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """torchvision's: the sum in place, its modules used as they are."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after)) if stride > 1 else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(x.view(x.size(0), -1))  # type: ignore[no-any-return]


class DenseLayer(nn.Module):
    def __init__(self, before: int, grown: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(before), nn.Conv2d(before, grown, 3, padding=1)

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        before = [x] if isinstance(x, torch.Tensor) else x
        return self.conv(F.relu(self.norm(torch.cat(before, 1))))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    """Every layer takes what all before it gave, as a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleDict({f"dense{at}": DenseLayer(4 + 4 * at, 4) for at in range(3)})
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers.values():
            features.append(layer(features))
        x = F.adaptive_avg_pool2d(torch.cat(features, 1), (1, 1))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5 / math.sqrt(n)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Parameters of its own, expanded to the batch; a loop over a range of a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.blocks = nn.ModuleList(Encoder(8, 2) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed[:, : x.size(1)]
        for at in range(len(self.blocks)):
            x = self.blocks[at](x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """One tower for two inputs, with BatchNorm in it; a tuple of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.head(torch.abs(self.tower(one) - self.tower(other)))  # type: ignore[no-any-return]


class Towers(nn.Module):
    """Two towers; a dict of inputs, whose keys the forward names."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8))
        self.words = nn.Embedding(11, 8)
        self.text = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.join = nn.Bilinear(8, 8, 4)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.join(self.image(image), self.text(self.words(text).mean(1)))  # type: ignore[no-any-return]


class Language(nn.Module):
    """Tied weights, a causal mask made of the length, embeddings of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(13, 8), nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([Encoder(8, 2), Encoder(8, 2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.positions(at)
        for block in self.blocks:
            x = block(x, ids > 0)
        return self.head(self.norm(x)).transpose(1, 2)  # type: ignore[no-any-return]


class Translator(nn.Module):
    """torch's own transformer, and the embedding's weight used as a function's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(13, 8), nn.Embedding(13, 8)
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True)

    def forward(self, src: torch.Tensor, tgt: torch.Tensor) -> torch.Tensor:
        mask = self.transformer.generate_square_subsequent_mask(tgt.size(1))
        x = self.transformer(self.source(src) * math.sqrt(8), self.target(tgt), tgt_mask=mask)
        return F.linear(x, self.target.weight).transpose(1, 2)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.five = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 5, padding=2))
        self.pool, self.head = nn.Conv2d(4, 4, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        branches = [self.one(x), self.three(x), self.five(x), self.pool(F.avg_pool2d(x, 3, 1, 1))]
        return self.head(torch.cat([F.relu(branch) for branch in branches], 1).mean((2, 3)))  # type: ignore[no-any-return]


class AutoEncoder(nn.Module):
    """Several outputs, in a dict; one of them is made half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 12))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        code = self.encoder(x)
        return {"code": code, "image": self.decoder(code), "kind": "dense"}


class Tagger(nn.Module):
    """Recurrent layers, which return tuples; one is read as a whole, the other for its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(8, 5, batch_first=True)
        self.head = nn.Linear(5 + 8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, (hidden, _) = self.lstm(self.embed(ids))
        _, last = self.gru(x)
        b = ids.shape[0]
        return self.head(torch.cat([last[-1], hidden.transpose(0, 1).reshape(b, -1)], -1))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
            self.tokens = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
            self.channels = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(nn.ModuleList([self.Layer()]) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["tokens"]
        for at in range(len(self.mixers)):
            for layer in self.mixers[at]:  # type: ignore[attr-defined]
                x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Albert(nn.Module):
    """One block applied again and again, with other parameters between."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Encoder(6, 2)
        self.scales = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = scale(self.block(x))
        return x[:, 0, :4]


class Counting(nn.Module):
    """Buffers that the forward changes, of its own and of a part; a running value changed in place behind a view."""

    class Meter(nn.Module):
        mean: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return x - self.mean

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.meter = self.Meter()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        x = self.meter(self.one(x))
        y = self.two(x)
        half = y[:, :4]
        half.mul_(2.0)
        return self.three(torch.tanh(y))  # type: ignore[no-any-return]


class Dropping(nn.Module):
    """Dropout as a function and as a module, BatchNorm, and a part of the forward without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.drop, self.three, self.p = nn.Dropout(0.3), nn.Linear(8, 4), 0.25

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.relu(self.norm(self.one(x))), self.p, self.training)
        with torch.no_grad():
            scale = x.abs().mean(1, keepdim=True)
        x = self.drop(self.two(x)) / (scale + 1)
        return self.three(F.dropout(x, p=self.p if self.training else 0.0))  # type: ignore[no-any-return]


def image(size: int) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8)


def rows(size: int) -> torch.Tensor:
    return torch.randn(size, 12)


def ids(size: int, most: int = 11) -> torch.Tensor:
    return torch.randint(1, most, (size, 5))


def classes(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target)


def reconstruction(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output["image"], target) + 0.1 * output["code"].pow(2).mean()


class Case(NamedTuple):
    """A module, a batch of its inputs of a given number of rows, the targets of one, and a loss."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], torch.Tensor] = lambda size: torch.randint(0, 4, (size,))
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = classes


CASES = {
    "unet": Case(UNet, image, lambda size: torch.randint(0, 2, (size, 8, 8))),
    "resnet": Case(ResNet, image),
    "densenet": Case(DenseNet, image),
    "vit": Case(ViT, image),
    "siamese": Case(Siamese, lambda size: (torch.randn(size, 6), torch.randn(size, 6))),
    "towers": Case(Towers, lambda size: {"image": image(size), "text": ids(size)}),
    "language": Case(Language, lambda size: ids(size, 13), lambda size: ids(size, 13)),
    "translator": Case(Translator, lambda size: {"src": ids(size), "tgt": ids(size, 13)}, lambda size: ids(size, 13)),
    "inception": Case(Inception, image),
    "autoencoder": Case(AutoEncoder, rows, rows, reconstruction),
    "tagger": Case(Tagger, ids),
    "mixer": Case(Mixer, lambda size: {"tokens": torch.randn(size, 5, 6)}),
    "albert": Case(Albert, lambda size: torch.randn(size, 5, 6)),
    "counting": Case(Counting, lambda size: torch.randn(size, 6)),
    "dropping": Case(Dropping, lambda size: torch.randn(size, 6)),
}  # fmt: skip
