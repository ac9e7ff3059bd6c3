# SPDX-License-Identifier: Apache-2.0
"""`python -m pfgm_kernels.cli`."""

from __future__ import annotations

from pfgm_kernels.cli import main

main()
