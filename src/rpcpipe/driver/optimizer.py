"""The optimizer on the driver, which stands for the workers' optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ArgumentError, require
from rpcpipe.stage.hyperparameters import Groups, copied, hyperparameters, same, update


class PipelineOptimizer(torch.optim.Optimizer):
    """The type of ``pipe.optimizer``: reads and sets the workers' param_groups on the driver.

    Learning-rate schedulers and ``param_groups[i]["lr"] = …`` work as on any torch optimizer; a changed value
    reaches all workers with the next step. The parameters are empty stand-ins. ``apply`` applies the gradients
    of the active step, ``forget`` drops the accumulated gradients.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], apply: Callable[[], None], forget: Callable[[], None]
    ) -> None:
        stand_ins = [{**group, "params": [nn.Parameter(torch.empty(0))]} for group in copied(groups)]
        super().__init__(stand_ins, dict(groups[0]) if groups else {})
        self._apply = apply
        self._forget = forget
        self._initial = copied(hyperparameters(self))

    @property
    def lr(self) -> tuple[float, ...]:
        """The learning rate of every group; 0 for an optimizer that has none, or finds its own."""
        return tuple(0.0 if (rate := group.get("lr")) is None else float(rate) for group in self.param_groups)

    def changes(self) -> Groups:
        """Return, per group, copies of the hyperparameters that have ever differed from the factory's."""
        current = hyperparameters(self)
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
        update(self, groups)
        self._initial = copied(hyperparameters(self))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of the open step on all workers, as ``s.optimize()`` does.

        Raises ArgumentError for a ``closure``.
        """
        if closure is not None:
            raise ArgumentError(
                "a pipeline's optimizer takes no closure: its gradients come from train_step or pipe.step()"
            )
        self._apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that calls of ``train_step`` have accumulated since the last update."""
        self._forget()


def check_alike(changed: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> None:
    """Raise ArgumentError unless the workers' optimizers have changed the entries of their groups alike.

    ``changed``: by worker and group, None where the worker has no parameter of the group.
    """
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for worker, groups in changed.items():
        for index, entries in enumerate(groups):
            for key, value in (entries or {}).items():
                other, expected = first.setdefault((index, key), (worker, value))
                require(
                    same(value, expected),
                    f"the optimizer computes {key!r} of group {index} from all its parameters together, and a worker's"
                    f" has only its own: it became {expected} on {other} and {value} on {worker}. The update was rolled"
                    " back; use an optimizer that treats every parameter by itself, or keep the model on one stage"
                    " (balance=[number of layers], with replicas=… on more workers)",
                )
