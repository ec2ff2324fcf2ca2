"""Named values that leave the chain of layers: who gives, who takes, and the way between stages.

A value goes from the stage that gives it straight to the next stage that takes it, from there to the
next one that takes it, and so on; its gradient goes the same way back, every taker adding its own.
No stage that does not use it sees it. Sent along from user to user, a value that several stages take
costs its giver one message, and its gradient is summed from the last use to the first, which is
autograd's order in one process: the bits do not depend on the cut. The last taker waits no longer
for that: its forward follows the forwards of the takers before it in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rpcpipe.model.microbatch import Nest

# In place of a stage: the driver, whose inputs go straight to every stage that takes them.
DRIVER = -1


class Wiring(NamedTuple):
    """What one layer takes and gives beside the running value."""

    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


class ValueRoute(NamedTuple):
    """The value ``name`` goes from stage ``source``, or the driver, to stage ``target``."""

    name: str
    source: int
    target: int


@dataclass(frozen=True)
class StageLinks:
    """What joins stages beside the running value, as the model is cut and placed now.

    ``members``: by a tied weight's group, the workers that have a copy, in the stages' order.
    """

    value_routes: tuple[ValueRoute, ...] = ()
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def value_routes(wirings: Iterable[Wiring], sizes: Sequence[int]) -> tuple[ValueRoute, ...]:
    """Every value's way between stages of ``sizes`` layers; ``wirings``: of all layers, in order."""
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    holder: dict[str, int] = {}
    found: set[ValueRoute] = set()
    for stage, wiring in zip(stage_of, wirings, strict=True):
        found |= {ValueRoute(name, holder.get(name, DRIVER), stage) for name in wiring.takes}
        holder |= {name: stage for name in wiring.takes if name in holder} | dict.fromkeys(wiring.gives, stage)
    return tuple(sorted(route for route in found if route.source != route.target))


def required_inputs(wirings: Mapping[str, Wiring]) -> dict[str, str]:
    """The names that must be among the inputs, and the first layer that takes each."""
    given: set[str] = set()
    found: dict[str, str] = {}
    for layer, wiring in wirings.items():
        for name in wiring.takes:
            if name not in given:
                found.setdefault(name, layer)
        given |= set(wiring.gives)
    return found


def outgoing(value_routes: Iterable[ValueRoute], stage: int, last_stage: int) -> dict[str, tuple[str, ...]]:
    """The names that leave ``stage`` by each of its links, ascending by the stage where it ends."""
    mine = [route for route in value_routes if route.source == stage]
    targets = {route.target for route in mine} | ({stage + 1} if stage < last_stage else set())
    return {
        link(stage, target): tuple(route.name for route in mine if route.target == target) for target in sorted(targets)
    }


def link(stage: int, other: int) -> str:
    """What ``stage`` calls its connection with stage ``other``, or the driver: the slot of what comes by it."""
    if abs(stage - other) == 1:
        return "input"
    return "inputs" if other == DRIVER else f"value of stage {other}"


def live_names(wirings: Sequence[Wiring], leaving: Iterable[str] = ()) -> list[frozenset[str]]:
    """For every layer the names that are needed after it: by later layers, or as they are ``leaving``."""
    needed = frozenset(leaving)
    found = []
    for wiring in reversed(wirings):
        found.append(needed)
        needed = needed - set(wiring.gives) | set(wiring.takes)
    return found[::-1]


# (the running value, named values)
Flow = tuple[Nest, dict[str, Nest]]


def advance(layer: Callable[..., Any], wiring: Wiring, flow: Flow, live_names: Collection[str]) -> Flow:
    """What flows on behind ``layer``; of the named values those that are ``live_names``."""
    x, values = flow
    result = layer(x, *(values[name] for name in wiring.takes))
    if not (wiring.takes or wiring.gives):
        return result, values
    if wiring.gives:
        if not isinstance(result, (tuple, list)) or len(result) != 1 + len(wiring.gives):
            raise TypeError(
                f"a layer that gives {', '.join(map(repr, wiring.gives))} returns (x, {', '.join(wiring.gives)}),"
                f" a tuple of {1 + len(wiring.gives)}, not {_shape(result)}"
            )
        result, *given = result
        values = values | dict(zip(wiring.gives, given, strict=True))
    return result, {name: value for name, value in values.items() if name in live_names}


def _shape(result: Any) -> str:
    kind = type(result).__name__
    return f"a {kind} of {len(result)}" if isinstance(result, (tuple, list)) else f"a {kind}"
