"""Batches that the workers read themselves: what the user makes, and what stands for one batch on the driver."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from rpcpipe._arguments import require_callable, require_count
from rpcpipe.errors import ArgumentError, StateError, require_whole
from rpcpipe.model.nest_types import StandIn

_keys = itertools.count()


class RemoteBatches:
    """Batches that the workers read which need them; none passes through this process.

    ``make()`` is called on the workers of the first stage, of the last one, and of stages that take named inputs. It
    returns an iterable of (inputs, targets), or something with ``__len__`` and ``__getitem__``, which returns batch n,
    and must give the same batches on all workers: they are compared before a step begins. ``pipe.train`` and
    ``pipe.evaluate`` take it in place of batches, and the results are those of ``make()``'s batches, to the bit.
    ``pipe.predict`` takes it if its batches are inputs alone.

    Args:
        make: A function without arguments, which is pickled. Bind what differs, such as the epoch, by
            ``functools.partial``.
        start: The number of the first batch to be used, to resume. The ``start`` batches before it are read and
            dropped, unless ``make()`` has ``__getitem__``.
        seed: The random numbers of torch, random and numpy are seeded with it before ``make`` is called, and with
            seed + n before batch n if ``make()`` has ``__getitem__``. Those of the stages are not touched.

    Raises:
        ArgumentError: For arguments of another kind. What cannot be pickled is refused where the batches are used.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], *, start: int = 0, seed: int = 0) -> None:
        require_callable("make", make, "that returns batches")
        self.make = make
        self.start = require_whole("start", start, least=0)
        self.seed = require_count("seed", seed, 2**63 - 1, least=0)
        self.key = next(_keys)  # names it in messages

    def batch(self, number: int) -> tuple[RemoteValue, RemoteValue]:
        """Return what stands for the inputs and the targets of batch ``number``, as ``pipe.train_step`` takes them.

        Whether there is such a batch shows when it is used.
        """
        count = require_whole("number", number, least=0)
        return RemoteValue(self, count, "inputs"), RemoteValue(self, count, "targets")

    def inputs(self, number: int) -> RemoteValue:
        """Return what stands for batch ``number`` of inputs alone, as ``pipe(inputs)`` takes it."""
        return RemoteValue(self, require_whole("number", number, least=0), "batch")

    def __iter__(self) -> Iterator[Any]:
        raise ArgumentError(
            "the batches of rp.RemoteBatches are on the workers: pass it to pipe.train or pipe.evaluate as it is, or"
            " one batch of it to pipe.train_step(*batches.batch(n)); here, iterate over make()"
        )

    def __repr__(self) -> str:
        return f"RemoteBatches({self.make!r}, start={self.start}, seed={self.seed})"


class RemoteValue(StandIn):
    """Stands for the inputs or the targets of batch ``number`` of ``source``, or for a ``batch`` of inputs alone.

    ``digest``: the batch's, when it was used first; a step that is made again takes no other.
    """

    def __init__(self, source: RemoteBatches, number: int, what: str) -> None:
        self.source, self.number, self.what = source, number, what
        self.digest: int | None = None

    def belongs_to(self, targets: Any) -> bool:
        """Return whether ``targets`` are those of this batch of inputs."""
        return (
            isinstance(targets, RemoteValue)
            and (self.what, targets.what) == ("inputs", "targets")
            and (self.source, self.number) == (targets.source, targets.number)
        )

    def __reduce__(self) -> NoReturn:
        raise StateError("a batch of rp.RemoteBatches stands for all inputs or all targets, and not for a part of them")

    def __repr__(self) -> str:
        return f"<{self.what} {self.number} of {self.source!r}>"


class Following:
    """Iterates over (inputs, targets) of ``batches``, from the first to be used on; without targets unless ``paired``.

    ``is_there`` asks the workers for the batch; after an error it may be asked again.
    """

    def __init__(self, batches: RemoteBatches, is_there: Callable[[RemoteValue], bool], *, paired: bool = True) -> None:
        self._batches, self._is_there, self._paired = batches, is_there, paired
        self._number = batches.start

    def __iter__(self) -> Following:
        return self

    def __next__(self) -> tuple[RemoteValue, RemoteValue | None]:
        number = self._number
        inputs, targets = self._batches.batch(number) if self._paired else (self._batches.inputs(number), None)
        if not self._is_there(inputs):
            raise StopIteration
        self._number += 1
        return inputs, targets
