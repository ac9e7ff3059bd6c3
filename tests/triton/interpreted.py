# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as the tests use it: faster, and it remembers which kernels ran."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pfgm_kernels.backends import triton as backend

LAUNCHED: set[str] = set()


def install() -> None:
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()
    launch = interpreter.GridExecutor.__call__

    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It patches triton.language at each call of a function within a kernel, which takes longer
        # than the function. Once for each function does.
        if self.fn not in patched:
            patched.add(self.fn)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    def call_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
        LAUNCHED.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        launch(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_function
    interpreter.GridExecutor.__call__ = call_kernel


def kernels_that_did_not_run() -> list[str]:
    """Of the backend, with their module."""
    kernels = {
        f"{source.stem}.{name}"
        for source in Path(backend.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)
    }
    return sorted(kernels - LAUNCHED)
