"""A saved model of transformers: every layer's weights are read from the folder by the workers that own the layer.

What a file's names and shapes become is decided by transformers' own loading, which runs here with tensors that have
no values, and on the workers with those of one layer.
"""

from __future__ import annotations

import copy
import json
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from rpcpipe.errors import ArgumentError, CheckpointError
from rpcpipe.model.hf.anatomy import Anatomy, part_of
from rpcpipe.model.hf.recipe import own_parameters
from rpcpipe.model.hf.skeleton import Skeleton

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INSTEAD = "read it here and pass the model: its class's from_pretrained(folder)"


@dataclass(frozen=True, eq=False)
class Weights:
    """What one layer reads: files and names there, by the names that transformers' loading is given.

    ``missing``: the layer's names that no file has, and which get initial values.
    """

    folder: Path
    sources: Mapping[str, tuple[str, str]]
    missing: frozenset[str]

    def __repr__(self) -> str:
        return f"the weights in {self.folder}"

    def fill(self, layer: nn.Module, path: str, frame: Skeleton) -> None:
        """Give ``layer``, the one at ``path`` of ``frame``'s model and without storage, its values.

        Raises CheckpointError with the file.
        """
        if torch.empty(0).is_meta:
            return  # it is built for its shapes
        values = self._read(path, frame)
        if absent := layer.state_dict().keys() - values.keys():
            if strange := {f"{path}.{name}" for name in absent} - self.missing:
                raise CheckpointError(
                    f"{min(strange)} cannot be read from {self.folder} by its layer alone; {_INSTEAD}"
                )
            initial = copy.deepcopy(layer)
            frame.initialize(initial)
            values |= {name: value for name, value in initial.state_dict().items() if name in absent}
        _put(layer, values)

    def _read(self, path: str, frame: Skeleton) -> dict[str, torch.Tensor]:
        model = frame.alone(path)
        with ExitStack() as stack:
            names = {file for file, _ in self.sources.values()}
            files = {name: stack.enter_context(_opened(self.folder / name)) for name in names}
            loaded = {name: files[file].get_slice(stored) for name, (file, stored) in self.sources.items()}
            missing = _load(model, loaded, frame.recipe.dtype, "cpu").missing_keys
            state = model.get_submodule(path).state_dict()
            return {name: value.clone() for name, value in state.items() if f"{path}.{name}" not in missing}


def _put(layer: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replace the parameters and buffers of ``layer`` by ``values``; parameters that are one stay one."""
    kept: dict[int, nn.Parameter] = {}
    for path, part in layer.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in own_parameters(part):
            made = nn.Parameter(values[prefix + name], parameter.requires_grad)
            part.register_parameter(name, kept.setdefault(id(parameter), made))
        for name, _ in list(part.named_buffers(recurse=False)):
            if prefix + name in values:
                setattr(part, name, values[prefix + name])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read on {socket.gethostname()}: {type(error).__name__}: {error}; every worker reads its"
            " layers' weights, so that the folder must be at this path on all hosts"
        ) from error
    with file:
        yield file


def _load(model: PreTrainedModel, values: Mapping[str, Any], dtype: torch.dtype | None, device: str) -> Any:
    """Load ``values`` as from_pretrained does; return what that says was missing, unexpected or of another shape."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model),
        )
        return convert_and_load_state_dict_in_model(model, dict(values), config)[0]
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Folder:
    """A folder that ``save_pretrained`` has written. ``tensors``: the file of each, and it without values."""

    path: Path
    config: PreTrainedConfig
    dtype: torch.dtype
    tensors: Mapping[str, tuple[str, torch.Tensor]] = field(repr=False)

    @classmethod
    def of(cls, path: Path, config: PreTrainedConfig | None) -> Folder:
        """Return the folder at ``path``; ``config`` stands for the one in it.

        Raises ArgumentError if it is none or was saved in another way, and CheckpointError for a damaged file.
        """
        path = path.expanduser().absolute()
        if not (path / "config.json").is_file() and config is None:
            raise ArgumentError(
                f"{path} is not a folder with a config.json, and from_transformers downloads nothing; pass a folder"
                " that save_pretrained has written"
            )
        if config is None:
            config = _config(path)
        elif not isinstance(config, PreTrainedConfig):
            raise ArgumentError(f"config must be a config of transformers, not a {type(config).__name__}")
        if getattr(config, "quantization_config", None) is not None:
            raise ArgumentError(f"the weights in {path} are quantized, and such a model cannot be trained here")
        elsewhere = getattr(config, "transformers_weights", None) or any(
            (path / name).is_file() for name in ("adapter_config.json", *type(config).extra_files)
        )
        files = [] if elsewhere else _files(path)
        if not files:
            raise ArgumentError(f"{path} has its weights not in {_ONE} or {_INDEX} alone; {_INSTEAD}")
        tensors = {name: (file, tensor) for file in files for name, tensor in _tensors(path / file)}
        floating = (tensor.dtype for _, tensor in tensors.values() if tensor.is_floating_point())
        dtype = config.dtype or next(floating, torch.float32)
        return cls(path, config, getattr(torch, dtype) if isinstance(dtype, str) else dtype, tensors)

    def weights(self, anatomy: Anatomy, paths: Sequence[str]) -> dict[str, Weights]:
        """Return what each of the layers at ``paths`` reads.

        Layers behind the blocks may lack weights, of which a warning says that they begin anew, as from_pretrained's
        does. Raises CheckpointError for other names, or shapes, than the model's.
        """
        recipe = anatomy.recipe
        model = recipe.weightless()
        ties = _tied(model)
        found = _load(model, {name: tensor for name, (_, tensor) in self.tensors.items()}, recipe.dtype, "meta")
        self._check_readable(found)
        targets = _targets(model, self.tensors)
        sources = {name: (self.tensors[name][0], name) for name in targets}
        for names in ties:
            self._share(names, found.missing_keys, targets, sources)
        missing = set(found.missing_keys)
        model._adjust_missing_and_unexpected_keys(found)
        self._check_names(anatomy, found, paths)
        owners = {name: part_of(target, paths) for name, target in targets.items()}
        return {
            path: Weights(
                self.path,
                {name: source for name, source in sources.items() if owners[name] == path},
                frozenset(name for name in missing if part_of(name, paths) == path),
            )
            for path in paths
        }

    def _check_readable(self, found: Any) -> None:
        if found.mismatched_keys:
            name, saved, own = min(found.mismatched_keys)
            raise CheckpointError(f"{self.path}: {name} has shape {tuple(saved)}, the model's {tuple(own)}")
        if found.conversion_errors:
            name, error = min(found.conversion_errors.items())
            raise CheckpointError(f"{self.path}: {name} cannot be converted without its values ({error}); {_INSTEAD}")

    def _share(
        self, names: Sequence[str], missing: set[str], targets: dict[str, str], sources: dict[str, tuple[str, str]]
    ) -> None:
        """Let each of ``names``, of one parameter, have the source of the one that was saved."""
        saved = {target: sources[name] for name, target in targets.items() if target in names}
        if not saved:
            return
        first, *others = saved.items()
        for name, source in others:
            if not torch.equal(self._value(first[1]), self._value(source)):
                raise CheckpointError(
                    f"{self.path}: {first[0]} and {name} are one weight by the config, and differ; say"
                    " tie_word_embeddings=False in it"
                )
        for name in (name for name in names if name not in saved):
            targets[name], sources[name] = name, first[1]
            missing.discard(name)

    def _value(self, source: tuple[str, str]) -> torch.Tensor:
        file, name = source
        with _opened(self.path / file) as opened:
            value: torch.Tensor = opened.get_tensor(name)
            return value

    def _check_names(self, anatomy: Anatomy, found: Any, paths: Sequence[str]) -> None:
        """Refuse names missing or unexpected before or in the blocks; warn of others."""
        ends = {*anatomy.tail, *anatomy.idle}
        absent = {name for name in found.missing_keys if part_of(name, paths) not in ends}
        foreign = {
            name for name in found.unexpected_keys if name.startswith(tuple(f"{b}." for b in anatomy.body.blocks))
        }
        said = f"{self.path}, read as a {anatomy.recipe},"
        if absent or foreign:
            what = f"lacks {some(absent)}" if absent else f"has {some(foreign)}, which the model has not"
            raise CheckpointError(f"{said} {what}; pass the config of the model that was saved")
        if found.missing_keys:
            warnings.warn(f"{said} lacks {some(found.missing_keys)}, which begin with initial values", stacklevel=5)
        if found.unexpected_keys:
            warnings.warn(f"{said} has {some(found.unexpected_keys)}, which the model has not", stacklevel=5)


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ArgumentError(f"transformers cannot read the config in {path}: {error}") from error


def some(names: Collection[str]) -> str:
    """Return the first of ``names`` and the number of the others."""
    first = min(names)
    return f"{first} and {len(names) - 1} more" if len(names) > 1 else first


def _files(path: Path) -> list[str]:
    """Return the names of the files with weights, none if they are of another kind."""
    if (path / _ONE).is_file():
        return [_ONE]
    if not (path / _INDEX).is_file():
        return []
    try:
        return sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / _INDEX} is damaged: {type(error).__name__}: {error}") from error


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            yield name, torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.long), device="meta")


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _targets(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Return by its stored name the name of the parameter, or of the first of those, that a tensor goes into.

    As ``convert_and_load_state_dict_in_model`` finds it; names of no parameter are left out.
    """
    state, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found = {}
    for name in stored:
        target, _ = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        if target in state:
            found[name] = target
    return found
