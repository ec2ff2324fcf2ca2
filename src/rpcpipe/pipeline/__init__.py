"""Provide the user's API. It checks arguments and composes cluster, model, driver and checkpoints."""

from rpcpipe.pipeline.from_transformers import from_transformers
from rpcpipe.pipeline.generation import generate
from rpcpipe.pipeline.memory import predict_memory
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.pipeline.planning import balance_by_memory, balance_by_parameters, balance_by_time, plan
from rpcpipe.pipeline.verification import verify

__all__ = [
    "Pipeline",
    "balance_by_memory",
    "balance_by_parameters",
    "balance_by_time",
    "from_transformers",
    "generate",
    "plan",
    "predict_memory",
    "verify",
]
