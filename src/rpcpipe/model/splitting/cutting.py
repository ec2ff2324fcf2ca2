"""Make the layers of the groups of operations: their names, their modules, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from rpcpipe.model.layers import Layer, Wired
from rpcpipe.model.microbatch import map_tensors
from rpcpipe.model.names import FREE, full_name
from rpcpipe.model.splitting.piece import TENSOR, Piece, Ports, part_of, put, put_tensor
from rpcpipe.model.splitting.program import Operation, Ref, State, name_of, stand_ins
from rpcpipe.model.splitting.recording import Recording, Sample


def layers_of(
    model: nn.Module, recording: Recording, groups: Sequence[Sequence[int]], sample: Sample
) -> dict[str, Layer]:
    """Return the layers for ``groups`` of operations by name; together they have all of the model's state."""
    flow = _Flow(recording, groups, sample)
    made: dict[str, Layer] = {}
    for index, numbers in enumerate(groups):
        operations = {number: recording.operations[number] for number in numbers}
        ports, wiring = flow.ports(index), flow.wiring(index)
        if (path := _alone(operations, ports)) is not None and path not in made:
            made[path] = model.get_submodule(path)
            continue
        piece = _piece(model, operations, ports)
        name = _unique(_name(model, operations), made)
        made[name] = Wired(piece, *wiring) if any(wiring) else piece
    return _with_rest(model, made)


def _alone(operations: Mapping[int, Operation], ports: Ports) -> str | None:
    """Return the path of the module that is called alone, with the running value, so that it is a layer itself."""
    if len(operations) != 1 or ports.inputs is not None or ports.taken or ports.given:
        return None
    [(number, one)] = operations.items()
    plain = one.kind == "module" and not one.kwargs and one.args == (ports.x,) and not one.without_grad
    return str(one.target) if plain and ports.output == Ref(number) else None


def _piece(model: nn.Module, operations: Mapping[int, Operation], ports: Ports) -> Piece:
    piece = Piece(operations, ports, model.training)
    for path in dict.fromkeys(str(one.target) for one in operations.values() if one.kind == "module"):
        put(piece, path, model.get_submodule(path), model)
    for one in operations.values():
        for scope in one.scopes[1:]:
            part_of(piece, scope, model)
    for used in stand_ins([ports.output, *((one.args, one.kwargs) for one in operations.values())]):
        if isinstance(used, State):
            put_tensor(piece, used.name, model)
    return piece


def _name(model: nn.Module, operations: Mapping[int, Operation]) -> str:
    """Return a name that says what a layer begins with and what follows."""
    called = [str(one.target) for one in operations.values() if one.kind == "module"]
    stateful = [path for path in called if model.get_submodule(path).state_dict()]
    functions = [name_of(one.target) for one in operations.values() if one.kind == "function" and not one.number]
    begins = (stateful or called or functions or ["input"])[0]
    return f"{begins}{FREE}{functions[-1] if functions and begins not in functions else ''}"


def _unique(name: str, taken: Iterable[str]) -> str:
    names = set(taken)
    return next(one for one in (name, *(f"{name}{count}" for count in range(2, len(names) + 3))) if one not in names)


class _Flow:
    """The values that pass between layers: as the running value, or under a name."""

    def __init__(self, recording: Recording, groups: Sequence[Sequence[int]], sample: Sample) -> None:
        self._last, self._output, self._sample = len(groups) - 1, recording.output, sample
        self._layer_of = {number: index for index, numbers in enumerate(groups) for number in numbers}
        self._operations = recording.operations
        self._users: dict[Ref, list[int]] = {}
        for index, numbers in enumerate(groups):
            used = list(stand_ins([(recording.operations[n].args, recording.operations[n].kwargs) for n in numbers]))
            used += list(stand_ins(recording.output)) if index == self._last else []
            for ref in dict.fromkeys(one for one in used if isinstance(one, Ref)):
                if self._made_in(ref) != index:
                    self._users.setdefault(ref, []).append(index)
        self._running = {index: self._running_after(index) for index in range(self._last)}
        self._names = self._named()

    def _made_in(self, ref: Ref) -> int:
        return self._layer_of.get(ref.op, 0)

    def _from_driver(self, ref: Ref) -> bool:
        return ref.op == 0 and self._sample.by_key

    def _running_after(self, layer: int) -> Ref | None:
        """Return the value that ``layer`` makes and only the next one uses, the last one if there are several."""
        found = [
            ref
            for ref, users in self._users.items()
            if users == [layer + 1] and self._made_in(ref) == layer and not self._from_driver(ref)
        ]
        numbers = {ref for ref in found if ref.op and self._operations[ref.op].number}
        return max(found, key=lambda ref: (ref not in numbers, ref.op, str(ref.path)), default=None)

    def _named(self) -> dict[Ref, str]:
        names: dict[Ref, str] = {}
        keys = set(self._sample.nest) if self._sample.by_key else set()
        for ref in sorted(self._users, key=lambda ref: (ref.op, str(ref.path))):
            if self._from_driver(ref) or ref in self._running.values():
                continue
            one = self._operations.get(ref.op)
            name = "input" if one is None else str(one.target) if one.kind == "module" else name_of(one.target)
            place = [one.scopes[-1], name] if one is not None and one.kind == "function" and one.scopes[-1] else [name]
            names[ref] = _unique(".".join(place), {*names.values(), *keys})
        return names

    def wiring(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names that ``layer`` takes and gives."""
        keys = [str(ref.path[0]) for ref in self._taken(layer) if self._from_driver(ref)]
        return (*keys, *(self._names[ref] for ref in self._named_of(layer))), tuple(
            self._names[ref] for ref in self._given(layer)
        )

    def ports(self, layer: int) -> Ports:
        """Return what ``layer`` gets and returns."""
        keys = tuple(Ref(0, ref.path[:1]) for ref in self._taken(layer) if self._from_driver(ref))
        output = self._output if layer == self._last else self._running[layer]
        x = Ref(0) if layer == 0 else self._running[layer - 1]
        inputs = None
        if layer == 0 and self._sample.structured:
            inputs = map_tensors(lambda _: TENSOR, self._sample.rows(1))
        return Ports(x, (*keys, *self._named_of(layer)), output, tuple(self._given(layer)), inputs)

    def _taken(self, layer: int) -> list[Ref]:
        """Return what ``layer`` uses of others, a value of the driver once for each key."""
        if layer == 0:
            return []
        found: dict[Any, Ref] = {}
        for ref, users in self._users.items():
            if layer in users:
                found.setdefault(ref.path[:1] if self._from_driver(ref) else ref, ref)
        return list(found.values())

    def _named_of(self, layer: int) -> list[Ref]:
        return [ref for ref in self._taken(layer) if ref in self._names]

    def _given(self, layer: int) -> list[Ref]:
        return [ref for ref in self._names if self._made_in(ref) == layer]


# --- state that no operation uses ---


def _with_rest(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers with what no operation uses of the model's state, where its tensors are or in the last one."""
    made, owners = dict(layers), dict[int, str]()
    owned: set[str] = set()
    for name, layer in layers.items():
        module = layer.layer if isinstance(layer, Wired) else layer
        assert isinstance(module, nn.Module)
        owned |= {full_name(name, key) for key in module.state_dict()}
        for tensor in (*module.parameters(), *module.buffers()):
            owners.setdefault(id(tensor), name)
    for key in model.state_dict():
        if key not in owned:
            path, _, own = key.rpartition(".")
            value = getattr(model.get_submodule(path), own, None)
            name = owners.get(id(value), next(reversed(made)))
            made = _opened_layer(model, made, name)
            name = name if name in made else f"{name}{FREE}"
            owned |= set(_add(model, _module(made[name]), key, owned))
    return made


def _module(layer: Layer) -> Piece:
    module = layer.layer if isinstance(layer, Wired) else layer
    assert isinstance(module, Piece)
    return module


def _opened_layer(model: nn.Module, layers: Mapping[str, Layer], name: str) -> dict[str, Layer]:
    """Return ``layers`` with the one called ``name`` as a Piece, which can have more than a module."""
    layer = layers[name]
    if isinstance(layer, (Wired, Piece)):
        return dict(layers)
    call = Operation("module", name, (Ref(0),), {}, ("",), "")
    piece = _piece(model, {1: call}, Ports(Ref(0), (), Ref(1), ()))
    return {f"{name}{FREE}" if key == name else key: piece if key == name else one for key, one in layers.items()}


def _add(model: nn.Module, piece: Piece, key: str, owned: set[str]) -> Iterator[str]:
    """Give ``piece`` the state called ``key``, with the outermost module around it of which no layer has anything."""
    parts = key.split(".")[:-1]
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if not any(one.startswith(f"{path}.") for one in owned) and not _holds(piece, path):
            put(piece, path, model.get_submodule(path), model)
            yield from (one for one in model.state_dict() if one.startswith(f"{path}."))
            return
    put_tensor(piece, key, model)
    yield key


def _holds(piece: Piece, path: str) -> bool:
    return path in dict(piece.named_modules(remove_duplicate=False))
