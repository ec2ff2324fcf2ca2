"""The costs of a GPT's layers by formula, to plan models too large to build here.

Operations as in Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM" (2021), section 5.1: a block's forward takes 24 t h² operations for the products with weights,
for t tokens, and 4 t s h for attention, whose backward has no weights' share. Activations as in
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equation 1:
t h (34 + 5 a s / h) bytes a block at two bytes a value, of which the second term, attention's s × s scores for a heads,
is kept only where attention is not one kernel (``scores``). Under autocast a block keeps its weights, cast, as well,
for every micro-batch whose backward is to come: neither paper has that, as their weights are of 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpcpipe.errors import ArgumentError
from rpcpipe.planning.layer_cost import LayerCost

# Bytes of one value.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class GPT:
    """The sizes of a GPT: ``layers`` blocks between an embedding and a head, which are layers too.

    ``dtype``: of weights, and so of gradients and the optimizer's state. ``autocast``: what layers compute in, None for
    ``dtype``. ``scores``: attention keeps them. Raises ArgumentError where these sizes make no model.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    dtype: str = "float32"
    autocast: str | None = "bfloat16"
    scores: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.heads, self.vocabulary, self.sequence) < 1:
            raise ArgumentError(f"a GPT's sizes must be at least 1: {self}")
        if self.hidden % self.heads:
            raise ArgumentError(f"hidden={self.hidden} cannot be shared among heads={self.heads}")

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(layer.parameter_bytes for layer in self.layer_costs(1, 1.0)) // DTYPES[self.dtype]

    def layer_costs(self, micro_batch: int, flops: float) -> list[LayerCost]:
        """Return the cost of every layer for ``micro_batch`` sequences at ``flops`` operations a second."""
        hidden, vocabulary, tokens = self.hidden, self.vocabulary, micro_batch * self.sequence
        computed = self.autocast or self.dtype
        value, casts = DTYPES[computed], computed != self.dtype

        def layer(
            name: str, parameters: int, kept: int, output: int, widest: int, cast: int = 0, products: float = 0,
            attention: float = 0,
        ) -> LayerCost:  # fmt: skip
            forward, inputs, weights = products + attention, products + 2 * attention, products
            activations = kept + cast * value * casts
            return LayerCost(
                name, forward / flops, (inputs + weights) / flops, inputs / flops, weights / flops,
                activations, parameters * DTYPES[self.dtype], output, peak_bytes=activations + widest,
            )  # fmt: skip

        stream = tokens * hidden * value  # bytes from one layer to the next
        scores = 5 * self.heads * self.sequence * tokens * value // 2 if self.scores else 0
        logits = tokens * vocabulary * value
        # Beside what is kept, a backward has the gradients of the feed-forward's two widest values and of its output.
        block = layer(
            "block", 12 * hidden**2 + 13 * hidden, 17 * stream + scores, stream, 9 * stream, 12 * hidden**2,
            products=24 * tokens * hidden**2, attention=4 * tokens * self.sequence * hidden,
        )  # fmt: skip
        return [
            layer("embedding", (vocabulary + self.sequence) * hidden, 8 * tokens, stream, 2 * stream),
            *[block] * self.layers,
            layer(
                "head", (vocabulary + 2) * hidden, 2 * stream + logits, 0, logits, vocabulary * hidden,
                products=2 * tokens * hidden * vocabulary,
            ),
        ]  # fmt: skip
