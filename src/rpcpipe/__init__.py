"""Pipeline parallelism from one Python process.

``launch`` (or ``connect``) gives a ``Cluster`` of workers; a ``Pipeline`` on it trains. ``schedules`` draws and checks
what runs; ``plan`` chooses it; ``view`` shows it run; ``callbacks``, ``layers`` and ``planning`` hold what
is needed less often.
"""

from rpcpipe import planning, schedules
from rpcpipe.cluster import Cluster, connect, launch
from rpcpipe.driver import RemoteBatches, StepResult, callbacks
from rpcpipe.errors import (
    ArgumentError,
    CheckpointError,
    DeadlineExceeded,
    DependencyError,
    ModelError,
    NonFiniteError,
    PartitionError,
    RendezvousError,
    RpcPipeError,
    ScheduleError,
    StageError,
    StateError,
    WorkerLost,
)
from rpcpipe.model import Batched, LayerSpec, MicroBatches, Replicated, Wired, layers, split
from rpcpipe.pipeline import (
    Pipeline,
    balance_by_memory,
    balance_by_parameters,
    balance_by_time,
    from_transformers,
    generate,
    plan,
    predict_memory,
    verify,
)
from rpcpipe.schedules import Schedule, bubble_fraction, optimal_microbatches
from rpcpipe.view import view

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Batched",
    "CheckpointError",
    "Cluster",
    "DeadlineExceeded",
    "DependencyError",
    "LayerSpec",
    "MicroBatches",
    "ModelError",
    "NonFiniteError",
    "PartitionError",
    "Pipeline",
    "RemoteBatches",
    "RendezvousError",
    "Replicated",
    "RpcPipeError",
    "Schedule",
    "ScheduleError",
    "StageError",
    "StateError",
    "StepResult",
    "Wired",
    "WorkerLost",
    "balance_by_memory",
    "balance_by_parameters",
    "balance_by_time",
    "bubble_fraction",
    "callbacks",
    "connect",
    "from_transformers",
    "generate",
    "launch",
    "layers",
    "optimal_microbatches",
    "plan",
    "planning",
    "predict_memory",
    "schedules",
    "split",
    "verify",
    "view",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__doc__", "__version__"]
