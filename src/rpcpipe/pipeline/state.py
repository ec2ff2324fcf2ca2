"""Save and load: the driver's half. The workers write and read the tensors, each its own.

Random numbers are a function of (seed, step, micro-batch, layer), so seed and step are their state.
"""

from __future__ import annotations

import copy
import socket
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rpcpipe.checkpoint import tensor_file
from rpcpipe.checkpoint.directory import draft, newest, prune, publish
from rpcpipe.checkpoint.manifest import Manifest
from rpcpipe.checkpoint.plain_state import Holders, Stateful, decode, encode
from rpcpipe.checkpoint.shard import Written, some
from rpcpipe.checkpoint.tensor_file import Reader
from rpcpipe.driver.runtime import Runtime
from rpcpipe.errors import CheckpointError, Failure, StageError, require, require_whole
from rpcpipe.model.layers import layer_of
from rpcpipe.model.tied_weights import Tie, completed
from rpcpipe.pipeline.arguments import check_state
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


def state_dict(runtime: Runtime) -> OrderedDict[str, torch.Tensor]:
    """All parameters and buffers, on the CPU."""
    driver = runtime.driver
    found = driver.collect({name: driver.call(name, GetState()) for name in runtime.layout.pipeline_of(0)})
    by_stage = {stage: state for stages in found.values() for stage, state in stages.items()}
    return OrderedDict((key, value) for stage in sorted(by_stage) for key, value in by_stage[stage].items())


def load_state_dict(runtime: Runtime, state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of ``state_dict``; CheckpointError, before anything changes, unless names and shapes fit.

    A tied weight may come under one of its names or, with the same value, under several.
    """
    state = completed(runtime.deployment.ties, state)
    check_state(state_dict(runtime), state)
    owner = {layer: stage for stage in runtime.stages for layer in stage.layers}
    parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {name: {} for name in runtime.names}
    for key, value in state.items():
        stage = owner[layer_of(key, owner)]
        for worker in stage.workers:
            parts[worker].setdefault(stage.index, {})[key] = value
    runtime.driver.collect({name: runtime.driver.call(name, LoadState(parts[name])) for name in runtime.names})


def save(runtime: Runtime, directory: str | Path, stateful: Holders, position: Any, keep: int | None) -> Path:
    """What ``pipe.save`` does; a Ctrl-C ends it where it waits for the workers, or comes when it is done."""
    require(runtime.active is None, "a step is open: save after its with-block")
    done = runtime.progress.done
    require(
        done == 0,
        f"{done} of {runtime.settings.accumulate} calls of an accumulation are done: save after the one that updates",
    )
    if keep is not None:
        require_whole("keep", keep, otherwise=", or None for all")
    tensor_file.require()
    directory = Path(directory).absolute()
    with shield_interrupts():
        tensors: dict[str, torch.Tensor] = {}
        manifest = Manifest(
            runtime.trained,
            position=encode(position, "position", tensors),
            stateful=encode(_states(stateful), "stateful", tensors),
            parts=encode(_states(runtime.parts), "pipeline", tensors),
        )
        with draft(directory) as folder:
            written = _write_shards(runtime, folder)
            manifest.groups = encode(_merged(written, runtime.optimizer.changes()), "groups", tensors)
            _fill(manifest, written, runtime.deployment.ties)
            if tensors:
                manifest.tensors |= tensor_file.write(folder / _DRIVER_FILE, tensors)
            manifest.write_index(folder, sum(shard.weight_bytes for shard in written))
            manifest.write(folder)
            final = publish(folder, runtime.trained)
        prune(directory, keep)
    return final


def load(runtime: Runtime, directory: str | Path, stateful: Holders) -> Any:
    """What ``pipe.load`` does: everybody reads and checks, then everybody changes."""
    require(runtime.active is None, "a step is open: load after its with-block")
    tensor_file.require()
    folder = newest(Path(directory).absolute())
    manifest = Manifest.read(folder)
    _check_driver(runtime, folder, manifest, stateful)
    with Reader(folder, manifest.tensors) as reader:
        position, states, parts, groups = decode(
            [manifest.position, manifest.stateful, manifest.parts, manifest.groups], reader.get
        )
    driver, names = runtime.driver, runtime.names
    with shield_interrupts():
        try:
            calls = dict.fromkeys(names, ReadCheckpoint(folder, manifest))
            found = _outcomes(runtime, calls, "nothing has changed")
            _check_complete(folder, manifest, found.values())
            shield_interrupts.check()
            # A part that either side lacks is left as it is: precision, say, may differ.
            own = [
                (part, parts[name], f"the pipeline's {name}") for name, part in runtime.parts.items() if name in parts
            ]
            _restore([*own, *((holder, states[name], repr(name)) for name, holder in stateful.items())], folder)
        except BaseException:
            if runtime.cluster.healthy:
                for name in names:
                    driver.call(name, DropCheckpoint())
            raise
        # From here on it is done: what is posted happens, whatever interrupts the wait.
        replies = {name: driver.call(name, ApplyCheckpoint(manifest.seed)) for name in names}
        runtime.optimizer.adopt(groups)
        runtime.trained = manifest.step
        runtime.forget_accumulated()
        _finish(runtime, replies)
    return position


def _write_shards(runtime: Runtime, folder: Path) -> list[Written]:
    """Every worker writes its own, all at once."""
    # Replicas hold the same, but for optimizers that are sharded over them.
    names = runtime.names if runtime.deployment.shard else runtime.layout.pipeline_of(0)
    calls = {name: SaveShard(folder, f"{number:05}-of-{len(names):05}") for number, name in enumerate(names, 1)}
    found = _outcomes(runtime, calls, "the checkpoints before are as they were")
    for name, shard in found.items():
        for file, size in shard.sizes.items():
            path = folder / file
            if not path.exists() or path.stat().st_size != size:
                raise CheckpointError(f"{name} has written {path} and the driver does not see it. {_SHARED}")
    return list(found.values())


def _outcomes(runtime: Runtime, calls: Mapping[str, Operation], after: str) -> dict[str, Any]:
    """Every worker's result once all are done; one CheckpointError, which ends with ``after``, if any failed."""
    driver = runtime.driver
    found = driver.outcomes({name: driver.call(name, operation) for name, operation in calls.items()})
    failed = {name: outcome for name, outcome in found.items() if isinstance(outcome, Failure)}
    for name, failure in failed.items():
        error = StageError.of(failure)
        if not isinstance(error, CheckpointError):
            raise error
        others = f"; {', '.join(other for other in failed if other != name)} failed too" if len(failed) > 1 else ""
        host = next(worker.host for worker in runtime.cluster.workers if worker.name == name)
        hint = "" if host == socket.gethostname() else f" {_SHARED}"
        raise CheckpointError(f"{name} on {host}: {failure.message}{others}; {after}.{hint}") from error
    return found


def _fill(manifest: Manifest, written: Sequence[Written], ties: Sequence[Tie]) -> None:
    """Enter what the workers have written.

    Where optimizers are sharded, a tied weight's state is with its first layer alone.
    """
    for shard in written:
        manifest.weights |= shard.weights
        manifest.tensors |= shard.tensors
        manifest.state |= shard.state
        manifest.shared |= shard.shared
    manifest.shared |= {holder.name: tie.holders[0].name for tie in ties for holder in tie.holders[1:]}
    manifest.seed = written[0].seed
    manifest.optimizer = next((shard.optimizer for shard in written if shard.optimizer), None)


def _merged(written: Sequence[Written], changes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per group the hyperparameters of the next step: ``changes``, and where nothing changed what all workers have.

    What a factory makes different on every worker is left to the factory.
    """
    first, *others = [shard.groups for shard in written if shard.groups]
    return [
        {key: value for key, value in group.items() if all(_same(value, other[at].get(key)) for other in others)}
        | dict(changes[at])
        for at, group in enumerate(first)
    ]


def _same(one: Any, other: Any) -> bool:
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    )


def _check_driver(runtime: Runtime, folder: Path, manifest: Manifest, stateful: Holders) -> None:
    if manifest.stateful.keys() != stateful.keys():
        raise CheckpointError(
            f"{folder} holds the state of {sorted(manifest.stateful)} and load was given {sorted(stateful)};"
            " pass stateful={name: object} with the names given to save"
        )
    mine = len(runtime.optimizer.param_groups)
    if len(manifest.groups) != mine:
        raise CheckpointError(
            f"{folder} holds {len(manifest.groups)} parameter groups, this pipeline's optimizer has {mine}"
        )


def _check_complete(folder: Path, manifest: Manifest, found: Iterable[Sequence[str]]) -> None:
    extra = sorted(manifest.weights.keys() - {name for names in found for name in names})
    if extra:
        raise CheckpointError(f"{folder} is of another model: this one lacks {some(extra)}")


def _states(stateful: Holders) -> dict[str, Any]:
    return {name: _state(holder) for name, holder in stateful.items()}


def _state(holder: Stateful) -> Any:
    return holder.get_state() if isinstance(holder, torch.Generator) else holder.state_dict()


def _restore(given: Sequence[tuple[Stateful, Any, str]], folder: Path) -> None:
    """Give every holder its state; ``given``: with what it is called. If one refuses, none has changed."""
    before = [copy.deepcopy(_state(holder)) for holder, _, _ in given]
    for number, (holder, state, name) in enumerate(given, 1):
        try:
            _set_state(holder, state)
        except Exception as error:
            for (changed, _, _), old in zip(given[:number], before, strict=False):
                _set_state(changed, old)
            raise CheckpointError(
                f"{name} refuses its state in {folder}: {type(error).__name__}: {error}; nothing has changed"
            ) from error


def _set_state(holder: Stateful, state: Any) -> None:
    if isinstance(holder, torch.Generator):
        holder.set_state(state)
    else:
        holder.load_state_dict(state)


def _finish(runtime: Runtime, replies: Mapping[str, Any]) -> None:
    try:
        runtime.driver.collect(replies)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        runtime.close()
        error.add_note("Some workers have loaded the checkpoint and some have not, so the pipeline was closed.")
        raise
