"""Let the successors of dead workers go on with what those have kept, and make the call again that they died in.

A worker's stages lie in memory that this process holds open (``KeptDescriptor``). Its successor makes of it the objects
that the dead worker had (``revive``), and is then told to roll back what the others roll back. Tasks and values that
were under way are gone, so the call that lost them is made again, as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from rpcpipe.cluster.rendezvous import Kept, Worker
from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.driver.driver import Driver
from rpcpipe.errors import StageError, WorkerLost
from rpcpipe.worker.messages import StageInfo

T = TypeVar("T")


class Succession:
    """Knows which process holds the stages of each worker of one pipeline, and where they are kept."""

    def __init__(self, cluster: PipelineCluster, driver: Driver) -> None:
        self._cluster, self._driver = cluster, driver
        self._holders: dict[str, int] = {}
        self._kept: dict[str, Kept] = {}

    def begin(self, infos: Mapping[str, Mapping[int, StageInfo]]) -> None:
        """Keep open what workers, which have built their stages, keep; ``infos``: by worker and stage.

        Raises WorkerLost for a worker that has died since.
        """
        workers = self._workers()
        for name, stages in infos.items():
            self._holders[name] = workers[name].pid
            kept_at = next((info.kept_at for info in stages.values()), None)
            if kept_at is not None:
                try:
                    self._kept[name] = self._cluster.keep(name, *kept_at)
                except OSError as error:
                    raise WorkerLost(f"{name} died once it had built its stages ({error})", worker=name) from error

    def _workers(self) -> dict[str, Worker]:
        return {worker.name: worker for worker in self._cluster.workers}

    @property
    def _missing(self) -> list[str]:
        workers = self._workers()
        return [name for name, pid in self._holders.items() if name in workers and workers[name].pid != pid]

    @property
    def is_broken(self) -> bool:
        """Return whether a successor does not hold its stages yet."""
        return bool(self._missing)

    def revive(self) -> None:
        """Let successors that do not hold their stages yet take them over; the driver rolls back what is under way.

        Raises WorkerLost where that cannot be, or if one of them has died, too.
        """
        workers, missing = self._workers(), self._missing
        if not missing:
            return
        for name in missing:
            if name not in self._kept:
                raise WorkerLost(
                    f"{name} died, and what it held was not kept (it is for workers on the CPU): make"
                    " a new Pipeline, from a checkpoint if there is one",
                    worker=name,
                )
        self._driver.take_ahead_back()
        try:
            self._driver.collect({name: self._driver.revive(name, self._kept[name].path) for name in missing})
        except StageError as error:
            name = error.failure.worker
            story = f"{name} died, and its successor cannot go on: {error}"
            raise WorkerLost(f"{story}. Make a new Pipeline, from a checkpoint if there is one", worker=name) from error
        for name in missing:
            self._driver.welcome(name)
            self._holders[name] = workers[name].pid
        self._driver.sharing.again(self._driver)

    @property
    def is_beyond(self) -> bool:
        """Return whether what a dead worker has kept is gone, too, because its host is."""
        return any(name in self._kept and not self._kept[name].alive for name in self._missing)

    def restart(self, paths: Mapping[str, str]) -> None:
        """Let all workers go on from snapshots; ``paths``: by worker, where its own lies on its host.

        Raises StageError if one cannot, and WorkerLost.
        """
        infos = self._driver.collect({name: self._driver.revive(name, path, copy=True) for name, path in paths.items()})
        self._driver.restart()
        self.close()
        self.begin(infos)

    def close(self) -> None:
        """Let go of what workers have kept."""
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()


AS_BEFORE = "The pipeline is as it was before the call"


def healed(
    cluster: PipelineCluster,
    check: Callable[[], None],
    call: Callable[[], T],
    *,
    after: str = AS_BEFORE,
    causes: list[WorkerLost] | None = None,
) -> T:
    """Return ``call()``, made again where workers have died in it and ``check`` has had them replaced.

    Raises WorkerLost, with all causes, where that has happened more often than ``cluster.heal``; ``after``: what it
    then says of the pipeline. ``causes``: those of calls before this one that are parts of the same.
    """
    causes = [] if causes is None else causes
    while True:
        try:
            return call()
        except WorkerLost as lost:
            causes.append(lost)
            if not cluster.heal or isinstance(lost.__cause__, WorkerLost):  # a part of it has been tried often enough
                raise
            if len(causes) > cluster.heal:
                raise _given_up(causes, after) from lost
        check()


def _given_up(causes: list[WorkerLost], after: str) -> WorkerLost:
    last = causes[-1]
    story = "\n".join(f"{number}. {cause}" for number, cause in enumerate(causes, 1))
    return WorkerLost(
        f"workers died in each of {len(causes)} tries of one call, so it is not tried again (heal={len(causes) - 1}):\n"
        f"{story}\n{after}".rstrip(),
        worker=last.worker, stages=last.stages, host=last.host, pid=last.pid,
    )  # fmt: skip
