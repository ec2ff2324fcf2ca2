"""The records in the memory of a worker, of which its successor makes its objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import nn

from rpcpipe.model import rng
from rpcpipe.model.microbatch import Nest
from rpcpipe.stage.attributes import Attributes
from rpcpipe.stage.hyperparameters import Groups
from rpcpipe.stage.metrics import Metrics
from rpcpipe.stage.stream_rollback import Past
from rpcpipe.worker.actor_spec import ActorSpec


class Part(IntEnum):
    """The records."""

    MODEL = 0
    GROUPS = 1  # the optimizer's groups and what it has of its own
    STATE = 2  # the optimizer's state by parameter
    UNDO = 3
    UNDO_GROUPS = 4
    START = 5  # the buffers at the begin of a step, and copies of their values
    OTHER_START = 6
    SUMS = 7  # accumulated gradients
    SNAPSHOTS = 8  # of a stream: its number, and KeptSnapshots by the number of updates that they contain; or None


@dataclass(kw_only=True)
class Model:
    """The stages as an ActorSpec that builds them anew around the same modules, and what else no tensor says.

    ``fresh_loss``: the state of the loss when the pipeline was made. ``frozen``: parameters that the optimizer has and
    that a call has frozen since. ``others``: what a step that runs ahead has changed beside buffers.
    """

    spec: ActorSpec
    fresh_loss: dict[str, Any]
    metrics: Metrics = field(default_factory=dict)
    select: Callable[[Nest, Nest], Nest] | None = None
    frozen: list[nn.Parameter]
    others: tuple[int, Attributes, rng.PythonState] | None


@dataclass(kw_only=True)
class KeptSnapshot:
    """A snapshot of a stream: the optimizer's copies and groups, if there is one, the buffers, and past weights."""

    copies: list[Any] | None
    groups: Groups | None
    buffers: list[Any]
    past: Past
