# SPDX-License-Identifier: Apache-2.0
"""Does the emulated GPU run right programs, and does it find the mistakes of wrong ones?

The programs are in emulation/programs.cu. A mistake is found where a run fails, or where the
result is not what it is without the mistake.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import emulated
import pytest
import torch
from torch import Tensor

THREADS, TILES = 128, 6
PROGRAMS = ("exchange", "pipeline", "warp", "bounds")

# Program, mistake, what the plain build says, what the build for races says. None: it may or may
# not find it; "": the result is wrong.
RACE = "race: thread"
ON_ITS_WAY = "has a copy on its way to"
MISTAKES = [
    ("exchange", "no_barrier", "", RACE),
    ("exchange", "no_trailing_barrier", "", RACE),
    ("pipeline", "no_barrier", "", RACE),
    ("pipeline", "no_wait", "", ON_ITS_WAY),
    ("pipeline", "late_wait", "", ON_ITS_WAY),
    ("pipeline", "no_commit", "", ON_ITS_WAY),
    ("pipeline", "early_fetch", "", "copies to it"),
    ("warp", "no_barrier", "", RACE),
    ("warp", "not_all_lanes", "deadlock: threads 0-6 wait", "deadlock"),
    ("warp", "other_mask", "deadlock: threads 0-15 wait", "deadlock"),
    ("warp", "barrier_in_branch", "deadlock: threads 0-15 wait at __syncthreads", "deadlock"),
    ("warp", "two_barriers", "divergence: threads 0-15 wait", "divergence"),
    ("bounds", "shared_overrun", "shared memory was written past its end, at byte 515", "past"),
    ("bounds", "two_blocks", "", "of another block wrote global memory"),
]


def load(kind: str) -> ModuleType:
    return emulated.build(kind, "programs", emulated.PROGRAMS)


@pytest.fixture(scope="module")
def tiles() -> Tensor:
    return torch.randn(TILES, THREADS, generator=torch.Generator().manual_seed(1))


def run(module: ModuleType, program: str, mistake: str, tiles: Tensor) -> Tensor:
    out = torch.full((2, THREADS), math.nan)
    wanted = getattr(module.Mistake, mistake)
    module.run_program(program, wanted, tiles.data_ptr(), out.data_ptr())
    return out


def expected(program: str, tiles: Tensor) -> Tensor:
    if program in ("exchange", "pipeline"):
        row = torch.zeros(THREADS)
        for tile in tiles:
            row += tile.roll(-45)
    elif program == "bounds":
        row = tiles[0] + 1
    else:
        # The sum over half a warp in the order of the shuffles, all lanes together.
        row = tiles[0].view(-1, 16)[:, torch.arange(16) ^ 1]
        for bits in (8, 4, 2, 1):
            row = row + row[:, torch.arange(16) ^ bits]
        row = row[:, :1].expand(-1, 16).flatten()
    return row.expand(2, -1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["plain", "races"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("order", "late"), emulated.SCHEDULES)
def test_right_programs(kind: str, program: str, order: str, late: int, tiles: Tensor) -> None:
    module = load(kind)
    for seed in range(5 if order == "greedy" else 1):
        module.set_schedule(order, seed, bool(late))
        assert torch.equal(run(module, program, "none", tiles), expected(program, tiles))


@pytest.mark.parametrize(("program", "mistake", "plain", "races"), MISTAKES)
@pytest.mark.parametrize("kind", ["plain", "races"])
def test_mistakes(
    kind: str, program: str, mistake: str, plain: str, races: str, tiles: Tensor
) -> None:
    """All are found with copies that come late; the greedy order is the one that need not be
    lucky.
    """
    module, message = load(kind), plain if kind == "plain" else races
    module.set_schedule("greedy", 0, late=True)
    if message == "":
        assert not torch.equal(run(module, program, mistake, tiles), expected(program, tiles))
    else:
        with pytest.raises(RuntimeError, match=f"ProgramArguments, block .*{message}"):
            run(module, program, mistake, tiles)


@pytest.mark.parametrize("mistake", ["no_wait", "late_wait", "no_commit"])
def test_copies_that_come_at_once_hide_a_missing_wait(mistake: str, tiles: Tensor) -> None:
    """Why the schedules deliver late as well. What races are is another matter."""
    module = load("plain")
    module.set_schedule("greedy", 0, late=False)
    assert torch.equal(run(module, "pipeline", mistake, tiles), expected("pipeline", tiles))
    module = load("races")
    module.set_schedule("greedy", 0, late=False)
    with pytest.raises(RuntimeError, match=ON_ITS_WAY):
        run(module, "pipeline", mistake, tiles)


def test_shared_memory_holds_no_numbers(tiles: Tensor) -> None:
    module = load("plain")
    module.set_schedule("forward")
    assert run(module, "bounds", "uninitialised", tiles).isnan().all()


def test_a_race_names_the_lines(tiles: Tensor) -> None:
    module = load("races")
    module.set_schedule("forward")
    lines = Path(emulated.PROGRAMS[0]).read_text().splitlines()
    with pytest.raises(RuntimeError) as error:
        run(module, "exchange", "no_barrier", tiles)
    read, write = (
        int(part.partition(")")[0]) for part in str(error.value).split("programs.cu:")[1:]
    )
    assert "sum += memory[other]" in lines[read - 1]
    assert "memory[self] = a.in" in lines[write - 1]


ADDRESS = """
import sys
sys.path.insert(0, sys.argv[1])
import emulated, torch
module = emulated.build("address", "programs", emulated.PROGRAMS)
module.set_schedule("forward")
tiles, out = torch.ones(6, 128), torch.empty(2, 128)
mistake = getattr(module.Mistake, sys.argv[3])
module.run_program(sys.argv[2], mistake, tiles.data_ptr(), out.data_ptr())
print("done")
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("program", "mistake", "found"),
    [
        *((program, "none", None) for program in PROGRAMS),
        ("bounds", "shared_overrun", "heap-buffer-overflow WRITE of size 4"),
        ("bounds", "global_overrun", "heap-buffer-overflow READ of size 4"),
        ("bounds", "workspace_overrun", "use-after-poison WRITE of size 4"),
    ],
)
def test_addresses(program: str, mistake: str, found: str | None) -> None:
    emulated.library("address", "programs", emulated.PROGRAMS)
    child = subprocess.run(
        [sys.executable, "-c", ADDRESS, str(emulated.EMULATION.parent), program, mistake],
        env=emulated.address_environment(),
        capture_output=True,
        text=True,
    )
    if found is None:
        assert child.stdout == "done\n", child.stderr
        assert "AddressSanitizer" not in child.stderr
    else:
        what, how = found.split(" ", 1)
        assert what in child.stderr
        assert how in child.stderr
        assert "bounds_kernel" in child.stderr
