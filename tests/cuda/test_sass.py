# SPDX-License-Identifier: Apache-2.0
"""What did nvcc make of the CUDA kernels, on each chip that the extension was built for?"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from pfgm_kernels.backends import _native

if _native.build_info.get("CUDA", "none") == "none":
    pytest.skip("the extension was built without CUDA", allow_module_level=True)

*OTHERS, LATEST = _native.build_info["architectures"].split(";")
ARCHITECTURES = [*(pytest.param(other, marks=pytest.mark.exhaustive) for other in OTHERS), LATEST]
REGISTERS = 65_536  # of a multiprocessor
NARROW = ("direct_", "nearest", "anchor", "crowd")  # kernels of 128 threads; the others: 256
PRODUCTS = {"compare_kernel", "sum_kernel"}


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """CUDA's, or the one that comes with Triton."""
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(home))
    if found is None and importlib.util.find_spec("triton") is not None:
        from triton import knobs

        found = knobs.nvidia.cuobjdump.path
    if found is None:
        pytest.skip("there is no cuobjdump")
    return found


def dump(cuobjdump: str, *options: str) -> str:
    command = [cuobjdump, *options, _native._C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plain_name(symbol: str) -> str:
    """direct_sum_kernel of _ZN4pfgm…17direct_sum_kernelILi2ELb0EE…"""
    return re.findall(r"\d+((?:[a-z]+_)+kernel)", symbol)[-1].lstrip("_")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits_into_the_registers(cuobjdump, architecture):
    text = dump(cuobjdump, "--dump-resource-usage", "-arch", f"sm_{architecture}")
    usage = re.findall(r"Function (\S*pfgm\S*):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert {plain_name(symbol) for symbol, *_ in usage} >= PRODUCTS | {
        "direct_sum_kernel",
        "exact_kernel",
        "route_kernel",
        "split_kernel",
    }
    for symbol, registers, stack, local in usage:
        threads = 128 if plain_name(symbol).startswith(NARROW) else 256
        assert (int(stack), int(local)) == (0, 0), f"{symbol} spills"
        assert int(registers) * threads <= REGISTERS, symbol


def inner_loop(code: dict[int, str]) -> list[str]:
    """Of instructions by address: the smallest loop with a reciprocal root in float."""
    root = min(at for at, text in code.items() if re.match(r"MUFU\.RSQ\b(?!64)", text))
    loops = []
    for at, text in code.items():
        branch = re.match(r"BRA.* 0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) <= root <= at:
            loops.append((int(branch[1], 16), at))
    first, last = min(loops, key=lambda loop: loop[1] - loop[0])
    return [text for at, text in code.items() if first <= at <= last]


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_are_of_tensor_cores_and_few_dimensions_of_floats(cuobjdump, architecture):
    functions = re.split(
        r"\n\s*Function : ", dump(cuobjdump, "-sass", "-arch", f"sm_{architecture}")
    )
    tensor_cores, direct = set(), 0
    for function in functions[1:]:
        symbol = function.split("\n", 1)[0]
        if "pfgm" not in symbol:
            continue
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", function)
        code = {int(address, 16): text for address, text in found}
        if any(text.startswith("HMMA.16816.F32.BF16 ") for text in code.values()):
            tensor_cores.add(plain_name(symbol))
        if plain_name(symbol) == "direct_sum_kernel":
            direct += 1
            kinds = Counter(re.split(r"[ .]", text)[0] for text in inner_loop(code))
            assert not [kind for kind in kinds if kind in ("DFMA", "DADD", "DMUL", "LDL", "STL")]
            floats = sum(kinds[kind] for kind in ("FFMA", "FADD", "FMUL", "MUFU"))
            assert floats > 0.6 * kinds.total(), kinds
    assert tensor_cores == PRODUCTS
    assert direct == 2 * 6
