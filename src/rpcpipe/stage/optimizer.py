"""The worker's part of the distributed optimizer: one torch optimizer over the parameters of its stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ModelError, require
from rpcpipe.stage import rehearsal
from rpcpipe.stage.hyperparameters import Groups, changed, copied, entries, hyperparameters, own, same, update
from rpcpipe.stage.rollback import Undo
from rpcpipe.stage.separable import is_separable


class Parameters(list[nn.Parameter]):
    """A worker's trainable parameters in the model's order, the argument of the user's optimizer factory."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) for each parameter.

        The name is that of the unsplit model's ``named_parameters``: the first one of a tied weight.
        """
        return list(self._named)


Factory = Callable[[Parameters], torch.optim.Optimizer]


def make(factory: Factory, parameters: Parameters) -> torch.optim.Optimizer:
    """Return ``factory``'s optimizer; raises ModelError for one that cannot work in a pipeline."""
    try:
        optimizer = factory(parameters)
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        raise ModelError(
            "optimizer chose none of this worker's parameters; return a group without any for such a worker:"
            ' [{"params": chosen}] instead of chosen'
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(
            f"optimizer must return a torch.optim.Optimizer, not {type(optimizer).__name__};"
            " for instance optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)"
        )
    kind = type(optimizer).__name__
    _check_parameters(kind, optimizer, parameters)
    _check_step(kind, optimizer)
    _check_inner(kind, optimizer)
    return optimizer


def _check_parameters(kind: str, optimizer: torch.optim.Optimizer, given: Parameters) -> None:
    mine = set(given)
    foreign = [p for group in optimizer.param_groups for p in group["params"] if p not in mine]
    require(
        not foreign,
        f"optimizer returned a {kind} with {len(foreign)} parameters that were not given to it (the first has shape"
        f" {tuple(foreign[0].shape) if foreign else ()}) and that no stage trains; the factory runs on the stages'"
        " workers: use its argument, for instance optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)",
        error=ModelError,
    )


def _check_step(kind: str, optimizer: torch.optim.Optimizer) -> None:
    require(
        "step" not in vars(optimizer),
        f"the factory's {kind} has a step of its own, as a learning-rate scheduler gives it one; moves and saves would"
        " lose what that counts: make the scheduler of pipe.optimizer, on the driver",
        error=ModelError,
    )
    needed = [
        parameter
        for parameter in inspect.signature(optimizer.step).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    require(
        not needed,
        f"{kind}.step needs {needed[0].name if needed else ''!r}, a function that computes the loss again, and a"
        " pipeline computes it once per step; use an optimizer whose step() takes no arguments",
        error=ModelError,
    )
    for group in optimizer.param_groups:
        require(
            not group.get("differentiable"),
            f"{kind}(differentiable=True) records the update itself for autograd, which a pipeline cannot"
            " differentiate; leave it out",
            error=ModelError,
        )
        require(
            not group.get("capturable") or all(p.device.type != "cpu" or not p.numel() for p in group["params"]),
            f"{kind}(capturable=True) is for CUDA graphs, and its parameters are on the CPU; leave it out",
            error=ModelError,
        )


def _check_inner(kind: str, optimizer: torch.optim.Optimizer) -> None:
    for name, value in vars(optimizer).items():
        require(
            not isinstance(value, torch.optim.Optimizer) or value.state is optimizer.state,
            f"{kind} holds another optimizer, {name}, with a state of its own, which saves, moves between workers and"
            f" the rollback of a failed step would not see; let them share one: self.state = self.{name}.state",
            error=ModelError,
        )


def _check_random(kind: str, before: torch.Tensor) -> None:
    """Raise ModelError if torch's default generator is not as ``before``."""
    if not torch.equal(before, torch.default_generator.get_state()):
        raise ModelError(
            f"{kind}.step draws random numbers from torch's default generator; which ones would depend on where the"
            " model is cut, and replicas and tied weights would part: draw each parameter's from a torch.Generator that"
            " the optimizer seeds by the parameter's name (params.named()) and its number of updates"
        )


class LocalOptimizer:
    """One worker's optimizer: the user's optimizer over the parameters of the worker's stages.

    ``is_whole``: ``parameters`` are all of the model's. Parameters in ``elsewhere`` are updated on other workers, which
    send what they restore after a failed step. ``copies``: whether an update can be taken back.
    ``changed`` holds, per group, the hyperparameters that the optimizer itself has changed in the last update, and None
    for a group that has no parameter of this worker.
    """

    def __init__(
        self,
        factory: Factory,
        parameters: Parameters,
        elsewhere: Set[nn.Parameter] = frozenset(),
        *,
        is_whole: bool = True,
        copies: bool = True,
    ) -> None:
        self.parameters = parameters
        owned = Parameters((name, parameter) for name, parameter in parameters.named() if parameter not in elsewhere)
        # If this worker updates no parameter, an empty one gives the optimizer the same groups and no state.
        self.optimizer = make(factory, owned or Parameters([("", nn.Parameter(torch.empty(0)))]))
        require(
            is_whole or is_separable(self.optimizer),
            f"{self.kind} updates a parameter by other parameters' gradients, too (does it clip by their norm?), and a"
            " worker's has only its own parameters: use one that treats every parameter by itself, with"
            " Pipeline(clip_grad_norm=…) to clip, or keep the model on one stage (balance=[number of layers])",
            error=ModelError,
        )
        self.changed: list[dict[str, Any] | None] = []
        self.owned = list(owned) if copies else []
        self.undo = Undo(self.owned, self.optimizer)
        # What differs from it goes along with moves and saves; the rest may depend on the parameters, as their number.
        [self._fresh] = copied([own(self.optimizer)])

    def groups(self) -> Groups:
        """Return the entries of every group, without its parameters."""
        mine = {
            key: value
            for key, value in own(self.optimizer).items()
            if key not in self._fresh or not same(value, self._fresh[key])
        }
        return copied([group | mine for group in hyperparameters(self.optimizer)])

    def used_groups(self) -> list[dict[str, Any] | None]:
        """Return ``groups``, with None for those that have no parameter of this worker."""
        mine = set(self.parameters)
        return [
            values if mine.intersection(group["params"]) else None
            for group, values in zip(self.optimizer.param_groups, self.groups(), strict=True)
        ]

    @property
    def kind(self) -> str:
        """Name of the torch optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        """The group of every parameter that this worker updates."""
        return {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}

    @property
    def index_of(self) -> dict[nn.Parameter, int]:
        """The number of the group of every parameter that this worker updates."""
        return {
            parameter: index
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }  # fmt: skip

    def check(self, groups: Sequence[Mapping[str, Any]], state: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Raise CheckpointError unless ``adopt`` would lead to an optimizer that can go on; nothing changes."""
        names = {parameter: name for name, parameter in self.parameters.named()}
        rehearsal.check(self.optimizer, [self._fresh | dict(group) for group in groups], state, names)

    def adopt(self, groups: Sequence[Mapping[str, Any]], state: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Replace entries and state by those of another optimizer of the same class."""
        update(self.optimizer, [self._fresh | dict(group) for group in groups])
        for parameter, values in state.items():
            self.optimizer.state.pop(parameter, None)
            if values:
                self.optimizer.state[parameter] = values
        self.undo.invalidate()

    def step(self, gradients: Mapping[torch.Tensor, torch.Tensor], changes: Sequence[Mapping[str, Any]]) -> None:
        """Apply ``gradients`` as ``apply`` does; if that raises, restore what there are copies of; raise the error."""
        self.undo.refresh()
        try:
            self.apply(gradients, changes)
        except BaseException:
            self.undo.restore()
            raise

    def apply(self, gradients: Mapping[torch.Tensor, torch.Tensor], changes: Sequence[Mapping[str, Any]]) -> None:
        """Update the parameters with ``gradients`` and clear ``.grad``, also on an error.

        ``changes`` holds per group the hyperparameters that the driver has set.
        """
        update(self.optimizer, changes)
        before, random = copied(entries(self.optimizer)), torch.default_generator.get_state()
        for parameter in self.parameters:
            parameter.grad = gradients.get(parameter)
        try:
            self.optimizer.step()
            _check_random(self.kind, random)
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        moved = changed(before, entries(self.optimizer))
        used = self.used_groups() if any(moved) else [None] * len(moved)
        self.changed = [values if mine is not None else None for values, mine in zip(moved, used, strict=True)]
