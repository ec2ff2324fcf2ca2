"""What the driver gives for a batch, and on which ways named values go as the model is cut now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcpipe import program, wires
from rpcpipe.layers import check_inputs
from rpcpipe.messages import Port
from rpcpipe.microbatch import Nest

if TYPE_CHECKING:
    from rpcpipe.pipeline import Pipeline


def hops(pipe: Pipeline) -> tuple[wires.Hop, ...]:
    """The ways of named values between the stages."""
    return wires.hops(pipe._wires.values(), pipe.balance)


def given(pipe: Pipeline, parts: list[Nest], targets: list[Nest] | None) -> dict[Port, Any]:
    """The micro-batches' inputs and targets by the port that awaits them; ValueError if a name is missing."""
    check_inputs(parts[0], pipe._wires)
    return program.given(parts, targets, pipe.schedule.stages, hops(pipe))
