"""Parameters that a function of the user's makes trainable, and that no optimizer has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from rpcpipe.errors import ModelError


class Parts:
    """The submodules and parameters of ``module``, and which of these require a gradient."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._owners = [(owner, dict(owner._modules), dict(owner._parameters)) for owner in module.modules()]
        self._requires_grad = {parameter: parameter.requires_grad for parameter in module.parameters()}

    def added(self) -> list[str]:
        """Return the names of trainable parameters that were not there."""
        return [name for name, p in self._module.named_parameters() if p.requires_grad and p not in self._requires_grad]

    def restore(self) -> None:
        """Put all of them back; values stay as they are."""
        for owner, modules, parameters in self._owners:
            for live, kept in ((owner._modules, modules), (owner._parameters, parameters)):
                live.clear()
                live.update(kept)  # type: ignore[arg-type]
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def refuse_thawed(module: nn.Module, optimized: Collection[nn.Parameter]) -> Iterator[None]:
    """Raise ModelError if the block leaves ``module`` with a trainable parameter that is not in ``optimized``.

    The parameters are then as before the block; so they are if it raises and leaves one.
    """
    before = Parts(module)

    def put_back() -> list[str]:
        thawed = [name for name, p in module.named_parameters() if p.requires_grad and p not in optimized]
        if thawed:
            before.restore()
        return thawed

    try:
        yield
    except BaseException:
        put_back()
        raise
    if thawed := put_back():
        more = f" and {len(thawed) - 1} more" if len(thawed) > 1 else ""
        raise ModelError(
            f"the call made {thawed[0]!r}{more} trainable, and the optimizer was made without it: it would not be"
            " trained. The parameters are as they were; to train it make a new Pipeline of the changed model and give"
            " it this one's weights by load_state_dict(pipe.state_dict())"
        )
