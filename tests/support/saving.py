"""Pipelines to save and load, and what a refused load must leave unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import rpcpipe as rp
from rpcpipe.checkpoint.lock import LOCK
from rpcpipe.stage.optimizer import hyperparameters
from support.local_cluster import LocalCluster
from support.models import adamw, cross_entropy, mlp

STEPS = 6


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=2 * STEPS + 1)


def make(workers: int, optimizer: Any = adamw, **arguments: Any) -> rp.Pipeline:
    arguments = {"chunks": 4, "clip_grad_norm": 0.5, "seed": 7} | arguments
    return rp.Pipeline(mlp(), LocalCluster(workers), loss=cross_entropy, optimizer=optimizer, **arguments)


@contextmanager
def refused(pipe: rp.Pipeline, match: str, **stateful: Any) -> Iterator[None]:
    """The block's load raises CheckpointError; pipeline and ``stateful`` are as before."""
    before, trained, groups = pipe.state_dict(), pipe.trained, copy.deepcopy(hyperparameters(pipe.optimizer))
    states = {name: copy.deepcopy(holder.state_dict()) for name, holder in stateful.items()}
    with pytest.raises(rp.CheckpointError, match=match):
        yield
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    assert (pipe.trained, hyperparameters(pipe.optimizer)) == (trained, groups)
    assert {name: holder.state_dict() for name, holder in stateful.items()} == states


def pipeline_of(*layers: nn.Module, optimizer: Any = adamw) -> rp.Pipeline:
    return rp.Pipeline(list(layers), LocalCluster(2), loss=cross_entropy, optimizer=optimizer)


def assert_same_state(one: rp.Pipeline, other: rp.Pipeline) -> None:
    found = one.state_dict()
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())


def contents(directory: Path) -> list[Path]:
    """What is in ``directory`` beside the lock of the process that saves there."""
    return [path for path in directory.iterdir() if path.name != LOCK]
