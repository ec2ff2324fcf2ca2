"""The version of its weights that a stage uses for a minibatch, under every weight policy.

Version v is the weights after v updates, counted from when the stream last started empty. A
``group`` is the micro-batches of one update, counted from 0 in the same way: one under
``pipedream``, a batch under ``pipedream-2bw``. With k = group + 1, K stages and
stage r from 0, the sources write:

- stash: max(0, k - (K - 1 - r) - 1), the newest when the forward runs, kept for the
  backward (Narayanan et al., "PipeDream", section 3.3, weight stashing);
- vertical sync: max(0, k - K), the same on all stages (there, vertical sync);
- 2bw: W(t+1) = W(t) - ν∇f(W(t-1)) (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN
  Training", section 3.1, double-buffered weight updates).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rpcpipe.errors import ScheduleError


@dataclass(frozen=True)
class Policy:
    """Says which micro-batches make an update, and which version of its weights a stage uses for them.

    ``version(group, stage, stages)``: the version for the forward of ``group`` and, if ``stashes``, for its backward;
    otherwise each uses the newest. ``by_batch``: a group is a batch, and not one micro-batch.
    """

    name: str
    version: Callable[[int, int, int], int]
    stashes: bool = True
    by_batch: bool = False

    @property
    def unit(self) -> str:
        """What a group is called."""
        return "batches" if self.by_batch else "minibatches"

    def behind(self, stage: int, stages: int) -> int:
        """Return how many updates old the weights of a group are when its own update comes, once the stream is full."""
        group = 2 * stages
        return group - self.version(group, stage, stages)

    def updates(self, chunks: int) -> list[range]:
        """Return for each update of a batch the micro-batches, of ``chunks``, that make it."""
        return [range(chunks)] if self.by_batch else [range(chunk, chunk + 1) for chunk in range(chunks)]

    def must_drain(self, chunks: int, stages: int) -> bool:
        """Return whether the version that the next batch needs is ready only once this one, of ``chunks``, is done."""
        return self.by_batch and chunks < stages


def _newest(group: int, stage: int, stages: int) -> int:
    return max(0, group - (stages - 1 - stage))


def _common(group: int, stage: int, stages: int) -> int:
    return max(0, group + 1 - stages)


def _before(group: int, stage: int, stages: int) -> int:
    return max(0, group - 1)


STASH = Policy("stash", _newest)
# By schedule, the policies that it allows, the default first.
POLICIES = {
    "pipedream": (STASH, Policy("vertical_sync", _common), Policy("latest", _newest, stashes=False)),
    "pipedream-2bw": (Policy("2bw", _before, by_batch=True),),
}


def choose(schedule: str, asked: str | None) -> Policy | None:
    """Return the weight policy of ``schedule``, None where it is synchronous.

    ``asked``: the name of the user's choice, None for the default. Raises ScheduleError where it does not fit.
    """
    allowed = POLICIES.get(schedule, ())
    if asked is None:
        return allowed[0] if allowed else None
    for policy in allowed:
        if policy.name == asked:
            return policy
    names = ", ".join(repr(policy.name) for policy in allowed)
    known = f"one of {names}" if allowed else "None: its weights have one version"
    raise ScheduleError(f"weights={asked!r} does not fit schedule {schedule!r}, which takes {known}")
