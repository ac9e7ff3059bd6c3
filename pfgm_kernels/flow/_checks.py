# SPDX-License-Identifier: Apache-2.0
"""Checks of scalar and tensor arguments, shared by the modules of the flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def positive(name: str, value: object, *, finite: bool = True) -> float:
    """`value` as a float > 0 (infinity only where `finite` is false)."""
    number = _real(name, value)
    if not number > 0 or (finite and math.isinf(number)):
        wanted = "a finite number > 0" if finite else "a number > 0"
        raise ValueError(f"{name} expects {wanted}, got {value}")
    return number


def non_negative(name: str, value: object) -> float:
    """`value` as a finite float ≥ 0."""
    number = _real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} expects a finite number ≥ 0, got {value}")
    return number


def at_least_one(name: str, value: object) -> int:
    """`value` as an int ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} expects an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} expects an integer ≥ 1, got {value}")
    return value


def batch(name: str, value: object) -> Tensor:
    """`value` as a float32 or float64 tensor (B, *event) with B and d ≥ 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} expects a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} expects a float32 or float64 tensor, got {value.dtype}")
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(
            f"{name} expects shape (B, *event) with B and the event not empty, "
            f"got {tuple(value.shape)}"
        )
    return value


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} expects a real number, got {type(value).__name__}")
    return float(value)
