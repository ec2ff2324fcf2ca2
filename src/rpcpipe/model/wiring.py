"""Named values beside the chain of layers: which layers give and take them, and their routes between stages.

A value is sent from the stage that gives it directly to the next stage that takes it, from there to the
next taker, and so on. Its gradient returns along the same route, and every taker adds its contribution.
A stage that does not use the value does not receive it. On this route a value with several takers costs
its giver one message, and its gradient is summed from the last use to the first, which is autograd's
order in one process: the bits do not depend on the partition. The last taker is not delayed, because its
forward follows the forwards of the earlier takers in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rpcpipe.errors import ModelError
from rpcpipe.model.microbatch import Nest

# Stands for the driver in place of a stage; the driver sends inputs directly to every stage that takes them.
DRIVER = -1


class Wiring(NamedTuple):
    """Names of the values that one layer takes and gives beside the running value."""

    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


class ValueRoute(NamedTuple):
    """The value ``name`` is sent from stage ``source``, or the driver, to stage ``target``."""

    name: str
    source: int
    target: int


@dataclass(frozen=True)
class StageLinks:
    """Links between stages beside the running value, for one partition and placement.

    ``members`` maps a tied weight's group to the workers that hold a copy, in the order of the stages.
    """

    value_routes: tuple[ValueRoute, ...] = ()
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def value_routes(wirings: Iterable[Wiring], sizes: Sequence[int]) -> tuple[ValueRoute, ...]:
    """Return the routes of all values between stages of ``sizes`` layers; ``wirings``: of all layers, in order."""
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    holder: dict[str, int] = {}
    routes: set[ValueRoute] = set()
    for stage, wiring in zip(stage_of, wirings, strict=True):
        routes |= {ValueRoute(name, holder.get(name, DRIVER), stage) for name in wiring.takes}
        holder |= {name: stage for name in wiring.takes if name in holder} | dict.fromkeys(wiring.gives, stage)
    return tuple(sorted(route for route in routes if route.source != route.target))


def required_inputs(wirings: Mapping[str, Wiring]) -> dict[str, str]:
    """Return the names that must be among the inputs, each with the first layer that takes it."""
    given_names: set[str] = set()
    first_taker: dict[str, str] = {}
    for layer, wiring in wirings.items():
        for name in wiring.takes:
            if name not in given_names:
                first_taker.setdefault(name, layer)
        given_names |= set(wiring.gives)
    return first_taker


def outgoing(value_routes: Iterable[ValueRoute], stage: int, last_stage: int) -> dict[str, tuple[str, ...]]:
    """Return the names of the values that leave ``stage`` by each link, in ascending order of the target stage."""
    routes = [route for route in value_routes if route.source == stage]
    targets = {route.target for route in routes} | ({stage + 1} if stage < last_stage else set())
    return {
        link(stage, target): tuple(route.name for route in routes if route.target == target)
        for target in sorted(targets)
    }


def link(stage: int, other: int) -> str:
    """Return ``stage``'s name for its link with stage ``other``, or with the driver."""
    if abs(stage - other) == 1:
        return "input"
    return "inputs" if other == DRIVER else f"value of stage {other}"


def live_names(wirings: Sequence[Wiring], leaving: Iterable[str] = ()) -> list[frozenset[str]]:
    """Return for every layer the names needed after it: taken by later layers, or ``leaving`` the stage."""
    needed = frozenset(leaving)
    needed_after = []
    for wiring in reversed(wirings):
        needed_after.append(needed)
        needed = needed - set(wiring.gives) | set(wiring.takes)
    return needed_after[::-1]


# (the running value, named values)
Flow = tuple[Nest, dict[str, Nest]]


def advance(layer: Callable[..., Any], wiring: Wiring, flow: Flow, live_names: Collection[str]) -> Flow:
    """Run ``layer`` on ``flow`` and return the flow after it, with only those named values that are in ``live_names``.

    Raises ModelError if the layer does not return as many values as it gives.
    """
    x, values = flow
    result = layer(x, *(values[name] for name in wiring.takes))
    if not (wiring.takes or wiring.gives):
        return result, values
    if wiring.gives:
        if not isinstance(result, (tuple, list)) or len(result) != 1 + len(wiring.gives):
            raise ModelError(
                f"a layer that gives {', '.join(map(repr, wiring.gives))} returns (x, {', '.join(wiring.gives)}),"
                f" a tuple of {1 + len(wiring.gives)}, not {_shape(result)}"
            )
        result, *given_values = result
        values = values | dict(zip(wiring.gives, given_values, strict=True))
    return result, {name: value for name, value in values.items() if name in live_names}


def _shape(result: Any) -> str:
    type_name = type(result).__name__
    return f"a {type_name} of {len(result)}" if isinstance(result, (tuple, list)) else f"a {type_name}"
