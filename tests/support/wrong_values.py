"""Every public parameter with values of all kinds, and what a call made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import rpcpipe as rp


class Thing:
    """Is nothing that a call could take."""

    def __repr__(self) -> str:
        return "<a thing>"


THING = Thing()
VALUES: dict[str, Any] = {
    "None": None, "'x'": "x", "-1": -1, "0": 0, "1.5": 1.5, "nan": math.nan, "inf": math.inf, "[]": [],
    "<a thing>": THING, "True": True,
}  # fmt: skip


@dataclass
class Call:
    """A public function: ``run(**arguments)`` calls it, ``good`` are its arguments.

    ``takes``: by parameter, the names in ``VALUES`` of what it accepts, separated by blanks.
    ``named``: by parameter, how a message may name it where not by its name.
    """

    run: Callable[..., Any]
    good: dict[str, Any]
    takes: dict[str, str]
    named: dict[str, str] = field(default_factory=dict)

    def cases(self) -> Iterator[tuple[str, str]]:
        """Yield every (parameter, name of a value)."""
        for parameter in self.takes:
            for name in VALUES:
                yield parameter, name

    def complaint(self, parameter: str, name: str) -> str:
        """Return what is wrong with the outcome of the call with that value; "" if nothing is."""
        taken = name in self.takes[parameter].split()
        try:
            with TemporaryDirectory() as folder, chdir(folder):  # for what "x" is a path
                self.run(**{**self.good, parameter: VALUES[name]})
        except (rp.RpcPipeError, TypeError, ValueError) as error:
            text = str(error)
            wanted = self.named.get(parameter, parameter)
            if taken:
                return f"refused, though it is taken: {text:.150}"
            if not isinstance(error, rp.RpcPipeError) or isinstance(error, rp.StageError):
                return f"raises {type(error).__name__}: {text:.150}"
            return "" if re.search(wanted, text) else f"the message does not name {wanted!r}: {text:.150}"
        except Exception as error:
            return f"raises {type(error).__name__}: {error!s:.150}"
        return "" if taken else "accepted"
