"""What runs in which order, and when: schedules by name, their simulation, and timelines planned or measured.

Nothing here imports torch or starts a process.
"""

from rpcpipe.schedules.action import Action
from rpcpipe.schedules.costs import Costs
from rpcpipe.schedules.formulas import bubble_fraction, optimal_microbatches
from rpcpipe.schedules.registry import (
    Traits,
    describe,
    fewest_chunks,
    fewest_virtual_stages,
    forward_only,
    get,
    names,
    placement,
    planned,
    streamed,
    suited_virtual_stages,
    traits,
    virtual_stages_of,
)
from rpcpipe.schedules.schedule import Schedule
from rpcpipe.schedules.simulate import critical_path
from rpcpipe.schedules.spans import Span, Transfer
from rpcpipe.schedules.timeline import Timeline, compare

__all__ = [
    "Action",
    "Costs",
    "Schedule",
    "Span",
    "Timeline",
    "Traits",
    "Transfer",
    "bubble_fraction",
    "compare",
    "critical_path",
    "describe",
    "fewest_chunks",
    "fewest_virtual_stages",
    "forward_only",
    "get",
    "names",
    "optimal_microbatches",
    "placement",
    "planned",
    "streamed",
    "suited_virtual_stages",
    "traits",
    "virtual_stages_of",
]
