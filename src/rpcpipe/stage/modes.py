"""Which modules of a stage train and which are in eval mode, as the user has set them."""

from __future__ import annotations

from torch import nn


class Modes:
    """Switches ``module`` to evaluation and back to every submodule's own ``training`` flag."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: dict[nn.Module, bool] | None = None

    def switch(self, *, training: bool) -> None:
        """Put everything in eval mode, or back as it was before; nothing if it is so already."""
        if training == (self._own is None):
            return
        if training:
            self._restore()
        else:
            self._own = {module: module.training for module in self._module.modules()}
            self._module.eval()

    def _restore(self) -> None:
        """Set every flag back, by the modules' own ``train`` first, which may do more than set it."""
        own, self._own = self._own or {}, None
        for module, training in own.items():
            if module.training != training:
                module.train(training)
        for module, training in own.items():
            module.training = training
