"""What a pipeline was made of, for those who make the same again."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rpcpipe.model.language_model import LanguageModel
from rpcpipe.model.layers import Layer, Wired, unwired, wiring_of
from rpcpipe.pipeline.arguments import Options


class Recipe:
    """What a pipeline was made of. Modules are referred to weakly: the user may drop them to save memory.

    ``language_model``: how generation feeds it, known of those that ``from_transformers`` has made.
    """

    def __init__(self, layers: Mapping[str, Layer], options: Options) -> None:
        self.options = options
        self.language_model: LanguageModel | None = None
        self._layers = {name: (wiring_of(layer), _weak(unwired(layer))) for name, layer in layers.items()}

    def layers(self) -> OrderedDict[str, Layer] | None:
        """Return the layers, or None if one of them no longer exists here."""
        found = OrderedDict[str, Layer]()
        for name, (wiring, refer) in self._layers.items():
            layer = refer()
            if layer is None:
                return None
            found[name] = Wired(layer, *wiring)
        return found


def _weak(layer: Any) -> Callable[[], Any]:
    return weakref.ref(layer) if isinstance(layer, nn.Module) else lambda: layer
