"""The stream of one worker: versions of its stage's weights, and the snapshots from which it can go on."""

from __future__ import annotations

from rpcpipe.errors import ModelError, require
from rpcpipe.schedules.weight_versions import Policy
from rpcpipe.stage import stream_rollback
from rpcpipe.stage.context import MicroBatch
from rpcpipe.stage.stage import Stage
from rpcpipe.stage.stream import StreamBackward
from rpcpipe.stage.stream_rollback import Past, Snapshots
from rpcpipe.stage.weight_stash import Versions
from rpcpipe.worker.kept_state import KeptState
from rpcpipe.worker.stage_set import StageSet


class StreamKeeper:
    """Opens, follows and ends streams on the stages ``held``, of which ``kept`` outlives the worker.

    ``backwards``: by stage, while a stream is open. Where it is kept, an ended stream's ``snapshots`` stay until
    ``drop``, which comes once the stream has ended on all workers: until then it may have to go on.
    """

    def __init__(self, held: StageSet, kept: KeptState | None, snapshots: Snapshots | None) -> None:
        self.backwards: dict[int, StreamBackward] = {}
        self._held, self._kept, self._snapshots = held, kept, snapshots

    @property
    def snapshots(self) -> Snapshots | None:
        """The snapshots of the stream that is open, or may have to go on."""
        return self._snapshots

    @property
    def has_ended(self) -> bool:
        """Whether there are snapshots of a stream that has ended here."""
        return self._snapshots is not None and self._snapshots.ended

    def open(self, policy: Policy, stream: int, updates: int = 0) -> None:
        """Open ``stream``, or let it go on after its first ``updates``."""
        past: Past = {}
        snapshots = self._snapshots
        if snapshots is None or snapshots.stream != stream:
            self.drop()
            require(
                updates == 0,
                f"the stream cannot go on after {updates} updates: this worker has no snapshot",
                error=ModelError,
            )
            snapshots = self._snapshots = Snapshots(stream, self._held.optimizer, self._held.buffered)
            self._keep(snapshots)
        else:
            past = snapshots.go_back(updates)
            self._keep(snapshots)  # before live values change
            snapshots.restore(updates)
        for index, stage in self._held.stages.items():
            stage.versions = Versions(
                policy, index, self._held.last_stage + 1, stage.module,
                newest=updates, past=past, remembers=self._kept is not None,
            )  # fmt: skip
            self.backwards[index] = StreamBackward(stage)

    def _keep(self, snapshots: Snapshots) -> None:
        if self._kept is not None:
            self._kept.snapshots(snapshots)

    def before_forward(self, micro_batch: MicroBatch) -> None:
        """Note that a forward comes, which may change buffers."""
        if micro_batch.position == 0 and self._snapshots is not None and micro_batch.group is not None:
            self._snapshots.before_forward(micro_batch.group)

    def updated(self, stage: Stage, committed: int) -> None:
        """Take a snapshot if one is due after an update of ``stage``; all stages have applied ``committed``."""
        assert self._snapshots is not None
        assert stage.versions is not None
        self._snapshots.drop_before(committed)
        if stage.versions.newest % stream_rollback.EVERY == 0:
            self._snapshots.take(stage.versions.newest, {} if self._kept is None else stage.versions.past)
        self._keep(self._snapshots)

    def end(self, stream: int, updates: int | None) -> None:
        """End ``stream`` if it is open; ``updates``: first restore the state after this number of updates."""
        snapshots = self._snapshots
        if snapshots is not None and snapshots.stream != stream:
            self.drop()  # an older one: this worker had not begun the stream
        elif snapshots is not None:
            if updates is not None:
                if self._kept is not None:
                    self._kept.snapshots(snapshots)
                snapshots.restore(updates)
            snapshots.ended = True
        for stage in self._held.stages.values():
            stage.versions = None
        self.backwards.clear()
        if self._kept is None:
            self.drop()
        else:
            self._kept.stream_ended()

    def drop(self) -> None:
        """Forget a stream that has ended on all workers."""
        if self._snapshots is not None:
            self._snapshots.close()
            self._snapshots = None
            if self._kept is not None:
                self._kept.snapshots_dropped()
