"""``rp.split``, and what holds its layers against the module itself."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import nn

from rpcpipe._arguments import require_kind
from rpcpipe.errors import ArgumentError, ModelError
from rpcpipe.model.containers import beside_forward
from rpcpipe.model.layers import AnyModel, Layer, Sequential, named_layers, unwired
from rpcpipe.model.microbatch import Nest, flatten, tensors
from rpcpipe.model.nest_types import NestOfTensors
from rpcpipe.model.splitting.cutting import layers_of
from rpcpipe.model.splitting.grouping import grouped
from rpcpipe.model.splitting.opening import opened
from rpcpipe.model.splitting.recording import Sample, copied, same_random_numbers

# How far sums made in another order may be apart, relative to the largest value.
_TOLERANCE = 1e-3


def layers_for(model: AnyModel, sample: Nest, autocast: torch.dtype | None = None) -> OrderedDict[str, Layer]:
    """Return ``named_layers(model)``; with a ``sample``, those of any other ``nn.Module`` by ``split``.

    ``autocast``: the dtype in which the layers will run.
    """
    chain = isinstance(model, nn.Sequential) and type(model).forward in (nn.Sequential.forward, Sequential.forward)
    if isinstance(model, nn.Module) and not chain and sample is not None:
        places = [tensor.device.type for tensor in (*tensors(sample), *model.parameters())] or ["cpu"]
        with nullcontext() if autocast is None else torch.autocast(places[0], autocast):
            model = split(model, sample)
    return named_layers(model)


def split(model: nn.Module, sample: NestOfTensors) -> dict[str, Layer]:
    """Return the layers of any module, cut between its submodules, by name: what ``Pipeline`` takes as a model.

    The module's forward is run on ``sample``, a micro-batch of inputs as ``train_step`` takes them, and recorded: the
    submodules and functions that it calls. A submodule whose own parts only pass one value on is opened into these,
    and so is a large one; others are whole layers. What passes beside the running value goes under a name (``Wired``).
    The layers have the module's own submodules and parameters, and its ``state_dict`` names.

    A dict is passed as keyword arguments if the forward has parameters of its keys, and a tuple as positional ones if
    it has as many; any other nest, and these if it has not, are its one argument.

    Sizes may decide what the forward does, and whatever it was for the sample is checked in every micro-batch, which
    may have any number of rows. Raises ArgumentError if the module does not run on the sample, and ModelError, with
    file and line, if values decide, if the forward changes attributes of the module, or if it does other things in
    training than in evaluation. Under ``torch.autocast`` where the pipeline runs under it.
    """
    require_kind("model", model, nn.Module, "an nn.Module")
    if (extra := next(beside_forward(model), None)) is not None:
        raise ModelError(
            f"the model, a {type(model).__name__}, has {extra}, which its layers, each on its worker, do not; give that"
            " to one of its submodules"
        )
    taken = Sample.of(model, sample)
    used = copied(model)
    wanted = [_run(used, taken, training=True), _run(copied(model), taken, training=False)]
    recording = opened(_copyable(used, model), taken)
    groups = grouped(model, recording)
    layers = layers_of(model, recording, groups, taken)
    order = [number for numbers in groups for number in numbers]
    _compare(model, layers, taken, wanted, reordered=order != sorted(order))
    return layers


def _run(model: nn.Module, sample: Sample, *, training: bool) -> Outcome:
    """Return what ``model`` computes of the sample; ArgumentError if it does not run."""
    args, kwargs = sample.arguments(sample.rows(3))
    _set_mode(model, training)
    try:
        with _seeded(sample):
            return _outcome(model, model(*args, **kwargs))
    except Exception as error:
        call = {"keywords": "model(**sample)", "positional": "model(*sample)", "one": "model(sample)"}[sample.style]
        raise ArgumentError(
            f"the {type(model).__name__} does not run on rows of sample, as {call}: {type(error).__name__}: {error}"
        ) from error


def _copyable(used: nn.Module, model: nn.Module) -> nn.Module:
    """Return ``used``, which has run and has what it sets once in its first forward; else ``model``."""
    try:
        return copied(copied(used))
    except ModelError:
        return model  # it keeps a tensor with its graph


def _compare(
    model: nn.Module, layers: dict[str, Layer], sample: Sample, wanted: list[Outcome], *, reordered: bool
) -> None:
    """Raise ModelError if the layers do not compute what ``_run`` has returned for the model itself.

    ``reordered``: they draw their random numbers in another order, so that only evaluation is compared.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for training, before in zip((True, False), wanted, strict=True):
        if training and reordered:
            continue
        same = {id(parameter): parameter for layer in layers.values() for parameter in _parameters(layer)}
        module = Sequential(copy.deepcopy(layers, dict(same)))
        _set_mode(module, training)
        with _seeded(sample):
            after = _outcome(module, module(sample.rows(3)))
        if (found := _first_difference(before, after)) is not None:
            what = names.get(found, "its output") if isinstance(found, int) else found
            raise ModelError(
                f"the layers of the {type(model).__name__} do not compute what it does itself: {what} differs in"
                f" {'training' if training else 'evaluation'}; its forward depends on something that cannot be seen."
                " Write it as a list of layers, and report this, please"
            )


def _parameters(layer: Layer) -> list[nn.Parameter]:
    module = unwired(layer)
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def _set_mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training


@contextmanager
def _seeded(sample: Sample) -> Iterator[None]:
    with same_random_numbers(sample.device):
        torch.manual_seed(0)
        random.seed(0)
        yield


# A structure, and tensors by their name, or by the id of the parameter whose gradient they are.
Outcome = tuple[tuple[str, str], dict[int | str, torch.Tensor | None]]


def _outcome(model: nn.Module, output: Nest) -> Outcome:
    """Return the structure of ``output``, and its tensors and their sum's gradients by name, or by parameter."""
    leaves, spec = flatten(output)
    found: dict[int | str, torch.Tensor | None] = {}
    total: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors(output)):
        found[f"tensor {index} of its output"] = tensor.detach()
        if tensor.requires_grad:
            total.append(tensor.abs().pow(2).sum())
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if total and wanted:
        # What cannot be differentiated so, as torch's reentrant checkpoint, is compared by its outputs alone.
        with suppress(RuntimeError):
            gradients = torch.autograd.grad(sum(total[1:], total[0]), wanted, allow_unused=True)
            found |= {id(parameter): gradient for parameter, gradient in zip(wanted, gradients, strict=True)}
    plain = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    return (str(spec), str(plain)), found


def _first_difference(before: Outcome, after: Outcome) -> int | str | None:
    """Return what differs between two outcomes: a name, or the id of a parameter whose gradient it is."""
    if before[0] != after[0]:
        return "the structure of its output"
    for key, one in before[1].items():
        other = after[1].get(key)
        if (one is None) != (other is None):
            return key
        if one is not None and other is not None and not _close(one, other):
            return key
    return None


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    one, other = one.detach().to_dense(), other.detach().to_dense()
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
