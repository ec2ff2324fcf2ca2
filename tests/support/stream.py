"""Pipelines that train asynchronously, for the tests that compare them with ``Versioned``."""

from __future__ import annotations

from typing import Any

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import cross_entropy, mlp, sgd

SIZES = {1: [8], 2: [3, 5], 3: [3, 2, 3], 4: [2, 2, 2, 2]}
POLICIES = ["stash", "vertical_sync", "2bw"]


def schedule_of(policy: str) -> str:
    return "pipedream-2bw" if policy == "2bw" else "pipedream"


def pipeline(stages: int, policy: str, cluster: Any = None, **changed: Any) -> rp.Pipeline:
    arguments = {"loss": cross_entropy, "optimizer": sgd, "chunks": 4 if policy == "2bw" else 1} | changed
    model = arguments.pop("model", None) or mlp()
    return rp.Pipeline(
        model, cluster or LocalCluster(stages, stages), schedule=schedule_of(policy), weights=policy,
        balance=SIZES[stages], **arguments,
    )  # fmt: skip
