# SPDX-License-Identifier: Apache-2.0
"""What do the Triton kernels become on each chip? No GPU is needed.

python tests/triton/aot.py compiles them all and prints a table. The backend itself is called,
with tensors that hold no data: what is compiled is what it launches, with the block sizes that it
takes there.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

MAX_SPILL = 32  # bytes a thread


@dataclass(frozen=True)
class Chip:
    capability: int
    multiprocessors: int
    shared: int
    """bytes of shared memory that a block can have"""
    product: str
    """what PTX calls a product of bfloat16 matrices, a regular expression"""


CHIPS = {
    "sm_80": Chip(80, 108, 166_912, r"mma\.sync.*bf16"),
    "sm_90": Chip(90, 132, 232_448, r"wgmma.*bf16"),
    "sm_100": Chip(100, 148, 232_448, r"tcgen05\.mma.*f16"),
    "sm_120": Chip(120, 170, 101_376, r"mma\.sync.*bf16"),
}


@dataclass(frozen=True)
class Use:
    """One call of the backend, forward and backward."""

    d: int
    dtype: torch.dtype = torch.float32
    gaussian: bool = False
    values_grad: bool = False
    B: int = 512
    N: int = 50_000


USES = {
    "float32": Use(3072, values_grad=True),
    "8-bit": Use(3072, torch.uint8),
    "Gaussian": Use(3072, gaussian=True),
    "8-bit Gaussian": Use(3072, torch.uint8, gaussian=True),
    "odd sizes": Use(333, B=33, N=777, values_grad=True),
    "float64": Use(64, torch.float64, values_grad=True),
    "d = 2, 8-bit": Use(2, torch.uint8),
    "d = 16": Use(16),
    "d = 16, Gaussian": Use(16, gaussian=True),
    "d = 32": Use(32),
    "d = 64": Use(64),
    "d = 100, 8-bit": Use(100, torch.uint8),
    "d = 256": Use(256),
    "d = 256, Gaussian": Use(256, gaussian=True),
}
# Together these launch every kernel.
REPRESENTATIVES = ("float32", "d = 16", "d = 64")


@dataclass(frozen=True)
class Compiled:
    kernel: str
    use: str
    chip: str
    registers: int
    spill: int
    shared: int
    dots: int
    """matrix products in the source"""
    instructions: dict[str, int]
    """of tensor cores, and how many of each"""
    narrow: int
    """loads of a single bfloat16"""

    @property
    def problems(self) -> list[str]:
        """A sentence for each limit that is exceeded."""
        name = f"{self.kernel} ({self.use}) on {self.chip}"
        chip, found = CHIPS[self.chip], []
        if self.spill > MAX_SPILL:
            found.append(f"{name} spills {self.spill} bytes a thread, the limit is {MAX_SPILL}")
        if self.shared > chip.shared:
            found.append(f"{name} takes {self.shared} bytes of shared memory of {chip.shared}")
        products = [i for i in self.instructions if re.search(chip.product, i)]
        if bool(self.dots) != bool(self.instructions) or len(products) < len(self.instructions):
            has = ", ".join(self.instructions) or "no tensor core instruction"
            wanted = f"{chip.product} for {self.dots} products" if self.dots else "none"
            found.append(f"{name} has {has}, expected {wanted}")
        if self.dots and self.narrow:
            found.append(f"{name} has {self.narrow} loads of a single bfloat16, expected none")
        return found


@dataclass(frozen=True)
class Failed:
    kernel: str
    use: str
    chip: str
    reason: str

    @property
    def problems(self) -> list[str]:
        return [f"{self.kernel} ({self.use}) does not compile for {self.chip}: {self.reason}"]


def run(use: Use) -> None:
    """Calls the backend with tensors that hold nothing."""
    from pfgm_kernels.backends import triton as backend
    from pfgm_kernels.outputs import Output
    from pfgm_kernels.rows import Rows, Stored

    meta = functools.partial(torch.empty, device="meta")
    query = torch.float64 if use.dtype == torch.float64 else torch.float32
    x, t = meta(use.B, use.d, dtype=query), meta(use.B, dtype=torch.float64)
    values, table = meta(use.N, use.d, dtype=use.dtype), meta(256)
    k = math.inf if use.gaussian else use.d + 1.0
    operands = backend.prepare(values, table, 1 << 30)
    v, _, anchor, log_weight = backend.forward(x, t, values, table, operands, k)
    output, stored = Output("field", 0.0, 1.0), Stored(values, table, anchor)
    result, residual = meta(use.B, use.d + 1, dtype=query), meta(use.B, use.d, dtype=query)
    backend.finish(output, v, x, t, result, residual, stored)
    rows = Rows(x, t, residual, stored, log_weight, k)
    for values_grad in {False, use.values_grad}:
        cotangents = backend.begin(rows, output, result, log_weight)
        backend.backward(rows, values, table, operands, cotangents, values_grad)


@contextlib.contextmanager
def pretend(chip: Chip, once: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """A GPU on which launches compile and do no more; of each kernel only the first, for `once`.
    Yields the list of names and of what they compiled, or why they did not.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from pfgm_kernels.backends.triton import configurations

    found: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        if once and name in dict(found):
            return
        try:
            found.append((name, launch(self, *args, warmup=True, **options)))
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            found.append((name, cause))

    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", chip.capability, 32),
        get_current_device=lambda: chip.capability,  # what was compiled is kept by device
        get_current_stream=lambda device: 0,
    )
    properties = SimpleNamespace(
        major=chip.capability // 10,
        minor=chip.capability % 10,
        shared_memory_per_block_optin=chip.shared,
        multi_processor_count=chip.multiprocessors,
    )
    caches = [f for f in vars(configurations).values() if hasattr(f, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    driver.set_active(fake)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield found


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory, which is where registers spill to, of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert usage is not None, text
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def inspect(name: str, use: str, chip: str, kernel: Any) -> Compiled | Failed:
    if isinstance(kernel, BaseException):
        return Failed(name, use, chip, f"{type(kernel).__name__}: {kernel}".splitlines()[-1])
    ptx = kernel.asm["ptx"]
    found = re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[.\w:]*", ptx)
    registers, spill = resources(kernel.asm["cubin"])
    return Compiled(
        kernel=name,
        use=use,
        chip=chip,
        registers=registers,
        spill=spill,
        shared=kernel.metadata.shared,
        dots=kernel.asm["ttir"].count("tt.dot "),
        instructions=dict(Counter(found)),
        narrow=ptx.count("ld.global.b16"),
    )


def compile_chip(chip: str, uses: tuple[str, ...], once: bool) -> list[Compiled | Failed]:
    """What differs among the kernels that the uses launch."""
    out: dict[str, Compiled | Failed] = {}
    with pretend(CHIPS[chip], once) as launches:
        for use in uses:
            known = len(launches)
            try:
                run(USES[use])
            except Exception as error:
                launches.append(("what launches it", error))
            for name, kernel in launches[known:]:
                key = getattr(kernel, "hash", f"{name} {kernel}")
                if key not in out:
                    out[key] = inspect(name, use, chip, kernel)
    return list(out.values())


def compile_all(
    uses: tuple[str, ...], cache: str, chips: Iterable[str] = CHIPS, once: bool = False
) -> list[Compiled | Failed]:
    """The kernels of the uses on the chips, in processes that do not interpret."""
    # Which way Triton goes is settled when it is imported.
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    job = functools.partial(compile_chip, uses=uses, once=once)
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(os.cpu_count(), context) as pool,
    ):
        return [found for part in pool.map(job, chips) for found in part]


def table(found: list[Compiled | Failed]) -> str:
    lines = [
        "| kernel | use | chip | registers | spilled bytes | shared memory | tensor cores |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in sorted(found, key=lambda c: (c.kernel, c.use, CHIPS[c.chip].capability)):
        cells = [c.kernel, c.use, c.chip, *["—"] * 4]
        if isinstance(c, Compiled):
            products = ", ".join(f"{i} ×{n}" for i, n in c.instructions.items())
            cells[3:] = map(str, [c.registers, c.spill, c.shared, products])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:
        found = compile_all(tuple(USES), cache)
    print(table(found))
    problems = [problem for c in found for problem in c.problems]
    print(*problems, sep="\n", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
