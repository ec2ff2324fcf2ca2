"""Code and values by cloudpickle: what a script or a REPL defines has no module to import it from."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import cloudpickle

_HEAVY = 64 << 20


def dumps(value: Any, what: str) -> bytes:
    """``value`` for a worker; warns if code drags along more data than anybody would send on purpose."""
    data = bytes(cloudpickle.dumps(value))
    if len(data) > _HEAVY:
        warnings.warn(
            f"{what} takes {len(data) / 2**20:.0f} MiB to send: it refers to something large, a global or an enclosing"
            " variable; pass that as an argument, or load it on the worker",
            stacklevel=4,
        )
    return data


loads = pickle.loads
