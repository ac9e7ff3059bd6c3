# SPDX-License-Identifier: Apache-2.0
"""Do processes share out the kernels that they compile?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks.gpu import fill


def test_processes_share_the_kernels_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, Any]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert warmup
        compiled.append((self.name, *map(fill.kind_of, args), *options))
        if self.name == "two":
            raise RuntimeError("it does not compile")

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name, self.fn = name, SimpleNamespace(__name__=name)

    def use(use: object) -> None:
        launch = JITFunction.run
        for name in ("one", "two", "three"):
            for count in (100, 101, 1, 112, 1 << 40):  # 100 and 101 are compiled alike
                launch(Kernel(name), torch.empty(3), count, grid=(count,), warmup=False, BLOCK=16)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(fill.aot, "run", use)
    shares = []
    for number in range(4):
        before = len(compiled)
        with pytest.raises(RuntimeError, match="does not compile"):
            fill.compile_share([None, None], number, 4)  # type: ignore[list-item]
        shares.append(len(compiled) - before)
    assert sorted(shares) == [3, 3, 3, 3]
    assert len(set(map(str, compiled))) == len(compiled) == 3 * 4
