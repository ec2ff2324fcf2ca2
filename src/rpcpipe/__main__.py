"""Run the command ``rpcpipe``: draw schedules, plan a training run, watch one, examine this machine, serve as a
worker.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rpcpipe import _tables, schedules
from rpcpipe._arguments import require_count, require_number
from rpcpipe.cluster import doctor
from rpcpipe.cluster.host_agent import serve_rank
from rpcpipe.errors import ArgumentError, RpcPipeError, require, require_positive
from rpcpipe.planning import CostModel, Search
from rpcpipe.planning.cost_model import Machine
from rpcpipe.planning.gpt import DTYPES, GPT
from rpcpipe.planning.layer_cost import UNDO
from rpcpipe.planning.plan import decide
from rpcpipe.planning.search import layouts
from rpcpipe.schedules import Costs, Schedule
from rpcpipe.view import commands as views


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, 2 for wrong arguments; ``arguments``: sys.argv[1:] by default."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "doctor":
            return doctor.report()
        if args.command == "worker":
            serve_rank()
        {"plan": _plan, "schedule": _schedule, "top": views.top, "view": views.page}[args.command](args)
    except (RpcPipeError, ValueError, OSError) as error:
        print(f"rpcpipe: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; ``--help`` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _checked(check: Callable[[Any], Any], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return the type of an argument that ``check`` accepts once ``kind`` has read it, else the text itself."""

    def read(text: str) -> Any:
        try:
            value: Any = kind(text)
        except ValueError as error:
            value = text
            if isinstance(error, ArgumentError):
                raise argparse.ArgumentTypeError(str(error)) from error
        try:
            return check(value)
        except ArgumentError as error:  # of a ValueError argparse would keep the message to itself
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _share(value: Any) -> float:
    require(require_positive("it", value) <= 1, f"it must be at most 1, not {value}")
    return float(value)


# The largest numbers that are no slip of the hand; a schedule's size is checked when it is made.
_WHOLE = _checked(functools.partial(require_count, "it", most=1 << 48), int)
_COUNT = _checked(functools.partial(require_count, "it", most=1 << 16), int)  # of what is listed one by one
_POSITIVE = _checked(functools.partial(require_positive, "it", finite=True), float)
_NOT_NEGATIVE = _checked(functools.partial(require_number, "it", least=0), float)
_SHARE = _checked(_share, float)
_PORT = _checked(functools.partial(require_count, "it", most=65535, least=0), int)
_BYTES = _checked(functools.partial(require_positive, "it", finite=True), _tables.parse_bytes)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = _Parser(prog="rpcpipe", description="Pipeline parallelism from one Python process.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="examine this machine; exit status 1 if a cluster would not form")
    commands.add_parser("worker", help="serve as the rank that the environment says, for a driver's rp.connect()")
    views.add_parsers(commands, _PORT, _POSITIVE)
    _plan_parser(commands.add_parser("plan", help="the fastest way to train a model, computed without building it"))
    show = commands.add_parser("schedule", help="draw a schedule: its timeline, bubble and peaks")
    show.add_argument("name", nargs="?", help="a schedule's name, or a .csv file of actions")
    show.add_argument("--list", action="store_true", help="a table of all schedules for these sizes")
    show.add_argument("--workers", type=_COUNT, default=4)
    show.add_argument("--chunks", type=_WHOLE, default=8, help="micro-batches")
    show.add_argument("--virtual", type=_WHOLE, default=None, help="stages per worker, for looped schedules")
    show.add_argument("--costs", type=_NOT_NEGATIVE, nargs=3, default=(1, 1, 1), metavar=("F", "I", "W"))
    show.add_argument("--latency", type=_NOT_NEGATIVE, default=0.0, help="time a value takes between workers")
    show.add_argument("--width", type=_WHOLE, default=100, help="columns of the text")
    for suffix in ("csv", "svg", "png", "html", "json"):
        show.add_argument(f"--{suffix}", type=Path, metavar="FILE")
    return parser


def _plan_parser(plan: argparse.ArgumentParser) -> None:
    """Add the arguments of ``rpcpipe plan``."""
    plan.add_argument("model", choices=["gpt"])
    plan.add_argument("--layers", type=_COUNT, required=True)
    for size in ("hidden", "heads", "vocab", "seq"):
        plan.add_argument(f"--{size}", type=_WHOLE, required=True)
    plan.add_argument("--workers", type=_COUNT, required=True)
    plan.add_argument("--memory", type=_BYTES, required=True, help="of each worker, such as 80GiB")
    plan.add_argument(
        "--flops", type=_POSITIVE, required=True, help="a worker's peak operations a second, such as 312e12"
    )
    plan.add_argument("--efficiency", type=_SHARE, default=0.5, help="the share of the peak that kernels reach")
    plan.add_argument(
        "--bandwidth", type=_POSITIVE, required=True, help="bytes a second between workers, such as 300e9"
    )
    plan.add_argument("--latency", type=_NOT_NEGATIVE, default=1e-5, help="seconds from one worker to another")
    plan.add_argument("--batch", type=_WHOLE, default=1536, help="sequences a step")
    plan.add_argument("--chunks", type=_WHOLE, default=None, help="micro-batches, instead of trying several numbers")
    plan.add_argument("--replicas", type=_WHOLE, default=None, help="instead of trying all numbers")
    plan.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, gradients and optimizer state")
    plan.add_argument(
        "--autocast", choices=[*DTYPES, "none"], help="what layers compute in; bfloat16 for float32 weights, else none"
    )
    plan.add_argument("--scores", action="store_true", help="attention keeps its scores: it is not one kernel")
    plan.add_argument("--undo", choices=UNDO, help="instead of copy where that fits, and else off")
    plan.add_argument("--svg", type=Path, metavar="FILE", help="a picture of the workers' memory")
    plan.add_argument("--draw", action="store_true", help="the step's timeline, too; of a long step its beginning")


def _plan(args: argparse.Namespace) -> None:
    """Print the plan of a GPT of the given sizes; raises PartitionError if nothing fits."""
    cast = args.autocast or ("bfloat16" if args.dtype == "float32" else "none")
    model = GPT(
        args.layers, args.hidden, args.heads, args.vocab, args.seq, args.dtype, None if cast == "none" else cast,
        args.scores,
    )  # fmt: skip
    sizes = [1, 2, 4, 8] if args.chunks is None else [-(-args.batch // args.chunks)]
    layer_costs = {size: model.layer_costs(size, args.flops * args.efficiency) for size in sizes}
    machine = Machine(args.workers, args.memory, args.latency, args.bandwidth)
    rows = layouts(args.workers, args.layers + 2, args.replicas)
    plan = decide(Search(CostModel(layer_costs, machine, 16 * args.seq), args.batch, layouts=rows), args.undo)
    print(f"GPT of {model.parameters / 1e9:,.2f} billion parameters, {args.batch} sequences of {args.seq} a step")
    print(plan)
    if args.svg:
        args.svg.write_text(plan.memory_svg(), encoding="utf-8")
    if args.draw:
        print(plan.timeline.to_text())


def _schedule(args: argparse.Namespace) -> None:
    """Print a schedule's timeline, or the table of all schedules, and write the files that are asked for."""
    forward, input_gradient, weight_gradient = args.costs
    costs = Costs(forward, input_gradient, weight_gradient, latency=args.latency)
    if args.list or args.name is None:
        print(_table(args, costs))
        return
    schedule = _get(args.name, args)
    timeline = schedule.simulate(costs)
    print(f"{schedule.name}: {schedule.workers} workers, {schedule.stages} stages, {schedule.chunks} micro-batches")
    print(timeline.to_text(args.width))
    if args.csv:
        args.csv.write_text(schedule.to_csv())
    for path in filter(None, (args.svg, args.png, args.html, args.json)):
        timeline.save(path)


def _get(name: str, args: argparse.Namespace) -> Schedule:
    """Return the schedule by its name, or from a .csv file; raises ScheduleError if it cannot run."""
    if name.endswith(".csv"):
        return Schedule.from_csv(Path(name).read_text(), name=Path(name).stem)
    return schedules.get(name, args.workers, args.chunks, _virtual(name, args.virtual)).validate()


def _virtual(name: str, virtual: int | None) -> int:
    """Return ``virtual``, or the fewest stages per worker that the schedule can have."""
    return schedules.fewest_virtual_stages(name) if virtual is None else virtual


def _table(args: argparse.Namespace, costs: Costs) -> str:
    """Return a line for every schedule: its stages, makespan, bubble and peak, or why it does not exist here."""
    lines = [f"{'schedule':<12} {'stages':>6} {'makespan':>9} {'bubble':>7} {'peak in flight':>15}  remark"]
    for name in schedules.names():
        try:
            schedule = schedules.get(name, args.workers, args.chunks, _virtual(name, None))
        except RpcPipeError as error:
            lines.append(f"{name:<12} {error}")
            continue
        timeline = schedule.simulate(_per_worker(costs, schedule))
        peaks = timeline.peak_in_flight
        peak = f"{min(peaks)} to {max(peaks)}" if min(peaks) != max(peaks) else str(peaks[0])
        lines.append(
            f"{name:<12} {schedule.stages:>6} {timeline.makespan:>9.4g} {timeline.bubble:>7.1%} {peak:>15}"
            f"  {schedules.describe(name)}"
        )
    lines.append(
        f"{args.workers} workers, {args.chunks} micro-batches; the same model cut into more stages has smaller ones:"
        " makespans compare, and a peak counts (stage, micro-batch) pairs"
    )
    return "\n".join(lines)


def _per_worker(costs: Costs, schedule: Schedule) -> Costs:
    """Return the costs of one stage, where ``costs`` are those of all stages of a worker."""
    share = schedule.workers / schedule.stages
    forward, input_gradient, weight_gradient = (
        float(cost) * share  # type: ignore[arg-type]
        for cost in (costs.forward, costs.input_gradient, costs.weight_gradient)
    )
    return Costs(forward, input_gradient, weight_gradient, latency=costs.latency)


if __name__ == "__main__":
    sys.exit(main())
