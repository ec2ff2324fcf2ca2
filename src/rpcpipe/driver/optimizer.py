"""The optimizer on the driver, which stands for the workers' optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from rpcpipe.errors import ArgumentError, ModelError, StateError, require
from rpcpipe.model.sendable import as_argument, checked
from rpcpipe.stage.hyperparameters import Groups, copied, hyperparameters, is_own, options, same, update


class Remote(Protocol):
    """The workers' optimizers."""

    def apply_active(self) -> None:
        """Apply the gradients of the active step."""
        ...

    def forget_accumulated(self) -> None:
        """Drop the accumulated gradients."""
        ...

    def optimizer_state(self) -> dict[str, Any]:
        """Gather the state."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load the state."""
        ...


class PipelineOptimizer(torch.optim.Optimizer):
    """The type of ``pipe.optimizer``: reads and sets the workers' param_groups on the driver.

    Learning-rate schedulers and ``param_groups[i]["lr"] = …`` work as on any torch optimizer; a changed value
    reaches all workers with the next step. The parameters are empty stand-ins. ``past``: while a step of the past is
    done again, the changes that it was sent.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], remote: Remote) -> None:
        stand_ins = [{**group, "params": [nn.Parameter(torch.empty(0))]} for group in copied(options(groups))]
        self._complete = False
        super().__init__(stand_ins, options(groups)[0] if groups else {})
        self._complete = True
        self._remote = remote
        self.past: Groups | None = None
        self._initial = copied(hyperparameters(self))
        self._stand_ins = [group["params"] for group in self.param_groups]

    def serve(self, remote: Remote) -> None:
        """Stand for the optimizers of other workers from now on, with the same groups."""
        self._remote = remote

    @property
    def lr(self) -> tuple[float, ...]:
        """The learning rate of every group; 0 for an optimizer that has none, or finds its own."""
        return tuple(0.0 if (rate := group.get("lr")) is None else float(rate) for group in self.param_groups)

    @property
    def may_be_changed(self) -> bool:
        """Whether code of the user's runs in ``step``: it may change hyperparameters, or leave the update out."""
        if self.past is not None:
            return False
        step = vars(self).get("step")
        # Schedulers of torch count steps by a step of their own around the class's.
        counts = getattr(step, "_wrapped_by_lr_sched", False)
        own = counts and getattr(step, "__wrapped__", None) is type(self).step
        replaced = step is not None and not own
        return replaced or bool(self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)

    def changes(self) -> Groups:
        """Return, per group, copies of the hyperparameters that have ever differed from the factory's."""
        if self.past is not None:
            return self.past
        current = hyperparameters(self)
        _check_complete(self._initial, current)
        for index, (group, stand_ins) in enumerate(zip(self.param_groups, self._stand_ins, strict=True)):
            require(
                group.get("params") is stand_ins,
                f"'params' of group {index} of pipe.optimizer.param_groups has been replaced, and what is there is only"
                " a stand-in: the parameters are the workers'. Set options alone; the factory, Pipeline(optimizer=…),"
                " puts parameters into groups",
            )
        _check_sendable(self._initial, current)
        # A value may return to its initial one after another value was sent, so every key that ever differed
        # is sent from then on. A scheduler may also add keys (initial_lr).
        for initial, now in zip(self._initial, current, strict=True):
            for key in [key for key in initial if not same(initial[key], now[key])]:
                del initial[key]
        return copied([
            {key: value for key, value in now.items() if key not in initial}
            for initial, now in zip(self._initial, current, strict=True)
        ])  # fmt: skip

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Set the hyperparameters to ``groups``, which the workers have already."""
        update(self, options(groups))
        self._initial = copied(hyperparameters(self))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of the open step on all workers, as ``s.optimize()`` does.

        Raises ArgumentError for a ``closure``.
        """
        if closure is not None:
            raise ArgumentError(
                "a pipeline's optimizer takes no closure: its gradients come from train_step or pipe.step()"
            )
        self._remote.apply_active()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the workers' optimizers have the parameters. Raises StateError."""
        require(
            not self._complete,
            "pipe.optimizer stands for the workers' optimizers and takes no parameters: let the factory,"
            " Pipeline(optimizer=…), make the group on the workers, empty where a stage has none of its parameters",
            error=StateError,
        )
        # The function in torch's wrapper, which imports torch._dynamo: as much time as importing torch takes.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the workers' state in torch's format, on the CPU, for the unsplit model's trainable parameters.

        They are numbered by group, and in a group in the model's order; ``param_names`` of each group names them. Any
        other cut, schedule or number of replicas loads it. ``pipe.trained`` and ``pipe.scaler`` are not in it.
        """
        return self._remote.optimizer_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the workers the state that ``state_dict`` returned, or that of torch's optimizer of the same kind.

        Parameters are found by ``param_names``, or without them by their numbers. Raises CheckpointError, before
        anything changes, for another model's or optimizer's.
        """
        self._remote.load_optimizer_state(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that calls of ``train_step`` have accumulated since the last update."""
        self._remote.forget_accumulated()


def _check_complete(initial: Groups, current: Groups) -> None:
    """Raise ArgumentError unless the groups have been changed by new values alone."""
    require(
        len(initial) == len(current),
        f"pipe.optimizer.param_groups has {len(current)} groups, and the workers' optimizers have {len(initial)}: the"
        " factory, Pipeline(optimizer=…), makes groups",
    )
    for index, (before, now) in enumerate(zip(initial, current, strict=True)):
        missing = sorted(before.keys() - now.keys())
        require(not missing, f"group {index} of pipe.optimizer.param_groups lacks {missing}: set values, do not remove")


def _check_sendable(initial: Groups, current: Groups) -> None:
    """Raise ArgumentError for an entry, set by the user, that no worker could be sent."""
    for index, (before, now) in enumerate(zip(initial, current, strict=True)):
        for key, value in now.items():
            if key not in before or value is not before[key]:
                with as_argument():
                    checked(value, f"{key!r} in group {index} of pipe.optimizer.param_groups")


def check_alike(changed: Mapping[str, Sequence[Mapping[str, Any] | None]], *, undone: bool = True) -> None:
    """Raise ModelError unless the workers' optimizers have changed the entries of their groups alike.

    ``changed``: by worker and group, None where the worker has no parameter of the group. ``undone``: whether the
    update is then rolled back.
    """
    outcome = "The update was rolled back; use" if undone else "Use"
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for worker, groups in changed.items():
        for index, entries in enumerate(groups):
            for key, value in (entries or {}).items():
                other, expected = first.setdefault((index, key), (worker, value))
                if same(value, expected):
                    continue  # no message for what is alike: every step comes by
                require(
                    not is_own(key),
                    f"the optimizer keeps {key}, and a worker's has only its own parameters: it became"
                    f" {expected!r:.80} on {other} and {value!r:.80} on {worker}."
                    f"{' The update was rolled back;' * undone} keep what belongs to a parameter in state[parameter],"
                    " or keep the model on one stage (balance=[number of layers])",
                    error=ModelError,
                )
                raise ModelError(
                    f"the optimizer computes {key!r} of group {index} from all its parameters together, and a worker's"
                    f" has only its own: it became {expected} on {other} and {value} on {worker}. {outcome}"
                    " an optimizer that treats every parameter by itself, or keep the model on one stage"
                    " (balance=[number of layers], with replicas=… on more workers)"
                )
