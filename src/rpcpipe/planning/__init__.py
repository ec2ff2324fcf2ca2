"""Predict what a way to run a model costs, and choose the fastest that fits. Nothing here imports torch."""

from rpcpipe.planning import partition
from rpcpipe.planning.cost_model import CostModel
from rpcpipe.planning.layer_cost import LayerCost
from rpcpipe.planning.plan import Plan
from rpcpipe.planning.search import Search

__all__ = ["CostModel", "LayerCost", "Plan", "Search", "partition"]
