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

from rpcpipe.errors import ScheduleError

# By schedule, the policies that it allows, the default first.
POLICIES = {
    "pipedream": ("stash", "vertical_sync", "latest"),
    "pipedream-2bw": ("2bw",),
}


def choose(schedule: str, asked: str | None) -> str | None:
    """Return the weight policy of ``schedule``, None where it is synchronous.

    ``asked``: the user's choice, None for the default. Raises ScheduleError where it does not fit.
    """
    allowed = POLICIES.get(schedule, ())
    if asked is None:
        return allowed[0] if allowed else None
    if asked not in allowed:
        known = f"one of {', '.join(map(repr, allowed))}" if allowed else "None: its weights have one version"
        raise ScheduleError(f"weights={asked!r} does not fit schedule {schedule!r}, which takes {known}")
    return asked


def version(policy: str, group: int, stage: int, stages: int) -> int:
    """Return the version with which ``stage`` computes ``group``'s forward and, but for "latest", backward."""
    if policy == "vertical_sync":
        return max(0, group + 1 - stages)
    if policy == "2bw":
        return max(0, group - 1)
    return max(0, group - (stages - 1 - stage))
