"""What a pipeline's driver sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rpcpipe.worker.operations import Task


class Sent:
    """Counts what goes through a cluster's transport: ``operations`` by name, ``kinds`` of what carries them, and the
    ``verbs`` of messages without an answer.

    Operations are counted where their tasks travel whole: those of ``submit`` and ``accept``, but for kept ones.
    """

    def __init__(self, cluster: Any) -> None:
        self.verbs: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.kinds: Counter[type] = Counter()
        for name in ("call", "remote"):
            setattr(cluster.transport, name, self._counting(getattr(cluster.transport, name)))
        self._send, cluster.transport.send = cluster.transport.send, self._sending

    def _sending(self, to: str, verb: str, *args: Any) -> None:
        self.verbs[verb] += 1
        self._send(to, verb, *args)

    def _counting(self, send: Any) -> Any:
        def counting(to: str, verb: str, *args: Any, **options: Any) -> Any:
            if verb in ("submit", "accept"):
                self.kinds.update(type(item) for item in args[3])
                self.operations.update(type(item.operation).__name__ for item in args[3] if isinstance(item, Task))
            return send(to, verb, *args, **options)

        return counting

    def clear(self) -> None:
        """Count from here."""
        for counter in (self.verbs, self.operations, self.kinds):
            counter.clear()
