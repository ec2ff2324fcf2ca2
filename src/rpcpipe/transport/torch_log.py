"""Silence torch's C++ log, which no Python logging reaches."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_FATAL = 3


def hush() -> None:
    """Silence torch's C++ log: a connection that a death or a close breaks is no news here.

    It prints pages of C++ frames to stderr, past Python. TORCH_CPP_LOG_LEVEL does the same, but only
    if set before torch is imported; where the variable behind it is not found, nothing is changed.
    """
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        return
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level").value = _FATAL
    except (OSError, ValueError):
        pass
