"""Pipeline parallelism from one Python process."""

import logging

from rpcpipe import schedules
from rpcpipe.cluster import Cluster, connect, launch
from rpcpipe.driver.callbacks import JsonLines, TensorBoard
from rpcpipe.driver.result import StepResult
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
from rpcpipe.model.layers import LayerSpec, Sequential, Wired
from rpcpipe.pipeline.balance import balance_by_memory, balance_by_parameters, balance_by_time
from rpcpipe.pipeline.from_transformers import from_transformers
from rpcpipe.pipeline.generation import generate
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.pipeline.planning import plan
from rpcpipe.planning.plan import Plan
from rpcpipe.schedules import Action, Schedule, bubble_fraction, optimal_microbatches
from rpcpipe.schedules.simulate import Costs, critical_path
from rpcpipe.schedules.timeline import Span, Timeline, Transfer, compare

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
