# SPDX-License-Identifier: Apache-2.0
"""Where a rank that holds references is lost, do all others end with its name, and soon?"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import seeded
from groups import join
from lives import ends, fork, said
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement, poisson_field
from pfgm_kernels.on_disk import OnDisk
from pfgm_kernels.roll_call import WORD, read_word, word_of
from pfgm_kernels.shards import Sharded

KILLS = int(os.environ.get("PFGM_KILLS") or "5")
"""Of how many one is at a random moment of a loop."""
WORLD, VICTIM = 3, 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose(how: str, folder: Path, x: Tensor, references: ReferenceSet) -> None:
    """What happens to one rank before it comes to the next call, or in it."""
    if how == "between":
        die()
    elif how == "silent":
        time.sleep(60)
    elif how == "finished":
        os._exit(0)
    elif how == "argument":
        with pytest.raises(ValueError, match="x expects shape"):
            poisson_field(x[:, 1:], 1.0, references)
    elif how == "file":
        np.save(folder / f"{VICTIM}.npy", np.ones(3))
    else:
        owner, name = {
            "middle": (Sharded, "join"),
            "backward": (Sharded, "sum"),
            "stopped": (Sharded, "rows"),
            "interrupted": (OnDisk, "read"),
            "broken disk": (os, "preadv"),
        }[how]
        method, ends = getattr(owner, name), {"stopped": signal.SIGSTOP}.get(how, signal.SIGKILL)

        def instead(*args):
            if how == "interrupted":
                raise KeyboardInterrupt("by hand")
            if how == "broken disk":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.kill(os.getpid(), ends)
            return method(*args)

        setattr(owner, name, instead)


def lost(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    join(60)
    rank, group = dist.get_rank(), dist.group.WORLD
    np.save(folder / f"{rank}.npy", torch.randn(20, 8, generator=seeded(rank)).numpy())
    if how == "missing" and rank == VICTIM:
        (folder / f"{rank}.npy").unlink()
    try:
        references = ReferenceSet.from_files(folder / f"{rank}.npy", group=group)
    except ConnectionError as error:
        (folder / f"{rank}.told").write_text(str(error))
        return
    except FileNotFoundError:
        return
    if how in ("silent", "stopped"):
        references.values.roll._timeout = timedelta(seconds=1)
    x = torch.randn(6, 8, generator=seeded()).requires_grad_()
    field = poisson_field(x, 1.0, references)
    if rank == VICTIM:
        lose(how, folder, x, references)
    try:
        if how == "backward":
            field.sum().backward()
        else:
            poisson_field(x, 1.0, references)
    except ConnectionError as error:
        (folder / f"{rank}.told").write_text(str(error))
        with pytest.raises(ConnectionError, match="rank 1, which holds references"):
            poisson_field(x, 1.0, references)
        with pytest.raises(ConnectionError, match="rank 1, which holds references"):
            ReferenceSet(x.detach(), group=group)
        return
    except (ValueError, OSError, KeyboardInterrupt):
        assert how in FAILS
        assert rank == VICTIM


HOW = {
    "middle": "is lost: killed",
    "file": r"failed: ValueError: .*1\.npy was changed since it was opened",
    "argument": r"failed: ValueError: x expects shape \(B, \*event\)",
}
MORE = {
    "silent": "is silent: .* the timeout of the group, 1 s",
    "backward": "is lost: killed",
    "between": "is lost: killed",
    "stopped": "is silent: .* the timeout of the group, 1 s",
    "finished": "is lost: killed, or ended",
    "interrupted": "failed: KeyboardInterrupt: by hand",
    "broken disk": r"failed: OSError: \[Errno 5\] Input/output error: .*1\.npy",
    "missing": r"failed: FileNotFoundError: expected the file .*1\.npy; it does not exist",
}
FAILS = ("file", "argument", "interrupted", "broken disk", "missing")
"""What the rank is told itself, and goes on with."""


@pytest.mark.parametrize("there", [0, 1, 3, 30, WORD - 4, WORD - 1])
def test_a_word_that_still_arrives_is_not_read(there):
    word = word_of(12, "rank 1 failed: größer")
    assert read_word(word) == (12, "rank 1 failed: größer")
    begun, first_last = word.clone(), word.clone()
    begun[there:] = 0
    first_last[: WORD - there] = 0
    assert read_word(begun) is None
    assert read_word(first_last) is None


def test_a_long_word_is_cut():
    call, sentence = read_word(word_of(12, "é" * WORD))
    assert call == 12
    assert sentence == "é" * len(sentence)
    assert len(sentence) > WORD // 3


@pytest.mark.parametrize(
    "how", [*HOW, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE)]
)
def test_the_others_are_told_who(tmp_path, how):
    processes = fork(tmp_path / "ranks", lost, [(tmp_path, how)] * WORLD)
    for rank in {*range(WORLD)} - {VICTIM}:
        processes[rank].join(60)
        assert processes[rank].exitcode == 0, said(tmp_path / "ranks", rank)
        told = (tmp_path / f"{rank}.told").read_text()
        assert "\n" not in told
        assert told.startswith("rank 1, which holds references, ")
        assert re.search((HOW | MORE)[how], told), told
    if how in ("silent", "stopped"):
        processes[VICTIM].kill()
    lives = how == "finished" or how in FAILS
    assert ends(processes)[VICTIM] == (0 if lives else -signal.SIGKILL)


def in_a_loop(folder: Path, victim: int, delay: float) -> None:
    """Calls and gradients for ever, each right; one rank is killed in the midst of them."""
    torch.set_num_threads(1)
    join(60)
    rank = dist.get_rank()
    x0 = torch.randn(300, 20, generator=seeded())
    problems = [torch.randn(16, 20, generator=seeded(1 + i)) for i in range(4)]
    expected = [results(x, x0) for x in problems]
    references = ReferenceSet(x0.tensor_split(WORLD)[rank], group=dist.group.WORLD)
    dist.barrier()
    if rank == victim:
        threading.Timer(delay, die).start()
    try:
        for i in range(1 << 30):
            for found, wanted in zip(
                results(problems[i % 4], references), expected[i % 4], strict=True
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    except ConnectionError as error:
        (folder / f"{rank}.told").write_text(str(error))


def results(x: Tensor, x0: Tensor | ReferenceSet) -> list[Tensor]:
    xs = x.clone().requires_grad_()
    v, log_mass = poisson_displacement(xs, 1.5, x0)
    dx = torch.autograd.grad([v.square().sum(), log_mass.sum()], xs)[0]
    return [v.detach(), log_mass.detach(), dx]


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(KILLS))
def test_random_kills(tmp_path, seed):
    """PFGM_KILLS says how many."""
    victim, delay = seed % WORLD, random.Random(seed).uniform(0.0, 1.0)
    codes = ends(fork(tmp_path / "ranks", in_a_loop, [(tmp_path, victim, delay)] * WORLD))
    texts = [said(tmp_path / "ranks", rank) for rank in range(WORLD)]
    survivors = {*range(WORLD)} - {victim}
    assert [code == 0 for code in codes] == [rank != victim for rank in range(WORLD)], texts
    assert codes[victim] == -signal.SIGKILL
    for rank in survivors:
        told = (tmp_path / f"{rank}.told").read_text()
        assert told == (
            f"rank {victim}, which holds references, is lost: killed, or ended with an error told "
            "there"
        )
        assert texts[rank] == ""
    left = {f"ranks.{rank}" for rank in range(WORLD)} | {f"{rank}.told" for rank in survivors}
    assert {path.name for path in tmp_path.iterdir()} == left
