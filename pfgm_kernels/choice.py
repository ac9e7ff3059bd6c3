# SPDX-License-Identifier: Apache-2.0
"""Which backend runs where none is asked for, and what there is to know of all of them."""

from __future__ import annotations

import functools
from itertools import product

import torch

from pfgm_kernels import proof
from pfgm_kernels.backends import BACKENDS, _native, eager
from pfgm_kernels.problems import FAMILIES, Family, band_of

TRUSTED = ("cpu", "eager")
"""Backends whose kernels need no proof: the tests run them on what they are for."""
UNKNOWN = "to be proven at its first use"


def preferred(device: torch.device, band: int) -> tuple[str, ...]:
    """Names, first the backend that takes the fewest launches for what the band of d asks for."""
    if device.type != "cuda":
        return "cpu", "eager"
    return ("cuda", "triton", "eager") if band == 0 else ("triton", "cuda", "eager")


def choose(
    backend: str | None, device: torch.device, d: int, codes: bool, derivatives: bool
) -> str:
    """The name of the backend that will run: the one asked for, or the first of `preferred` that
    can, and whose kernels have proven themselves on the device where they have to.

    Args:
        codes: whether references are in 8 bits.
        derivatives: whether any will be asked for, backward or forward.

    Raises:
        ValueError: `backend` is not a backend's name.
        RuntimeError: the backend asked for cannot run, with the reason; or a CUDA graph is captured
            and kernels have yet to prove themselves.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend expects one of {', '.join(BACKENDS)} or None, got {backend!r}")
    name, reason = _choose(backend, device, band_of(d), codes, derivatives)
    if reason is not None:
        raise RuntimeError(reason)
    return name


def _choose(
    backend: str | None, device: torch.device, band: int, codes: bool, derivatives: bool
) -> tuple[str, str | None]:
    """The name, and where that backend cannot run the reason."""
    if backend is not None:
        if _reason(backend, device) is not None:
            _reason.cache_clear()  # it may be another one by now, or none
        reason = _reason(backend, device)
        return backend, reason and f"backend {backend!r} cannot run here: {reason}"
    families = [Family(band, codes, backward) for backward in {False, derivatives}]
    for name in preferred(device, band):
        if _reason(name, device) is None and (
            name in TRUSTED or all(proof.proven(name, family, device) for family in families)
        ):
            return name, None
    return "", f"no backend supports {device}: {_reason('eager', device)}"


# torch.compile calls this while it traces, outside of the graph: it cannot trace the extension.
# It is torch.compiler.assume_constant_result without its import of the compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _reason(name: str, device: torch.device | None) -> str | None:
    """Why a backend cannot run. To find out takes longer than a small call: it is looked at again
    only before someone is told.
    """
    try:
        return BACKENDS[name].unsupported_reason(device)
    except Exception as error:  # of a driver or of what is half installed: others can run
        return f"{type(error).__name__}: {error}"


class Report(dict[str, str]):
    """What `report` returns; prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {state}" for name, state in self.items())


def report(check: bool = False) -> Report:
    """Each backend's name with "available" (and what of forward mode it leaves to another) or the
    reason why it is not; what the extension was built with under "extension"; and on a machine with
    a GPU what families of kernels have proven themselves on the current one, by "backend, family".

    check: prove all of them first, whatever is known.
    """
    _reason.cache_clear()
    states = {name: _state(name) for name in BACKENDS} | {"extension": _native.description()}
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    for name, family in product(BACKENDS, FAMILIES):
        shown = name in preferred(device, family.band) and name not in TRUSTED
        if shown and _reason(name, device) is None:
            find = proof.prove if check else proof.recall
            states[f"{name}, {family}"] = str(find(name, family, device) or UNKNOWN)
    return Report(states)


def _state(name: str) -> str:
    reason, module = _reason(name, None), BACKENDS[name]
    if reason is not None or module is eager:
        return reason or "available"
    return f"available (forward mode{' in x0' if hasattr(module, 'jvp') else ''} by eager)"
