"""The optimizer on the driver, in front of the workers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpcpipe.errors import ArgumentError, require
from rpcpipe.stage.hyperparameters import Groups, copied, hyperparameters, same, update


class PipelineOptimizer(torch.optim.Optimizer):
    """What ``pipe.optimizer`` is: the workers' param_groups, to be read and set on the driver.

    Learning-rate schedulers and ``param_groups[i]["lr"] = …`` work as on any torch optimizer; a
    changed value reaches all workers with the next step. Its parameters are empty stand-ins.
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
        """Per group, copies of the hyperparameters that are no longer what the factory gave."""
        current = hyperparameters(self)
        # A scheduler may add keys (initial_lr) and a value may have come back to its first one
        # after another was sent, so every key that ever differed goes on being sent.
        for initial, now in zip(self._initial, current, strict=True):
            for key in [key for key in initial if not same(initial[key], now[key])]:
                del initial[key]
        return copied([
            {key: value for key, value in now.items() if key not in initial}
            for initial, now in zip(self._initial, current, strict=True)
        ])  # fmt: skip

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over ``groups``, which the workers have as well."""
        update(self, groups)
        self._initial = copied(hyperparameters(self))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients of the open step on all workers: what ``s.optimize()`` does."""
        if closure is not None:
            raise ArgumentError(
                "a pipeline's optimizer takes no closure: its gradients come from train_step or pipe.step()"
            )
        self._apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that calls of ``train_step`` have accumulated since the last update."""
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
