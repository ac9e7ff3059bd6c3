# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, shared by all public functions.

Each returns the argument in the form that is computed with, or raises a TypeError or ValueError
that says in one sentence what was expected and what came.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = tuple(
    getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
)
REAL = FLOATING + INTEGER


def number(name: str, value: object) -> float:
    """`value` as a float: a real number of Python, NumPy or any other kind (`numbers.Real`), or a
    0-dim array or tensor of one. Infinite ones pass, NaN does not.
    """
    if isinstance(value, Tensor | np.ndarray):
        value = _item(name, value, "a real number")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} expects a real number, got {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(f"{name} expects a number that a float can hold, got more") from None
    # Comparisons, not math.isnan: torch.compile traces numbers that change as symbols.
    if not holds(result == result):
        raise ValueError(f"{name} expects a real number, got NaN")
    return result


def finite(name: str, value: object) -> float:
    """`value` as a finite float."""
    result = number(name, value)
    if not holds(abs(result) < math.inf):
        raise ValueError(f"{name} expects a finite number, got {value}")
    return result


def positive(name: str, value: object, *, finite: bool = True) -> float:
    """`value` as a float > 0 (infinity only where `finite` is false)."""
    result = number(name, value)
    if not (holds(result > 0) and (not finite or holds(result < math.inf))):
        wanted = "a finite number > 0" if finite else "a number > 0"
        raise ValueError(f"{name} expects {wanted}, got {value}")
    return result


def non_negative(name: str, value: object) -> float:
    """`value` as a finite float ≥ 0."""
    result = number(name, value)
    if not (holds(result >= 0) and holds(result < math.inf)):
        raise ValueError(f"{name} expects a finite number ≥ 0, got {value}")
    return result


def holds(condition: bool) -> bool:
    """A condition on numbers; true where torch.compile cannot tell, of a number that its graph
    reads from an array or a tensor.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        return guard_or_true(condition)
    return condition


def integer(name: str, value: object, least: int = 1) -> int:
    """`value` as an int ≥ `least`: an integer of any kind, or a 0-dim array or tensor of one."""
    if isinstance(value, Tensor | np.ndarray):
        value = _item(name, value, "an integer")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} expects an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} expects an integer ≥ {least}, got {value}")
    return value if isinstance(value, int) else int(value)


def shape_of_event(value: object) -> tuple[int, ...]:
    """`value` as the shape of one event; a number stands for an event of one axis."""
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        value = [value]
    return tuple(integer("event_shape", size) for size in value)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], kind: str) -> Tensor:
    """`value` as a dense tensor of one of `dtypes` that holds data; `kind` says which these are."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} expects a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} expects {kind}, got {value.dtype}")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} expects a dense tensor, got a {layout} one")
    if value.device.type == "meta":
        raise ValueError(f"{name} expects a tensor that holds data, got one on the device meta")
    return value


def floating(name: str, value: object) -> Tensor:
    """`value` as a dense floating-point tensor of 16 to 64 bits."""
    return tensor(name, value, FLOATING, "a floating-point tensor of 16, 32 or 64 bits")


def batch(name: str, value: object) -> Tensor:
    """`value` as a float32 or float64 tensor (B, *event) with B and d ≥ 1."""
    value = tensor(name, value, FLOATING[2:], "a float32 or float64 tensor")
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(
            f"{name} expects shape (B, *event) with B and the event not empty, "
            f"got {tuple(value.shape)}"
        )
    return value


def blind(values: Tensor) -> bool:
    """Whether values cannot be looked at: within a compiled or captured call."""
    return torch.compiler.is_compiling() or (
        values.is_cuda and torch.cuda.is_current_stream_capturing()
    )


def _item(name: str, value: Tensor | np.ndarray, wanted: str) -> object:
    """The one number of a 0-dim array or tensor, read on the host."""
    if value.ndim > 0:
        raise TypeError(
            f"{name} expects {wanted}, got {type(value).__name__} of shape {tuple(value.shape)}"
        )
    if isinstance(value, Tensor):
        tensor(name, value, REAL, wanted)
        if value.requires_grad:
            raise ValueError(
                f"{name} is constant and expects {wanted}, got a tensor that requires grad"
            )
    return value.item()


def check_references(x0: Tensor) -> Tensor:
    """x0 (N, *event) itself, if it is a floating-point tensor with something in it."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 expects a tensor or a ReferenceSet, got {type(x0).__name__}")
    if x0.dtype in INTEGER:
        raise TypeError(
            f"x0 expects a floating-point tensor, got {x0.dtype}"
            " (8-bit images: ReferenceSet.from_images)"
        )
    floating("x0", x0)
    check_shape("x0", x0)
    return x0


def check_shape(name: str, x0: Tensor) -> None:
    if x0.dim() < 1 or x0.numel() == 0:
        raise ValueError(f"{name} expects shape (N, *event) with N ≥ 1, got {tuple(x0.shape)}")
