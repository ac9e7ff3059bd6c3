# SPDX-License-Identifier: Apache-2.0
"""What do the Triton kernels become on each chip, by the oldest Triton that is supported and by the
one that is installed? No GPU is needed.

python tests/triton/aot.py compiles them all and prints a table. The op itself is called, with
tensors that hold no data: what is compiled is what it launches, with the block sizes that it takes
there. The oldest Triton is where `make build/triton-3.6` puts it, beside the environment.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch

from pfgm_kernels.backends.triton import numbers
from pfgm_kernels.chunks import Inputs, default_workspace
from pfgm_kernels.loops import Saved, field_backward, field_forward
from pfgm_kernels.outputs import Output

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_SPILL = 32  # bytes a thread
MAX_WARPS = 4  # of a kernel with a Hopper's products, before Triton 3.9: see configurations.py
OLDEST = Path(__file__).parents[2] / "build" / "triton-3.6"


@dataclass(frozen=True)
class Chip:
    capability: int
    multiprocessors: int
    shared: int
    """bytes of shared memory that a block can have"""
    product: str
    """what PTX calls products of matrices of bfloat16 or 8-bit integers, a regular expression"""


CHIPS = {
    "sm_80": Chip(80, 108, 166_912, r"mma\.sync.*(bf16|s8\.s8)"),
    "sm_90": Chip(90, 132, 232_448, r"wgmma.*(bf16|s8\.s8)"),
    "sm_100": Chip(100, 148, 232_448, r"tcgen05\.mma.*(f16|i8)|mma\.sync.*(bf16|s8\.s8)"),
    "sm_120": Chip(120, 170, 101_376, r"mma\.sync.*(bf16|s8\.s8)"),
}


@dataclass(frozen=True)
class Use:
    """One call of the op, forward and backward."""

    d: int
    dtype: torch.dtype = torch.float32
    gaussian: bool = False
    values_grad: bool = False
    output: str = "displacement"
    B: int = 512
    N: int = 50_000
    by_class: bool = False


USES = {
    "float32": Use(3072, values_grad=True, output="field"),
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
    "d = 100, 8-bit": Use(100, torch.uint8, output="mean"),
    "d = 128": Use(128),
    "d = 256": Use(256),
    "d = 256, Gaussian": Use(256, gaussian=True),
    "by class": Use(3072, by_class=True),
    "by class, 8-bit": Use(20, torch.uint8, by_class=True),
    "a tail": Use(3072, B=96, N=848),
    "a tail, 8-bit": Use(3072, torch.uint8, B=96, N=848),
}
# Sizes of 1 are constants in a kernel.
USES |= {
    f"{name}, d = {d}": Use(d, B=B, N=N, values_grad=True)
    for name, B, N in (("one query", 1, 848), ("one reference", 33, 1), ("one of each", 1, 1))
    for d in (16, 64, 333)
}
# Together these launch every kernel.
REPRESENTATIVES = ("float32", "d = 16", "d = 64", "by class")
ONES = ("one of each, d = 16", "one of each, d = 64", "one of each, d = 333")


@dataclass(frozen=True)
class Compiled:
    kernel: str
    use: str
    chip: str
    triton: str
    """its version"""
    warps: int
    registers: int
    spill: int
    shared: int
    dots: int
    """matrix products in the source"""
    instructions: dict[str, int]
    """of tensor cores, and how many of each"""
    narrow: int
    """loads of a single bfloat16"""
    carried: int
    """products that are added to a sum of an earlier iteration"""

    @property
    def problems(self) -> list[str]:
        """A sentence for each limit that is exceeded."""
        name = f"{self.kernel} ({self.use}) on {self.chip} by Triton {self.triton}"
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
        races = self.warps > MAX_WARPS and numbers(self.triton) < (3, 9)
        if races and any("wgmma" in i for i in self.instructions):
            found.append(f"{name} has {self.warps} warps, the limit is {MAX_WARPS}")
        if self.carried:
            found.append(f"{name} has {self.carried} sums of products that do not begin at zero")
        if self.dots and self.narrow:
            found.append(f"{name} has {self.narrow} loads of a single bfloat16, expected none")
        return found


@dataclass(frozen=True)
class Failed:
    kernel: str
    use: str
    chip: str
    triton: str
    reason: str

    @property
    def problems(self) -> list[str]:
        chip = f"{self.chip} by Triton {self.triton}"
        return [f"{self.kernel} ({self.use}) does not compile for {chip}: {self.reason}"]


def run(use: Use) -> None:
    """The op, forward and backward, on tensors that hold nothing."""
    from pfgm_kernels.backends import triton as backend

    meta = functools.partial(torch.empty, device="meta")
    query = torch.float64 if use.dtype == torch.float64 else torch.float32
    x, t = meta(use.B, use.d, dtype=query), meta(use.B)
    values = meta(use.N, use.d, dtype=use.dtype)
    table = meta(256 if use.dtype == torch.uint8 else 0)
    k = math.inf if use.gaussian else use.d + 1.0
    operands = backend.prepare(values, table, values.nbytes)
    ranges = meta(use.B, 2, dtype=torch.int64) if use.by_class else None
    inputs = Inputs(x, t, values, table, operands, k, ranges)
    output = Output(use.output, 5.0, 1.0)
    workspace = default_workspace(torch.device("cuda"))
    result, log_mass, *saved = field_forward(inputs, output, True, workspace, "triton")
    for values_grad in {False, use.values_grad}:
        field_backward(
            inputs, output, Saved(*saved), result, log_mass, values_grad, workspace, "triton"
        )


class Launch(NamedTuple):
    kernel: str
    integers: dict[str, int]
    """its arguments that are"""
    grid: tuple[int, ...]
    result: Any
    """what it compiled, or why it did not"""


@contextlib.contextmanager
def pretend(chip: Chip, once: bool = False) -> Iterator[list[Launch]]:
    """A GPU on which launches compile and do no more; of each kernel only the first, for `once`.
    Yields the list of launches.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from pfgm_kernels.backends.triton import configurations

    found: list[Launch] = []
    launch = JITFunction.run

    def compile_only(
        self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        if once and any(name == each.kernel for each in found):
            return
        given = dict(zip((p.name for p in self.params), args, strict=False)) | options
        integers = {name: value for name, value in given.items() if isinstance(value, int)}
        try:
            result = launch(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            result = error
            while result.__cause__ is not None:
                result = result.__cause__
        found.append(Launch(name, integers, grid, result))

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


def carried_products(ttir: str, chip: str) -> int:
    """How many products are added to what a loop hands from one iteration to the next. Sums of
    integers are exact; a Blackwell's are wrong where others follow (configurations.py).
    """
    handed = set(re.findall(r"(%\w+) = ", " ".join(re.findall(r"iter_args\((.*?)\)", ttir))))
    found = re.findall(r"(%\w+) = tt\.dot %\w+, %\w+, (%\w+)(.*)", ttir)
    followed = {accumulator for _, accumulator, _ in found}
    return sum(
        accumulator in handed and ("xi32>" not in rest or (chip == "sm_100" and result in followed))
        for result, accumulator, rest in found
    )


def inspect(name: str, use: str, chip: str, kernel: Any) -> Compiled | Failed:
    import triton

    if isinstance(kernel, BaseException):
        reason = f"{type(kernel).__name__}: {kernel}".splitlines()[-1]
        return Failed(name, use, chip, triton.__version__, reason)
    ptx, ttir = kernel.asm["ptx"], kernel.asm["ttir"]
    found = re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[.\w:]*", ptx)
    registers, spill = resources(kernel.asm["cubin"])
    return Compiled(
        kernel=name,
        use=use,
        chip=chip,
        triton=triton.__version__,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spill=spill,
        shared=kernel.metadata.shared,
        dots=ttir.count("tt.dot "),
        instructions=dict(Counter(found)),
        narrow=ptx.count("ld.global.b16"),
        carried=carried_products(ttir, chip),
    )


def compile_chip(
    chip: str, folder: Path | None, uses: tuple[str, ...], once: bool
) -> list[Compiled | Failed]:
    """What differs among the kernels that the uses launch."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    out: dict[str, Compiled | Failed] = {}
    with pretend(CHIPS[chip], once) as launches:
        for use in uses:
            known = len(launches)
            try:
                run(USES[use])
            except Exception as error:
                launches.append(Launch("what launches it", {}, (), error))
            for each in launches[known:]:
                key = getattr(each.result, "hash", f"{each.kernel} {each.result}")
                if key not in out:
                    out[key] = inspect(each.kernel, use, chip, each.result)
    return list(out.values())


def in_processes(job: Callable[[Item], Result], items: Iterable[Item], cache: str) -> list[Result]:
    """job(item) of each, in processes that do not interpret, whose Triton keeps what it compiles in
    the folder `cache`: which way it goes is settled when it is imported.
    """
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(os.cpu_count(), context) as pool,
    ):
        return list(pool.map(job, items))


def compile_all(
    uses: tuple[str, ...],
    cache: str,
    chips: Iterable[str] = CHIPS,
    folder: Path | None = None,
    once: bool = False,
) -> list[Compiled | Failed]:
    """The kernels of the uses on the chips, by the Triton that is installed or by the one in a
    folder.
    """
    job = functools.partial(compile_chip, folder=folder, uses=uses, once=once)
    return [found for part in in_processes(job, chips, cache) for found in part]


def table(found: list[Compiled | Failed]) -> str:
    lines = [
        "| kernel | use | chip | Triton | registers | spilled bytes | shared memory "
        "| tensor cores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(found, key=lambda c: (c.kernel, c.use, CHIPS[c.chip].capability, c.triton))
    for c in order:
        cells = [c.kernel, c.use, c.chip, c.triton, *["—"] * 4]
        if isinstance(c, Compiled):
            products = ", ".join(f"{i} ×{n}" for i, n in c.instructions.items())
            cells[4:] = map(str, [c.registers, c.spill, c.shared, products])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    folders = [None, OLDEST] if OLDEST.exists() else [None]
    if OLDEST not in folders:
        print(f"without {OLDEST}, see the Makefile: the installed Triton alone", file=sys.stderr)
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for folder in folders:
            found += compile_all(tuple(USES), cache, folder=folder)
    print(table(found))
    problems = [problem for c in found for problem in c.problems]
    print(*problems, sep="\n", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
