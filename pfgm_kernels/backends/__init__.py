# SPDX-License-Identifier: Apache-2.0
"""The table of backends, in order of preference, and the choice among them."""

from __future__ import annotations

from types import ModuleType

import torch

from pfgm_kernels.backends import _native, cpu, cuda, eager, triton

# `cuda` comes after `eager`, which runs everywhere: a kernel that has not been run on hardware is
# never chosen unless it is asked for by name.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "triton": triton, "cuda": cuda}


def choose(backend: str | None, device: torch.device, d: int, requires_grad: bool) -> str:
    """The name of the backend that will run.

    Raises:
        ValueError: `backend` is not a backend's name.
        RuntimeError: the backend asked for cannot run, with the reason.
    """
    if backend is None:
        for name, module in BACKENDS.items():
            if module.unsupported_reason(device, d, requires_grad) is None:
                return name
        raise RuntimeError(f"no backend supports {device}: {eager.unsupported_reason(device)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend expects one of {', '.join(BACKENDS)} or None, got {backend!r}")
    reason = BACKENDS[backend].unsupported_reason(device, d, requires_grad)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return backend


class Report(dict[str, str]):
    """What `report` returns; prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {state}" for name, state in self.items())


def report() -> Report:
    """Each backend's name with "available" (and what of forward mode it leaves to another) or the
    reason why it is not, and what the extension was built with under "extension".
    """
    states = {name: _state(module) for name, module in BACKENDS.items()}
    return Report(states, extension=_native.description())


def _state(module: ModuleType) -> str:
    reason = module.unsupported_reason()
    if reason is not None or module is eager:
        return reason or "available"
    return f"available (forward mode{' in x0' if hasattr(module, 'jvp') else ''} by eager)"
