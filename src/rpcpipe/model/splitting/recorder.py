"""Run a model's forward on a sample and record the calls that it makes, of submodules and of torch's functions.

The forward runs as it is, on tensors with values. A TorchFunctionMode sees every function of torch that it calls;
the modules are copies, and each tells when it is called. What Python's own code does, between these calls, is done
once for good, so that it may depend on sizes alone (``numbers``): what asks for values is refused.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rpcpipe.errors import ModelError
from rpcpipe.model import nest_types
from rpcpipe.model.splitting.numbers import Number, Shape, number
from rpcpipe.model.splitting.program import (
    Device,
    Getter,
    Operation,
    Ref,
    State,
    items,
    rebuilt,
    set_item,
    size,
    stand_ins,
)
from rpcpipe.model.splitting.watch import place, random_state, told_of_calls, told_of_custom_functions

# What may be asked of a tensor beside its shape: its value does not decide.
_PROPERTIES = frozenset((
    "device", "dtype", "layout", "is_floating_point", "is_complex", "is_signed", "dim", "ndim",
    "ndimension", "is_contiguous", "stride", "storage_offset", "element_size", "itemsize", "nbytes", "is_cuda",
    "is_cpu", "is_mps", "is_xpu", "is_sparse", "is_nested", "is_quantized", "is_meta", "is_conj", "is_neg",
    "result_type", "can_cast", "type", "get_device", "is_same_size", "is_mkldnn", "is_inference",
))  # fmt: skip
_RESULTS = (bool, int, float, list)  # of functions that read values
_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, range, type, FunctionType, BuiltinFunctionType, ModuleType, enum.Enum, type(Ellipsis), torch.Generator,
)  # fmt: skip


class Refused(ModelError):
    """A part of a forward that cannot be recorded; ``scopes`` are the paths of the modules that it is in."""

    def __init__(self, message: str, scopes: tuple[str, ...] = ("",)) -> None:
        super().__init__(message)
        self.scopes = scopes


class Recorder(TorchFunctionMode):
    """Records the operations of one forward of ``model``; modules at the paths in ``closed`` are called whole.

    ``device``: the sample's.
    """

    def __init__(self, model: nn.Module, closed: frozenset[str], device: torch.device) -> None:
        super().__init__()
        self.operations: dict[int, Operation] = {}
        self.mutations: list[tuple[int, int]] = []  # (operation, storage that it changed)
        self.storages: dict[Ref, int] = {}
        self.elements: dict[int, int] = {}  # of an operation's outputs
        self._model, self._closed, self._device = model, closed, device
        self._known: dict[int, tuple[torch.Tensor, Ref]] = {}  # by id; the tensor is kept, and so is its id
        self._states: dict[int, list[str]] = {}
        self._scopes: list[str] = [""]
        self._paused = False
        self._random = random_state()
        self._refusal: Refused | None = None
        self._raised_in: dict[int, list[str]] = {}
        self._grad, self._autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)
        for name, tensor in _named_tensors(model):
            self._states.setdefault(id(tensor), []).append(name)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any) -> Any:
        """Record ``model(*args, **kwargs)``, whose tensors are in ``inputs``; return its output with stand-ins.

        Raises Refused for what cannot be recorded.
        """
        self._keep(inputs, Ref(0))
        try:
            with ExitStack() as stack:
                stack.enter_context(told_of_calls(self._model, self._called))
                stack.enter_context(told_of_custom_functions(self._apply))
                stack.enter_context(self)
                output = self._model(*args, **kwargs)
            self._check_random()
            put = self._put(output, "it returns")
        except Refused:
            raise
        except Exception as error:
            self._scopes = self._raised_in.get(id(error), self._scopes)
            raise self._refused(f"while it is traced it raises {type(error).__name__}: {error}", error) from error
        if self._refusal is not None:  # the forward has caught it
            raise self._refusal
        return put

    # --- calls ---

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        return self.call(func, tuple(args), kwargs or {})

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record ``function(*args, **kwargs)``, one of torch's or of numbers, and return what it returns."""
        function = _portable(function)
        self._check_random()
        if (shape := self._shape(function, args, kwargs)) is not None:
            return shape
        put = self._put((args, kwargs), "it passes")
        real_args, real_kwargs = _values((args, kwargs))
        tensors = list(_tensors((args, kwargs)))
        before = [(tensor, tensor._version) for tensor in tensors]
        drawn = _drawn(self._device) if (settled := self._is_settled(put)) else b""
        result = function(*real_args, **real_kwargs)
        if not tensors and not _any_tensor(result) and not _any_number((args, kwargs)):
            return result  # torch.set_grad_enabled and its like
        name = str(getattr(function, "__name__", getattr(function, "name", "")))
        if tensors and result is not None and not _any_tensor(result):
            return self._property(function, put, name, result)
        operation = self._append("function", function, *put)
        operation.facts["number"] = not tensors and not _any_tensor(result)
        operation.facts["settled"] = settled and drawn == _drawn(self._device)
        self._note_changes(before)
        return self._known_result(result)

    def _called(self, path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of the module at ``path``, or what its forward does."""
        if self._paused:
            return call(*args, **kwargs)
        self._check_random()
        if path not in self._closed:
            return self._open(path, call, args, kwargs)
        return self._whole("module", path, call, args, kwargs)

    def _open(self, path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._scopes.append(path)
        try:
            result = call(*args, **kwargs)
            self._check_random()
        except Exception as error:
            self._raised_in.setdefault(id(error), list(self._scopes))
            raise
        finally:
            self._scopes.pop()
        return result

    def _apply(self, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a ``torch.autograd.Function``."""
        return apply(*args, **kwargs) if self._paused else self._whole("function", apply, apply, args, kwargs)

    def _whole(self, kind: str, target: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._paused = True
        try:
            put = self._put((args, kwargs), "it passes")
            args, kwargs = _values((args, kwargs))
            before = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
            result = call(*args, **kwargs)
            self._random = random_state()
            self._append(kind, target, *put)
            self._note_changes(before)
            return self._known_result(result)
        finally:
            self._paused = False

    def _shape(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the answer to a question about a tensor's shape, in numbers; None for any other function."""
        name = getattr(function, "name", getattr(function, "__name__", ""))
        if name not in ("shape", "size", "__len__", "numel", "nelement") or not isinstance(args[0], torch.Tensor):
            return None
        tensor = args[0]
        if name == "size" and (len(args) > 1 or kwargs):
            return self._size(tensor, operator.index(args[1] if len(args) > 1 else kwargs["dim"]))
        if name == "__len__":
            return self._size(tensor, 0).__index__()  # Python makes an int of it
        shape = Shape(self._size(tensor, dim) for dim in range(len(_raw_shape(tensor))))
        return shape.numel() if name in ("numel", "nelement") else shape

    def _size(self, tensor: torch.Tensor, dim: int) -> Any:
        put = self._put(((tensor, dim), {}), "it passes")
        self._append("function", size, *put).facts["number"] = True
        return self._known_result(_raw_shape(tensor)[dim])

    def _property(self, function: Any, put: tuple[Any, Any], name: str, result: Any) -> Any:
        if name not in _PROPERTIES and not (self._is_settled(put) and type(result) in _RESULTS):
            raise self._refused(f"it reads a tensor's values by {name.strip('_')}(), which differ from batch to batch")
        if not isinstance(result, torch.device):
            self._append("check", function, *put).facts.update(outcome=result, operands=())
        return result

    def _is_settled(self, put: Any) -> bool:
        """Return whether a call has no operands but those made of sizes: its result is the same for every batch."""
        operands = [used for used in stand_ins(put) if isinstance(used, (Ref, State))]
        return all(
            isinstance(used, Ref) and used.op and (one := self.operations[used.op]) and (one.number or one.settled)
            for used in operands
        )

    # --- numbers ---

    def compare(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return a comparison of numbers, as checked whenever the layers run."""
        operands = _values(args)
        outcome = function(*operands)
        if not self._paused:
            put = self._put((args, {}), "it compares")
            self._append("check", function, *put).facts.update(outcome=outcome, operands=operands)
        return outcome

    def fix(self, number: Number) -> Any:
        """Return the value of ``number``, as checked whenever the layers run."""
        if not self._paused and number.ref.op in self.operations:
            put = self._put(((number, number.value), {}), "it fixes")
            self._append("fixed", operator.eq, *put).facts.update(outcome=True, operands=(number.value,))
        return number.value

    # --- values ---

    def _append(self, kind: str, target: Any, args: Any, kwargs: Any) -> Operation:
        if torch.is_autocast_enabled(self._device.type) != self._autocast:
            raise self._refused("it switches autocast on or off")
        without_grad = self._grad and not torch.is_grad_enabled()
        operation = Operation(kind, target, args, kwargs, tuple(self._scopes), place(), without_grad)
        self.operations[len(self.operations) + 1] = operation
        return operation

    def _known_result(self, result: Any) -> Any:
        """Return what the last operation returned, with its numbers knowing that, and remember its tensors."""
        index = len(self.operations)
        self.elements[index] = sum(tensor.numel() for tensor in _tensors(result))
        return self._keep(result, Ref(index))

    def _keep(self, nest: Any, ref: Ref) -> Any:
        if isinstance(nest, torch.Tensor):
            if id(nest) not in self._states:  # a buffer changed in place is still that buffer
                self._known[id(nest)] = nest, ref
                self.storages[ref] = _storage(nest)
            return nest
        if items(nest) is None:
            if not isinstance(nest, _CONSTANTS):
                raise self._refused(f"it gets a {type(nest).__name__} from a call, in which tensors cannot be followed")
            return number(self, ref, nest) if ref.op else nest
        kept = [self._keep(part, Ref(ref.op, (*ref.path, key))) for key, part in items(nest) or ()]
        if not any(isinstance(part, Number) for part in kept) or hasattr(type(nest), "n_fields"):
            return nest
        parts = iter(kept)
        return rebuilt(nest, lambda *_: next(parts))

    def _put(self, nest: Any, what: str) -> Any:
        """Return ``nest`` with stand-ins for tensors, numbers and the device."""
        if isinstance(nest, torch.Tensor):
            return self._stand_in(nest)
        if isinstance(nest, Number):
            return nest.ref
        if isinstance(nest, torch.device) and nest == self._device:
            return Device()
        if isinstance(nest, slice):
            return slice(*(self._put(part, what) for part in (nest.start, nest.stop, nest.step)))
        if items(nest) is not None:
            return rebuilt(nest, lambda _, part: self._put(part, what))
        if not isinstance(nest, _CONSTANTS) or _holds(nest):
            raise self._refused(f"{what} a {type(nest).__name__}, in which tensors cannot be followed")
        return nest

    def _stand_in(self, tensor: torch.Tensor) -> Ref | State:
        if names := self._states.get(id(tensor)):
            return State(max(names, key=lambda name: _common(name, self._scopes[-1])))
        found = self._known.get(id(tensor))
        if found is None:
            raise self._refused(
                f"it uses a tensor of shape {tuple(_raw_shape(tensor))} that is neither a parameter nor a buffer and"
                " that no call made: register it as a buffer (persistent=False keeps it out of state_dict)"
            )
        return found[1]

    def _note_changes(self, before: list[tuple[torch.Tensor, int]]) -> None:
        index = len(self.operations)
        self.mutations += [(index, _storage(tensor)) for tensor, version in before if tensor._version != version]

    # --- refusals ---

    def _refused(self, why: str, error: BaseException | None = None) -> Refused:
        kind = type(self._model.get_submodule(self._scopes[-1])).__name__
        name = f"{self._scopes[-1]}, a {kind}," if self._scopes[-1] else f"the {kind}"
        refused = Refused(f"{place(error)}: the forward of {name} cannot be split: {why}", tuple(self._scopes))
        self._refusal = self._refusal or refused
        return refused

    def _check_random(self) -> None:
        """Raise Refused if Python's own code has drawn random numbers, or seeded torch's, since the last call."""
        if random_state() != self._random:
            raise self._refused(
                "it draws random numbers of Python's or numpy's, or seeds torch's, which would happen once for good;"
                " draw them with torch, and without asking for their values"
            )


def _portable(function: Any) -> Any:
    """Return a recorded function as one that can be pickled, and that returns the tensor that it changes."""
    if function is torch.Tensor.__setitem__:
        return set_item
    owner = getattr(function, "__self__", None)
    if getattr(function, "__name__", "") == "__get__" and owner is not None:
        return Getter(str(owner.__name__))
    return function


def _holds(constant: Any) -> bool:
    """Return whether a constant is a function that may use tensors or modules of the forward."""
    if not isinstance(constant, FunctionType):
        return False
    return constant.__closure__ is not None or nest_types.trainable(constant) is not None


def _values(nest: Any) -> Any:
    """Return ``nest`` with the values of numbers in place of them."""
    if isinstance(nest, Number):
        return nest.value
    if isinstance(nest, slice):
        return slice(*(_values(part) for part in (nest.start, nest.stop, nest.step)))
    if isinstance(nest, Shape):
        return torch.Size(_values(tuple(nest)))
    return nest if items(nest) is None or not _any_number(nest) else rebuilt(nest, lambda _, part: _values(part))


def _leaves(nest: Any) -> Iterator[Any]:
    if isinstance(nest, slice):
        yield from _leaves((nest.start, nest.stop, nest.step))
    elif items(nest) is None:
        yield nest
    else:
        for _, part in items(nest) or ():
            yield from _leaves(part)


def _tensors(nest: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in _leaves(nest) if isinstance(leaf, torch.Tensor))


def _any_tensor(nest: Any) -> bool:
    return any(True for _ in _tensors(nest))


def _any_number(nest: Any) -> bool:
    return any(isinstance(leaf, Number) for leaf in _leaves(nest))


def _raw_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    with torch._C.DisableTorchFunction():
        return tuple(tensor.shape)


def _drawn(device: torch.device) -> bytes:
    """Return the state of torch's generators, which a function that draws numbers changes."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    with torch._C.DisableTorchFunction():
        return b"".join(bytes(generator.get_state().numpy()) for generator in generators)


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _common(name: str, scope: str) -> int:
    """Return how many parts of its path ``name`` has in common with ``scope``."""
    pairs = zip(name.split("."), scope.split("."), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(scope))
