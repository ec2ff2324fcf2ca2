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

from rpcpipe import __version__, _tables, schedules
from rpcpipe._arguments import require_count, require_number
from rpcpipe.cluster import doctor
from rpcpipe.cluster.host_agent import serve_rank
from rpcpipe.errors import ArgumentError, RpcPipeError, require, require_positive
from rpcpipe.planning import CostModel, Search
from rpcpipe.planning.gpt import DTYPES, GPT
from rpcpipe.planning.layer_cost import UNDO
from rpcpipe.planning.loss_cost import Healing, host_names
from rpcpipe.planning.machine import Machine
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


_DOCTOR = (
    "Examine this machine: versions, cores and GPUs, network interfaces, shared memory, leftovers of earlier runs, the"
    " variables of a job on several hosts, and whether a worker can be launched. What would keep a cluster from forming"
    " is named with what to do about it; the exit status is then 1."
)
_WORKER = (
    "Serve as a worker of the driver that calls rp.connect(), until it closes. The environment says which rank this is:"
    " RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (or what torchrun and Slurm set) and RPCPIPE_SECRET."
)
_PLAN = "Find the fastest schedule, cut, micro-batches, recomputation and replicas that fit the memory, and say why."
_SCHEDULE = "Draw the step that a schedule makes, with its bubble and the micro-batches in flight."
_FILES = {
    "csv": "the actions, as rp.Schedule.from_csv reads them",
    "svg": "a picture (needs matplotlib)",
    "png": "a picture (needs matplotlib)",
    "html": "a page with the picture",
    "json": "a trace for Perfetto and Chrome",
}


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = _Parser(prog="rpcpipe", description="Pipeline parallelism from one Python process.")
    parser.add_argument("--version", action="version", version=f"rpcpipe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add(commands, "doctor", "examine this machine; exit status 1 if a cluster would not form", _DOCTOR)
    _add(commands, "worker", "serve as the rank that the environment says, for a driver's rp.connect()", _WORKER)
    views.add_parsers(commands, _PORT, _POSITIVE)
    _plan_parser(_add(commands, "plan", "the fastest way to train a model, computed without building it", _PLAN))
    _schedule_parser(_add(commands, "schedule", "draw a schedule: its timeline, bubble and peaks", _SCHEDULE))
    return parser


def _add(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    """Add a subcommand and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    return parser


def _option(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], what: str, default: Any = None, **more: Any
) -> None:
    """Add an option with its default, if there is one, in its help."""
    shown = "" if default is None else " (default: %(default)s)"
    parser.add_argument(name, type=kind, default=default, help=what + shown, **more)


def _schedule_parser(show: argparse.ArgumentParser) -> None:
    """Add the arguments of ``rpcpipe schedule``."""
    show.add_argument("name", nargs="?", help="a schedule's name, or a .csv file of actions")
    show.add_argument("--list", action="store_true", help="a table of all schedules for these sizes")
    _option(show, "--workers", _COUNT, "workers, which compute at the same time", 4)
    _option(show, "--chunks", _WHOLE, "micro-batches", 8)
    _option(show, "--virtual", _WHOLE, "stages per worker (default: the fewest that the schedule can have)")
    costs = "time of a forward, an input gradient and a weight gradient on a stage"
    _option(show, "--costs", _NOT_NEGATIVE, costs, (1, 1, 1), nargs=3, metavar=("F", "I", "W"))
    _option(show, "--latency", _NOT_NEGATIVE, "time a value takes between workers", 0.0)
    _option(show, "--width", _WHOLE, "columns of the text", 100)
    for suffix, what in _FILES.items():
        _option(show, f"--{suffix}", Path, f"write {what}", metavar="FILE")


def _plan_parser(plan: argparse.ArgumentParser) -> None:
    """Add the arguments of ``rpcpipe plan``."""
    plan.add_argument("model", choices=["gpt"], help="the kind of model, of the sizes below")
    _option(plan, "--layers", _COUNT, "blocks", required=True)
    _option(plan, "--hidden", _WHOLE, "width of a block", required=True)
    _option(plan, "--heads", _WHOLE, "attention heads of a block", required=True)
    _option(plan, "--vocab", _WHOLE, "tokens of the vocabulary", required=True)
    _option(plan, "--seq", _WHOLE, "tokens of a sequence", required=True)
    _option(plan, "--workers", _COUNT, "workers to plan for", required=True)
    _option(plan, "--memory", _BYTES, "of each worker, such as 80GiB", required=True)
    _option(plan, "--flops", _POSITIVE, "a worker's peak operations a second, such as 312e12", required=True)
    _option(plan, "--efficiency", _SHARE, "the share of the peak that kernels reach", 0.5)
    _option(plan, "--bandwidth", _POSITIVE, "bytes a second between workers, such as 300e9", required=True)
    _option(plan, "--latency", _NOT_NEGATIVE, "seconds from one worker to another", 1e-5)
    _option(plan, "--batch", _WHOLE, "sequences a step", 1536)
    _option(plan, "--chunks", _WHOLE, "micro-batches (default: several numbers are tried)")
    _option(plan, "--replicas", _WHOLE, "copies of the pipeline (default: all numbers are tried)")
    dtypes = "of weights, gradients and optimizer state"
    _option(plan, "--dtype", str, dtypes, "float32", choices=DTYPES)
    cast = "what layers compute in (default: bfloat16 for float32 weights, else none)"
    _option(plan, "--autocast", str, cast, choices=[*DTYPES, "none"])
    plan.add_argument("--scores", action="store_true", help="attention keeps its scores: it is not one kernel")
    undo = "how a failed update is taken back (default: copy where that fits, else off)"
    _option(plan, "--undo", str, undo, choices=UNDO)
    hosts = "hosts of the workers; with more than one, snapshots for the loss of one count"
    _option(plan, "--hosts", _COUNT, hosts, 1)
    _option(plan, "--svg", Path, "write a picture of the workers' memory", metavar="FILE")
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
    require(args.hosts <= args.workers, f"--hosts={args.hosts} are more than the {args.workers} workers")
    healing = Healing(hosts=host_names(args.workers, args.hosts))
    machine = Machine(args.workers, args.memory, args.latency, args.bandwidth, healing=healing)
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
