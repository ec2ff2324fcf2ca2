"""Which submodules are opened into their own parts, and which stay whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from rpcpipe.errors import ModelError
from rpcpipe.model.containers import beside_forward
from rpcpipe.model.splitting.program import Operation, Ref, stand_ins
from rpcpipe.model.splitting.recorder import Refused
from rpcpipe.model.splitting.recording import Recording, Sample, record
from rpcpipe.model.splitting.watch import depth

# Shares of the model's parameters or activations. A module with less stays whole: the cut gains nothing by its parts.
# One whose parts pass more than one value on is opened only if it has so much that it would hinder an even cut.
_SMALL, _LARGE = 1 / 32, 1 / 8


def opened(model: nn.Module, sample: Sample) -> Recording:
    """Return the forward of ``model``, recorded with those submodules opened that are worth it.

    Raises ModelError, with the place, if the model's own forward cannot be recorded.
    """
    closed = frozenset(path for path, module in model.named_modules() if path and _stays_whole(module))
    closed, recording, refusals = _recorded(model, sample, closed)
    _warn_of_large(model, refusals)
    whole = frozenset(_not_worth_it(model, recording, sample.by_key))
    if not whole:
        return recording
    try:
        return record(model, sample, closed | whole)
    except ModelError:
        return recording  # their arguments are objects that cannot be followed


def _stays_whole(module: nn.Module) -> bool:
    """Return whether a module has nothing to open, or more than its forward."""
    if not any(True for _ in module.children()) or isinstance(module, (nn.MultiheadAttention, torch.jit.ScriptModule)):
        return True
    return next(beside_forward(module), None) is not None or type(module).__name__ == "OptimizedModule"


def _recorded(
    model: nn.Module, sample: Sample, closed: frozenset[str]
) -> tuple[frozenset[str], Recording, dict[str, Refused]]:
    """Return the modules that are closed, the recording, and why those are closed that cannot be recorded."""
    refusals: dict[str, Refused] = {}
    for _ in model.modules():
        try:
            return closed, record(model, sample, closed), refusals
        except Refused as refused:
            inner = [path for path in refused.scopes if path and path not in closed]
            if not inner:
                raise ModelError(
                    f"{refused}. Move that part of the forward into a submodule, which stays whole then and does there"
                    " what it likes, or write the model as a list of layers for rp.Pipeline"
                ) from refused
            refusals[inner[-1]] = refused
            closed |= {inner[-1]}
    raise AssertionError("every round closes a module, and with all of them closed the model's forward is left")


def _warn_of_large(model: nn.Module, refusals: Mapping[str, Refused]) -> None:
    """Warn of modules that stay whole although they have much of the model."""
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    for path, refused in refusals.items():
        share = sum(parameter.numel() for parameter in model.get_submodule(path).parameters()) / total
        if share >= _LARGE and not any(path.startswith(f"{outer}.") for outer in refusals):
            warnings.warn(f"{path} stays one layer, with {share:.0%} of the parameters. {refused}", stacklevel=depth())


def _not_worth_it(model: nn.Module, recording: Recording, inputs_apart: bool) -> Iterator[str]:
    """Yield the paths of opened modules that had better stay whole, the outermost ones."""
    operations = list(recording.operations.items())
    total = sum(parameter.numel() for parameter in model.parameters()), sum(recording.elements.values())
    uses = _last_uses(recording, inputs_apart)
    whole: set[str] = set()
    for path in dict.fromkeys(scope for _, one in operations for scope in one.scopes[1:]):
        if any(path.startswith(f"{outer}.") for outer in whole):
            continue
        inside = [(index, one) for index, one in operations if path in one.scopes]
        own = (
            sum(parameter.numel() for parameter in model.get_submodule(path).parameters()),
            sum(recording.elements.get(index, 0) for index, _ in inside),
        )
        share = max(part / (everything or 1) for part, everything in zip(own, total, strict=True))
        widest = max((_widest(run, path, uses) for run in _runs(inside)), default=0)
        if share < (_SMALL if widest <= 1 else _LARGE):
            whole.add(path)
            yield path


def _runs(inside: list[tuple[int, Operation]]) -> Iterator[list[tuple[int, Operation]]]:
    """Yield the operations of each call of a module: those that follow each other."""
    run: list[tuple[int, Operation]] = []
    for index, one in inside:
        if run and index != run[-1][0] + 1:
            yield run
            run = []
        run.append((index, one))
    if run:
        yield run


def _last_uses(recording: Recording, inputs_apart: bool) -> dict[Ref, int]:
    """Return the number of the last operation that uses each tensor; ``inputs_apart``: not of the inputs."""
    last: dict[Ref, int] = {}
    end = len(recording.operations) + 1
    for index, one in (*recording.operations.items(), (end, None)):
        nest = recording.output if one is None else (one.args, one.kwargs)
        for used in stand_ins(nest):
            if isinstance(used, Ref) and (used.op or not inputs_apart):
                number = used.op in recording.operations and recording.operations[used.op].number
                if not number and not (one is not None and (one.checks or one.number)):
                    last[used] = index
    return last


def _widest(run: list[tuple[int, Operation]], path: str, uses: Mapping[Ref, int]) -> int:
    """Return the largest number of tensors that pass a border between the parts of one call of a module."""
    start, stop = run[0][0], run[-1][0] + 1
    borders = [
        index
        for (index, one), (_, before) in zip(run[1:], run, strict=False)
        if _part(one, path) != _part(before, path)
    ]
    used_inside = {used for _, one in run for used in stand_ins((one.args, one.kwargs)) if isinstance(used, Ref)}
    widest = 0
    for border in borders:
        entered = [ref for ref in used_inside if ref.op < start and border <= uses.get(ref, 0) < stop]
        made = [ref for ref, last in uses.items() if start <= ref.op < border <= last]
        widest = max(widest, len(entered) + len(made))
    return widest


def _part(one: Operation, path: str) -> str | None:
    """Return the part of the module at ``path`` that an operation is of: a module, or None for a function."""
    depth = one.scopes.index(path)
    if depth + 1 < len(one.scopes):
        return one.scopes[depth + 1]
    return one.target if one.kind == "module" else None
