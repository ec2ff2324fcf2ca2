"""The demo's and the bench's model: a GPT as a list of layers."""

from __future__ import annotations

import torch
from torch import nn

import rpcpipe as rp


class Embed(nn.Module):
    """(batch, time) token ids → (batch, time, dim): token plus position embedding."""

    def __init__(self, vocabulary: int, dim: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(context, dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return out


class Block(nn.Module):
    """Pre-norm transformer block with causal attention and a 4× GELU feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, dim = x.shape
        shape = (batch, time, 3, self.heads, dim // self.heads)
        query, key, value = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, dim))
        out: torch.Tensor = x + self.feed(self.norm2(x))
        return out


class Head(nn.Module):
    """(batch, time, dim) → (batch, time, vocabulary) logits."""

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.logits = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.logits(self.norm(x))
        return out


def gpt(vocabulary: int, dim: int, heads: int, blocks: int, context: int, dropout: float = 0.0) -> list[rp.LayerSpec]:
    """The layers, each built on its worker."""
    return [
        rp.LayerSpec(Embed, vocabulary, dim, context),
        *(rp.LayerSpec(Block, dim, heads, dropout) for _ in range(blocks)),
        rp.LayerSpec(Head, dim, vocabulary),
    ]


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all positions."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
