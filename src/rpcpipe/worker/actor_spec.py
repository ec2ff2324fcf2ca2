"""What a worker is told when it is to build its stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rpcpipe.model import layers
from rpcpipe.model.layers import Loss
from rpcpipe.model.tied_weights import Tie
from rpcpipe.model.torch_settings import TorchSettings
from rpcpipe.model.wiring import StageLinks, Wiring
from rpcpipe.stage.optimizer import Factory
from rpcpipe.stage.recompute import Checkpoint
from rpcpipe.worker.gradient_exchange import ReplicaGroup

# By stage: its named layers, and the first layer's index in the model.
Parts = dict[int, tuple[OrderedDict[str, layers.Layer], int]]


@dataclass(kw_only=True)
class ActorSpec:
    """All that a worker needs to build its stages; travels pickled."""

    stages: Parts
    last_stage: int
    loss: Loss
    optimizer: Factory | None
    seed: int
    checkpoint: Checkpoint = "never"
    autocast: torch.dtype | None = None
    batch_norm: str = "micro_batch"
    # By name, the wirings of all the model's layers, not only of this worker's.
    wirings: Mapping[str, Wiring] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    stage_links: StageLinks = field(default_factory=StageLinks)
    peers: ReplicaGroup = field(default_factory=ReplicaGroup)
    # By layer, buffers whose memory other layers have too.
    shared_buffers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: TorchSettings = field(default_factory=TorchSettings.current)
    copies: bool = True  # of what an update changes, to take it back
    keep: bool = False  # in memory that outlives the worker, on the CPU
