"""What the driver's optimizer, which stands for the workers', cannot do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp

WRONG_USES: dict[str, tuple[Any, type[Exception], str]] = {
    "state_dict": (lambda o: o.state_dict(), rp.StateError, r"pipe\.save\(directory\)"),
    "load_state_dict": (lambda o: o.load_state_dict({}), rp.StateError, r"pipe\.load\(directory\)"),
    "add_param_group": (
        lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), rp.StateError, "let the factory",
    ),
    "a group removed": (
        lambda o: o.param_groups.clear(), rp.ArgumentError, "has 0 groups, and the workers' optimizers have 1",
    ),
    "an option removed": (
        lambda o: o.param_groups[0].pop("momentum"), rp.ArgumentError, r"group 0 .* lacks \['momentum'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_USES)
def test_what_the_drivers_optimizer_cannot_do_is_refused(name: str) -> None:
    use, kind, message = WRONG_USES[name]
    pipe = rp.Pipeline(
        mlp(), LocalCluster(2), loss=cross_entropy, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), chunks=2
    )  # type: ignore[arg-type]
    before = pipe.state_dict()

    def train() -> None:
        use(pipe.optimizer)
        pipe.train_step(*next(batches(1)))

    with pytest.raises(kind, match=message):
        train()
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
