"""Save and load a pipeline, on the driver. Every worker writes and reads the tensors of its stages.

Random numbers are a function of (seed, step, micro-batch, layer), so seed and step are all of their state.
"""

from __future__ import annotations

import copy
import os
import socket
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from rpcpipe._arguments import require_flag, require_path
from rpcpipe.checkpoint import tensor_file
from rpcpipe.checkpoint.directory import MANIFEST, draft, newest, prune, publish
from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.checkpoint.plain_state import Holders, Stateful, decode, encode
from rpcpipe.checkpoint.shard import Written, some
from rpcpipe.checkpoint.tensor_file import Reader
from rpcpipe.driver.optimizer_state import merged
from rpcpipe.driver.replies import raise_loss
from rpcpipe.driver.runtime import Runtime
from rpcpipe.errors import (
    CheckpointError,
    Failure,
    StageError,
    StateError,
    require,
    require_whole,
)
from rpcpipe.model.extra_state import packed, unpacked
from rpcpipe.model.tied_weights import Tie, completed
from rpcpipe.pipeline.arguments import check_state, loadable
from rpcpipe.stage.likeness import unlike
from rpcpipe.transport.interrupts import shield_interrupts
from rpcpipe.worker.operations import (
    ApplyCheckpoint,
    DropCheckpoint,
    GetState,
    LoadState,
    Operation,
    ReadCheckpoint,
    SaveShard,
)

_DRIVER_FILE = "driver.safetensors"
_SHARED = "A checkpoint needs one file system that all hosts have at the same path."


def state_dict(runtime: Runtime, trainable: bool = False) -> OrderedDict[str, Any]:
    """Return parameters, buffers and extra state of the first replica by name, in the model's order and on the CPU.

    ``trainable``: the parameters that require a gradient alone.
    """
    states = _by_stage(runtime, require_flag("trainable", trainable))
    return OrderedDict((key, value) for state in states.values() for key, value in state.items())


def _by_stage(runtime: Runtime, trainable: bool = False) -> dict[int, dict[str, Any]]:
    """Return the state of the first replica's stages, in their order; several may have a tied weight's name."""
    driver, wanted = runtime.driver, GetState(trainable)
    states = driver.collect({name: driver.call(name, wanted) for name in runtime.layout.pipeline_of(0)})
    by_stage = {stage: state for stages in states.values() for stage, state in stages.items()}
    return {stage: unpacked(by_stage[stage]) for stage in sorted(by_stage)}


def load_state_dict(runtime: Runtime, state: Mapping[str, Any]) -> None:
    """Give all replicas the parameters and buffers of ``state``.

    A tied weight may be given under one of its names or, with the same value, under several. Raises CheckpointError,
    before anything changes, unless names and shapes are the model's.
    """
    state = completed(runtime.deployment.ties, loadable(state))
    live = _by_stage(runtime)
    check_state({key: value for part in live.values() for key, value in part.items()}, state)
    parts: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in runtime.names}
    packed_state = packed(state)
    for stage in runtime.stages:
        for worker in stage.workers:
            parts[worker][stage.index] = {key: packed_state[key] for key in live[stage.index]}
    runtime.driver.collect({name: runtime.driver.call(name, LoadState(parts[name])) for name in runtime.names})
    runtime.torn.replaced("weights")
    runtime.history.begin_anew()


def save(
    runtime: Runtime, directory: str | os.PathLike[str], stateful: Holders, position: Any, keep: int | None
) -> Path:
    """Write a checkpoint into a new folder of ``directory``, keep the newest ``keep`` ones, and return the folder.

    Ctrl-C is delivered while waiting for workers (the save is abandoned) or at the end (the save is complete). Raises
    StateError within a step or an accumulation, ArgumentError for a wrong value, and CheckpointError.
    """
    runtime.check_no_step("save")
    require(
        runtime.settings.trains,
        "without an optimizer there is no training to go on with: save pipe.state_dict()",
        error=StateError,
    )
    runtime.check_accumulated("save")
    if keep is not None:
        require_whole("keep", keep, otherwise=", or None for all")
    directory = absolute(directory)
    check_stateful(stateful)
    with shield_interrupts():
        tensors: dict[str, torch.Tensor] = {}
        manifest = Manifest(
            step=runtime.trained,
            position=encode(position, "position", tensors),
            stateful=encode(_states(stateful), "stateful", tensors),
            parts=encode(_states(runtime.parts), "pipeline", tensors),
        )
        with draft(directory) as folder:
            written = _write_shards(runtime, folder)
            used = zip(*(zip(own.groups, own.used, strict=True) for own in written if own.groups), strict=True)
            manifest.groups = encode(merged(used, runtime.optimizer.changes()), "groups", tensors)
            _fill(manifest, written, runtime.deployment.ties)
            if tensors:
                manifest.tensors |= tensor_file.write(folder / _DRIVER_FILE, tensors)
            manifest.write_index(folder, sum(shard.weight_bytes for shard in written))
            manifest.write(folder)
            final = publish(folder, runtime.trained)
        prune(directory, keep)
    runtime.note_event("saved", str(final))
    return final


def load(runtime: Runtime, directory: str | os.PathLike[str], stateful: Holders, *, missing_ok: bool = False) -> Any:
    """Load the newest checkpoint in ``directory``, or that very checkpoint; return its ``position``.

    With ``missing_ok``, return instead whether there was one to load. All workers and the driver read and check their
    parts before any of them changes. If a worker dies, all load again; an error once some have changed closes the
    pipeline. Raises StateError within a step, ArgumentError for a wrong value, and CheckpointError.
    """
    runtime.check_no_step("load")
    require_flag("missing_ok", missing_ok)
    path = absolute(directory)
    check_stateful(stateful)
    halfway = False

    def once() -> Any:
        nonlocal halfway
        if (folder := newest(path)) is None:
            require(
                missing_ok,
                f"no checkpoint in {path}: neither {MANIFEST} nor a folder like 00001-step-000100; with"
                " missing_ok=True training begins anew there",
                error=CheckpointError,
            )
            return False
        with shield_interrupts():
            manifest, position, groups = _read(runtime, folder, stateful)
            replies, halfway = _apply(runtime, manifest, groups), True
            try:
                runtime.driver.collect(replies)
            except KeyboardInterrupt:
                halfway = False  # workers run what is sent, whatever interrupts the wait
                raise
            halfway = False
            runtime.torn.replaced("weights", "optimizer")
            runtime.history.begin_anew()
        runtime.note_event("loaded", str(folder))
        return missing_ok or position

    try:
        return runtime.healed(once, after="")
    except BaseException as error:
        if halfway:
            runtime.close()
            error.add_note("Some workers have loaded the checkpoint and some have not, so the pipeline was closed.")
        raise


def _read(runtime: Runtime, folder: Path, stateful: Holders) -> tuple[Manifest, Any, Any]:
    """Let all workers read and check their parts of ``folder``, and give ``stateful`` its own.

    Returns the manifest, the position and the optimizer's groups.
    """
    manifest = Manifest.read(folder)
    _check_driver(runtime, folder, manifest, stateful)
    with Reader(folder, manifest.tensors) as reader:
        position, states, parts, groups = decode(
            [manifest.position, manifest.stateful, manifest.parts, manifest.groups], reader.get
        )
    try:
        calls = dict.fromkeys(runtime.names, ReadCheckpoint(folder, manifest))
        names_read = _outcomes(runtime, calls, "nothing has changed")
        _check_complete(folder, manifest, names_read.values())
        shield_interrupts.check()
        # A part that only one side has is left as it is; the two may train in different precision, for instance.
        own_parts = [
            (part, parts[name], f"the pipeline's {name}") for name, part in runtime.parts.items() if name in parts
        ]
        _restore(own_parts + [(holder, states[name], repr(name)) for name, holder in stateful.items()], folder)
    except BaseException:
        if runtime.cluster.healthy:
            for name in runtime.names:
                runtime.driver.call(name, DropCheckpoint())
        raise
    return manifest, position, groups


def _apply(runtime: Runtime, manifest: Manifest, groups: Any) -> dict[str, Future[Any]]:
    """Let workers and driver go on from what they have read; return the workers' replies."""
    replies = {name: runtime.driver.call(name, ApplyCheckpoint(manifest.seed)) for name in runtime.names}
    if runtime.settings.trains:
        runtime.optimizer.adopt(groups)
    runtime.trained = manifest.step
    runtime.forget_accumulated()
    return replies


def _write_shards(runtime: Runtime, folder: Path) -> list[Written]:
    """Let all workers write their shards at once; return what each has written.

    Raises CheckpointError if a worker fails, or if the driver does not see its files.
    """
    # Replicas hold the same state, unless their optimizers are sharded.
    names = runtime.names if runtime.deployment.shard else runtime.layout.pipeline_of(0)
    calls = {name: SaveShard(folder, f"{index:05}-of-{len(names):05}") for index, name in enumerate(names, 1)}
    shards = _outcomes(runtime, calls, "the checkpoints before are as they were")
    for name, shard in shards.items():
        for file, size in shard.sizes.items():
            path = folder / file
            if not path.exists() or path.stat().st_size != size:
                raise CheckpointError(f"{name} has written {path} and the driver does not see it. {_SHARED}")
    return list(shards.values())


def _outcomes(runtime: Runtime, calls: Mapping[str, Operation], after: str) -> dict[str, Any]:
    """Wait for all workers' results and return them by worker.

    If any failed, raises one CheckpointError, whose message ends with ``after``; StageError for an error of any other
    type, WorkerLost for a worker that has died.
    """
    driver = runtime.driver
    outcomes = driver.outcomes({name: driver.call(name, operation) for name, operation in calls.items()})
    raise_loss(outcomes.values())
    failed = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Failure)}
    for name, failure in failed.items():
        error = StageError.of(failure)
        if not isinstance(error, CheckpointError):
            raise error
        others = f"; {', '.join(other for other in failed if other != name)} failed too" if len(failed) > 1 else ""
        host = next(worker.host for worker in runtime.cluster.workers if worker.name == name)
        hint = "" if host == socket.gethostname() else f" {_SHARED}"
        raise CheckpointError(f"{name} on {host}: {failure.message}{others}; {after}.{hint}") from error
    return outcomes


def _fill(manifest: Manifest, written: Sequence[Written], ties: Sequence[Tie]) -> None:
    """Enter into ``manifest`` what the workers have written.

    Where optimizers are sharded, only a tied weight's first layer has its state.
    """
    for shard in written:
        manifest.weights |= shard.weights
        manifest.tensors |= shard.tensors
        manifest.state |= shard.state
        manifest.shared |= shard.shared
        manifest.extra |= shard.extra
        manifest.loss |= shard.loss
    manifest.shared |= {holder.name: tie.holders[0].name for tie in ties for holder in tie.holders[1:]}
    manifest.seed = written[0].seed
    manifest.optimizer = next((shard.optimizer for shard in written if shard.optimizer), None)


def _check_driver(runtime: Runtime, folder: Path, manifest: Manifest, stateful: Holders) -> None:
    """Raise CheckpointError unless ``stateful`` has the saved names and the optimizer the saved number of groups."""
    if manifest.stateful.keys() != stateful.keys():
        raise CheckpointError(
            f"{folder} holds the state of {sorted(manifest.stateful)} and load was given {sorted(stateful)};"
            " pass stateful={name: object} with the names given to save"
        )
    own_groups = len(runtime.optimizer.param_groups)
    if runtime.settings.trains and len(manifest.groups) != own_groups:
        raise CheckpointError(
            f"{folder} holds {len(manifest.groups)} parameter groups, this pipeline's optimizer has {own_groups}"
        )


def _check_complete(folder: Path, manifest: Manifest, names_read: Iterable[Sequence[str]]) -> None:
    """Raise CheckpointError if the checkpoint has weights that no worker has read; ``names_read``: by worker."""
    saved = manifest.weights.keys() | manifest.extra.keys()
    extra = sorted(saved - {name for names in names_read for name in names})
    if extra:
        raise CheckpointError(f"{folder} is of another model: this one lacks {some(extra)}")


def _states(stateful: Holders) -> dict[str, Any]:
    """Return the state of every object by its name."""
    return {name: _state(holder) for name, holder in stateful.items()}


def _state(holder: Stateful) -> Any:
    """Return the state of a generator, or of an object with ``state_dict``."""
    return holder.get_state() if isinstance(holder, torch.Generator) else holder.state_dict()


def absolute(directory: Any) -> Path:
    """Return the argument ``directory`` as an absolute path; raises ArgumentError for what is none."""
    path = require_path("directory", directory)
    try:
        return path.absolute()
    except OSError as error:
        raise CheckpointError(
            f"{path} is a path in a folder that no longer exists: {error}; pass a whole path"
        ) from error


def check_stateful(stateful: Any) -> None:
    """Raise ArgumentError unless ``stateful`` maps names to objects whose state can be had and set."""
    require(
        isinstance(stateful, Mapping),
        f"stateful must be a dict of objects by name, such as {{'lr': scheduler}}, not {stateful!r:.100}",
    )
    for name, holder in stateful.items():
        require(
            isinstance(name, str) and not name.startswith("$"),
            f"the names in stateful must be strings that do not begin with '$', not {name!r:.100}",
        )
        require(
            isinstance(holder, torch.Generator)
            or all(callable(getattr(holder, method, None)) for method in ("state_dict", "load_state_dict")),
            f"stateful[{name!r}] must be a torch.Generator or have the methods state_dict and load_state_dict, and is"
            f" {holder!r:.100}; plain values go into position=",
        )


def _check_kind(holder: Stateful, before: Any, state: Any) -> None:
    """Raise CheckpointError if torch's own ``holder`` would take ``state`` and fail later, when it is used."""
    if isinstance(holder, (torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)):
        missing = sorted(before.keys() - state.keys()) if isinstance(state, dict) else []
        how = f"lacks {missing}" if missing else unlike(before, state)
        require(not how, how, error=CheckpointError)


def _restore(saved: Sequence[tuple[Stateful, Any, str]], folder: Path) -> None:
    """Set the state of every object; ``saved``: (object, state, its name in messages).

    Raises CheckpointError if an object does not take its state; the objects before it then have their old states
    again.
    """
    before = [copy.deepcopy(_state(holder)) for holder, _, _ in saved]
    for count, (holder, state, name) in enumerate(saved, 1):
        try:
            _check_kind(holder, before[count - 1], state)
            _set_state(holder, state)
        except Exception as error:
            for (changed, _, _), old in zip(saved[:count], before, strict=False):
                _set_state(changed, old)
            raise CheckpointError(
                f"{name} refuses its state in {folder}: {type(error).__name__}: {error}; nothing has changed"
            ) from error


def _set_state(holder: Stateful, state: Any) -> None:
    """Set the state that ``_state`` returned."""
    if isinstance(holder, torch.Generator):
        holder.set_state(state)
    else:
        holder.load_state_dict(state)
