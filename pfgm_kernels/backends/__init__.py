# SPDX-License-Identifier: Apache-2.0
"""The table of backends."""

from __future__ import annotations

from types import ModuleType

from pfgm_kernels.backends import cpu, cuda, eager, triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "triton": triton, "cuda": cuda}
