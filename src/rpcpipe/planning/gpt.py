"""The costs of a GPT's layers by formula, to plan models too large to build here.

Operations as in Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM" (2021), section 5.1: a block's forward takes 24 t h² operations for the products with weights,
for t tokens, and 4 t s h for attention, whose backward has no weights' share. Activations as in
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equation 1:
34 t h bytes a block at two bytes a value, where attention does not keep its s × s scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpcpipe.errors import ArgumentError
from rpcpipe.planning.layer_cost import LayerCost

_PARAMETER = 4  # bytes: weights are kept in single precision, whatever autocast computes in


@dataclass(frozen=True)
class GPT:
    """The sizes of a GPT: ``layers`` blocks between an embedding and a head, which are layers too.

    Raises ArgumentError where these sizes make no model.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.heads, self.vocabulary, self.sequence) < 1:
            raise ArgumentError(f"a GPT's sizes must be at least 1: {self}")
        if self.hidden % self.heads:
            raise ArgumentError(f"hidden={self.hidden} cannot be shared among heads={self.heads}")

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(layer.parameter_bytes for layer in self.layer_costs(1, 1.0)) // _PARAMETER

    def layer_costs(self, micro_batch: int, flops: float, value: int = 2) -> list[LayerCost]:
        """Return the cost of every layer for ``micro_batch`` sequences at ``flops`` operations a second.

        ``value``: bytes of one value of an activation.
        """
        hidden, vocabulary, tokens = self.hidden, self.vocabulary, micro_batch * self.sequence

        def layer(
            name: str, parameters: int, kept: int, output: int, products: float = 0, attention: float = 0
        ) -> LayerCost:
            forward, inputs, weights = products + attention, products + 2 * attention, products
            return LayerCost(
                name, forward / flops, (inputs + weights) / flops, inputs / flops, weights / flops,
                kept, parameters * _PARAMETER, output,
            )  # fmt: skip

        stream = tokens * hidden * value  # bytes from one layer to the next
        block = layer(
            "block", 12 * hidden**2 + 13 * hidden, 17 * stream, stream,
            products=24 * tokens * hidden**2, attention=4 * tokens * self.sequence * hidden,
        )  # fmt: skip
        return [
            layer("embedding", (vocabulary + self.sequence) * hidden, 8 * tokens, stream),
            *[block] * self.layers,
            layer(
                "head", (vocabulary + 2) * hidden, 2 * stream + tokens * vocabulary * value, 0,
                products=2 * tokens * hidden * vocabulary,
            ),
        ]  # fmt: skip
