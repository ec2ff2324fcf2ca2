"""Pipeline parallelism from one Python process."""

import logging

from rpcpipe import schedules
from rpcpipe.balance import balance_by_memory, balance_by_parameters, balance_by_time
from rpcpipe.cluster import Cluster
from rpcpipe.connect import connect
from rpcpipe.errors import (
    CheckpointError,
    DeadlineExceeded,
    PartitionError,
    RendezvousError,
    RpcPipeError,
    ScheduleError,
    StageError,
    WorkerLost,
)
from rpcpipe.generation import generate
from rpcpipe.hf import from_transformers
from rpcpipe.launch import launch
from rpcpipe.layers import LayerSpec, Sequential, Wired
from rpcpipe.pipeline import Pipeline
from rpcpipe.planner import Plan
from rpcpipe.planning import plan
from rpcpipe.result import StepResult
from rpcpipe.schedules import Action, Schedule, bubble_fraction, optimal_microbatches
from rpcpipe.simulate import Costs, critical_path
from rpcpipe.timeline import Span, Timeline, Transfer, compare
from rpcpipe.tracking import JsonLines, TensorBoard

# Silent unless the user configures logging.
logging.getLogger("rpcpipe").addHandler(logging.NullHandler())

__version__ = "0.1.0"

__all__ = [
    "Action",
    "CheckpointError",
    "Cluster",
    "Costs",
    "DeadlineExceeded",
    "JsonLines",
    "LayerSpec",
    "PartitionError",
    "Pipeline",
    "Plan",
    "RendezvousError",
    "RpcPipeError",
    "Schedule",
    "ScheduleError",
    "Sequential",
    "Span",
    "StageError",
    "StepResult",
    "TensorBoard",
    "Timeline",
    "Transfer",
    "Wired",
    "WorkerLost",
    "balance_by_memory",
    "balance_by_parameters",
    "balance_by_time",
    "bubble_fraction",
    "compare",
    "connect",
    "critical_path",
    "from_transformers",
    "generate",
    "launch",
    "optimal_microbatches",
    "plan",
    "schedules",
]
