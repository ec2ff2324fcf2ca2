"""torch's process-wide settings that decide what a model computes: read on the driver, applied on workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils.deterministic  # an attribute of torch only once it is imported

R = TypeVar("R")


class _Setting(NamedTuple):
    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _attribute(path: str) -> _Setting:
    owner, _, name = path.rpartition(".")
    find = attrgetter(owner)
    return _Setting(path, lambda: getattr(find(torch), name), lambda value: setattr(find(torch), name, value))


def _legacy(setting: _Setting) -> _Setting:
    """Return a setting that torch refuses to read (None here) once finer ones below it were set apart."""

    def read() -> Any:
        try:
            return setting.get()
        except RuntimeError:
            return None

    return setting._replace(get=read, set=lambda value: None if value is None else setting.set(value))


# Those that set others come before them.
_SETTINGS = (
    _Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting(
        "anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.set_anomaly_enabled(*value),
    ),
    _Setting("deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _legacy(_Setting("matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)),
    _legacy(_attribute("backends.cudnn.allow_tf32")),
    _Setting("flash attention", torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    _Setting(
        "memory-efficient attention",
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    _Setting("math attention", torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    _Setting("cuDNN attention", torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    *map(
        _attribute,
        (
            "utils.deterministic.fill_uninitialized_memory",
            "backends.cudnn.enabled",
            "backends.cudnn.benchmark",
            "backends.cudnn.deterministic",
            "backends.mkldnn.enabled",
            "backends.fp32_precision",
            "backends.cudnn.fp32_precision",
            "backends.mkldnn.fp32_precision",
            "backends.cuda.matmul.fp32_precision",
            "backends.cudnn.conv.fp32_precision",
            "backends.cudnn.rnn.fp32_precision",
            "backends.mkldnn.matmul.fp32_precision",
            "backends.mkldnn.conv.fp32_precision",
            "backends.mkldnn.rnn.fp32_precision",
            "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
            "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
        ),
    ),
)


class TorchSettings(NamedTuple):
    """The values of ``_SETTINGS``, and the device on which tensors are made by default."""

    values: tuple[Any, ...]
    device: str

    @classmethod
    def current(cls) -> TorchSettings:
        """Return the settings of this process, and of this thread, which has its own default device."""
        return cls(tuple(setting.get() for setting in _SETTINGS), str(torch.get_default_device()))

    def on(self, device: torch.device) -> TorchSettings:
        """Return the settings for a worker that computes on ``device``: the default device is that one of its kind."""
        same = torch.device(self.device).type == device.type
        return self._replace(device=str(device)) if same else self

    def apply(self) -> None:
        """Make these the settings, where they are not."""
        for setting, value in zip(_SETTINGS, self.values, strict=True):
            if setting.get() != value:
                setting.set(value)
        if self.device != str(torch.get_default_device()):
            torch.set_default_device(None if self.device == "cpu" else self.device)
        _last.settings = self

    def resume(self) -> None:
        """Make these the settings if others were applied since, or ``forget`` was called; costs next to nothing."""
        if _last.settings != self:
            self.apply()

    def around(self, function: Callable[..., R]) -> Callable[..., R]:
        """Return ``function`` that applies the settings first, for a worker without a pipeline."""
        return functools.partial(_applied, self, function)


class _Last:
    """What was applied last in this process, whose tasks all run on one thread."""

    settings: TorchSettings | None = None


_last = _Last()


def forget() -> None:
    """Have the next ``resume`` apply its settings: a function of the user's may have changed some."""
    _last.settings = None


def _applied(settings: TorchSettings, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    settings.apply()
    return function(*args, **kwargs)
