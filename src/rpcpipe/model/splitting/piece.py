"""A layer made by ``split``: some operations of a model's forward, with the modules and parameters that they use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ModelError
from rpcpipe.model.microbatch import Nest, flatten, tensors
from rpcpipe.model.splitting.program import ByMode, Operation, Ref, State, check, name_of, part_at, replaced, stand_ins


@dataclass(frozen=True)
class Ports:
    """What a layer gets and returns: ``x`` (None: nothing that it uses) and ``taken``; ``output`` and ``given``.

    ``inputs``: for the first layer, the sample whose structure and plain values all inputs must have.
    """

    x: Ref | None
    taken: tuple[Ref, ...]
    output: Any
    given: tuple[Ref, ...]
    inputs: Nest = None


_AS_IT_IS = nullcontext()


class Part(nn.Module):
    """Stands in the tree of a layer for an opened module: it has its mode, and those of its tensors that are used."""


class Piece(nn.Module):
    """Runs ``operations``. Modules and tensors have their paths and names in the whole model.

    It is called with what ``ports`` say, and returns that.
    """

    def __init__(self, operations: Mapping[int, Operation], ports: Ports, training: bool) -> None:
        super().__init__()
        self.training = training
        self._operations, self._ports = dict(operations), ports
        self._wanted, self._dropped = _lifetimes(self._operations, ports)

    def forward(self, x: Nest, *taken: Nest) -> Nest:
        """Return the running value, and after it the values that the layer gives, if there are any."""
        if self._ports.inputs is not None:
            _check_inputs(x, self._ports.inputs)
        values: dict[Ref, Any] = {}
        for base, value in ((self._ports.x, x), *zip(self._ports.taken, taken, strict=True)):
            for ref in self._wanted.get(base, ()) if base is not None else ():
                values[ref] = part_at(value, ref.path[len(base.path) :])  # type: ignore[union-attr]
        stand_in = self._values(values, (x, taken))
        for index, one in self._operations.items():
            self._run(index, one, values, stand_in)
            for ref in self._dropped.get(index, ()):
                values.pop(ref, None)
        output = replaced(self._ports.output, stand_in)
        return (output, *(values[ref] for ref in self._ports.given)) if self._ports.given else output

    def _run(self, index: int, one: Operation, values: dict[Ref, Any], stand_in: Callable[[Any], Any]) -> None:
        args, kwargs = replaced(one.args, stand_in), replaced(one.kwargs, stand_in)
        if one.checks:
            return check(one, args, kwargs)
        function = self._submodule(one.target) if one.kind == "module" else one.target
        with torch.no_grad() if one.without_grad else _AS_IT_IS:
            result = function(*args, **kwargs)
        for ref in self._wanted.get(index, ()):
            values[ref] = part_at(result, ref.path)
        return None

    def _submodule(self, path: str) -> nn.Module:
        """Return ``get_submodule(path)``, ten times as fast."""
        found: Any = self
        for name in path.split(".") if path else ():
            found = found._modules[name]
        return found  # type: ignore[no-any-return]

    def _values(self, values: Mapping[Ref, Any], received: Nest) -> Callable[[Any], Any]:
        """Return a function from stand-ins to their values."""

        def value(stand_in: Any) -> Any:
            if type(stand_in) is Ref:
                return values[stand_in]
            if type(stand_in) is State:
                path, _, key = stand_in.name.rpartition(".")
                return getattr(self._submodule(path), key)
            if type(stand_in) is ByMode:
                return stand_in.training if self._submodule(stand_in.path).training else stand_in.evaluation
            owned = (*tensors(received), *self.parameters(), *self.buffers())
            return owned[0].device if owned else torch.get_default_device()

        return value

    def extra_repr(self) -> str:
        """Return the operations in short, for ``repr``."""
        made = [one for one in self._operations.values() if not (one.number or one.checks)]
        return ", ".join(str(one.target) if one.kind == "module" else name_of(one.target) for one in made)


# Not methods of Piece, whose submodules have the names that the model gives them.


def put(piece: Piece, path: str, module: nn.Module, model: nn.Module) -> None:
    """Make ``module`` the submodule of ``piece`` at ``path``, in parts that have the modes of those of ``model``."""
    outer, _, name = path.rpartition(".")
    part_of(piece, outer, model).add_module(name, module)


def part_of(piece: Piece, path: str, model: nn.Module) -> nn.Module:
    """Return the submodule of ``piece`` at ``path``, made if it is not there."""
    found: nn.Module = piece
    names = path.split(".") if path else []
    for count, name in enumerate(names):
        if name not in dict(found.named_children()):
            made = Part()
            made.training = model.get_submodule(".".join(names[: count + 1])).training
            found.add_module(name, made)
        found = found.get_submodule(name)
    return found


def put_tensor(piece: Piece, name: str, model: nn.Module) -> None:
    """Give ``piece`` the parameter or buffer of ``model`` that is called ``name``, unless a module there has it."""
    path, _, key = name.rpartition(".")
    owner, part = model.get_submodule(path), part_of(piece, path, model)
    if key in {**dict(part.named_parameters()), **dict(part.named_buffers())}:
        return
    tensor = getattr(owner, key)
    if isinstance(tensor, nn.Parameter):
        part.register_parameter(key, tensor)
    else:
        part.register_buffer(key, tensor, persistent=key in owner.state_dict())


def _check_inputs(inputs: Nest, sample: Nest) -> None:
    """Raise ModelError for inputs of another structure than the sample's, or with other plain values."""
    (leaves, spec), (wanted, wanted_spec) = flatten(inputs), flatten(sample)
    if spec != wanted_spec:
        now, then = (" ".join(str(one).removeprefix("TreeSpec").split()) for one in (spec, wanted_spec))
        raise ModelError(
            f"the inputs are {now} and were {then} in the sample with which the model was split: split it with a sample"
            " like these inputs"
        )
    for leaf, known in zip(leaves, wanted, strict=True):
        if isinstance(leaf, torch.Tensor) != (known is TENSOR) or (known is not TENSOR and leaf != known):
            raise ModelError(
                f"the inputs have {leaf if not isinstance(leaf, torch.Tensor) else 'a tensor'!r:.80} where the sample"
                f" with which the model was split had {known!r:.80}: split it with a sample like these inputs"
            )


class _Tensor:
    """Stands for any tensor."""

    def __repr__(self) -> str:
        return "a tensor"

    def __reduce__(self) -> str:
        return "TENSOR"


TENSOR = _Tensor()


Wanted = dict[Ref | int, list[Ref]]


def _lifetimes(operations: Mapping[int, Operation], ports: Ports) -> tuple[Wanted, dict[int, list[Ref]]]:
    """Return the parts used of each value that comes in, or that an operation makes, and what each uses last."""
    leaving = {*_refs(ports.output), *ports.given}
    last = {ref: index for index, one in operations.items() for ref in _refs((one.args, one.kwargs))}
    wanted = defaultdict[Ref | int, list[Ref]](list)
    bases = [base for base in (ports.x, *ports.taken) if base is not None]
    for ref in {**last, **dict.fromkeys(leaving)}:
        coming = [base for base in bases if ref.op == base.op and ref.path[: len(base.path)] == base.path]
        wanted[ref.op if ref.op in operations else coming[-1]].append(ref)
    dropped = defaultdict[int, list[Ref]](list)
    for ref, index in last.items():
        if ref not in leaving:
            dropped[index].append(ref)
    return dict(wanted), dict(dropped)


def _refs(nest: Any) -> Iterable[Ref]:
    return (used for used in stand_ins(nest) if isinstance(used, Ref))
