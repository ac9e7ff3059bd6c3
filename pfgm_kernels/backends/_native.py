# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: the only place with data_ptr() and streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from pfgm_kernels import _C

    build_info: dict[str, str] = _C.build_info()
    missing_reason = None
except ImportError as error:
    build_info = {}
    missing_reason = f"the extension is not built or does not load ({error})"


def description() -> str:
    """What the extension was built with, or why it is missing."""
    return missing_reason or ", ".join(f"{key} {value}" for key, value in build_info.items())


def launch(entry: str, **arguments: Any) -> Any:
    """Call an entry point of the extension with tensors as pointers, and return what it does.

    The tensors are held by `arguments` until the call returns (a CPU kernel has then finished; a
    CUDA kernel's tensors are kept by torch's stream-ordered allocator).
    """
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    pointers = {
        name: value.data_ptr() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if device.type == "cuda":
        pointers["device"] = device.index
        pointers["stream"] = torch.cuda.current_stream(device).cuda_stream
    return getattr(_C, entry)(**pointers)


def cuda_unavailable() -> str | None:
    """Why the extension's CUDA runtime cannot run here (driver, device), or None."""
    return _C.cuda_unavailable()
