# SPDX-License-Identifier: Apache-2.0
"""Do several processes train as one does, stop together, and go on together?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pfgm_kernels.training import checkpoint, data
from pfgm_kernels.training.checkpoint import Checkpoints
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.state import Training
from pfgm_kernels.training.trainer import load_model, train

TINY: dict[str, Any] = {"width": 8, "depth": 1, "batch_size": 32, "warmup": 4, "threads": 1}

# What each of two processes does, as torchrun starts them: gradients of two steps, accumulated and
# not; a run that the second is told to stop; the rest of it; a folder that is not the same.
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from rich.console import Console
from pfgm_kernels.training import data
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.ranks import joined
from pfgm_kernels.training.state import Training
from pfgm_kernels.training.trainer import train

out, options = Path(sys.argv[1]), {options}
moons = data.load("two_moons")
config = lambda **more: TrainConfig.for_data(moons, **(options | more))
with joined("cpu") as ranks:
    for accumulation in (1, 2):
        training = Training(config(accumulation=accumulation, clip_norm=1e9), moons, None, ranks)
        found = []
        for step in range(2):
            done = training.advance()
            found += [torch.tensor([done.loss])]
            found += [p.grad.flatten().clone() for p in training.network.parameters()]
        torch.save(torch.cat(found), out / f"{{ranks.rank}}-{{accumulation}}.pt")
    advance = Training.advance
    def stopped(training, stop):
        if training.step == 3 and ranks.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return advance(training, stop)
    Training.advance = stopped
    run = train(config(steps=9), moons, out / "run", console=Console(quiet=True))
    assert not run.finished and len(run.losses) == 4, run
    Training.advance = advance
    run = train(config(steps=9), moons, out / "run", resume=True, console=Console(quiet=True))
    assert run.finished and run.first_step == 4, run
    try:
        ranks.same(ranks.rank, torch.device("cpu"))
    except ValueError as error:
        assert "expected one step, got 0 to 1" in str(error)
    else:
        raise AssertionError
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER.format(options=TINY), str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_make_one_batch(out: Path, accumulation: int) -> None:
    """Two ranks of half the batch have the gradients of one process with all of it."""
    first, second = (torch.load(out / f"{rank}-{accumulation}.pt") for rank in (0, 1))
    moons, found = data.load("two_moons"), []
    options = TINY | {"accumulation": 2 * accumulation, "clip_norm": 1e9}
    training = Training(TrainConfig.for_data(moons, **options), moons)
    for _ in range(2):
        found += [torch.tensor([training.advance().loss])]
        found += [p.grad.flatten().clone() for p in training.network.parameters()]
    alone = torch.cat(found)
    assert torch.equal(first, second)
    assert (first - alone).norm() < 1e-6 * alone.norm()


def test_a_signal_to_one_stops_all_and_all_go_on(out: Path, tmp_path: Path) -> None:
    """To the end of one process with as many parts; what ranks draw is of the parts alone."""
    names = [path.name for path in Checkpoints(out / "run" / "checkpoints").paths()]
    assert names == ["step_00000009.safetensors", "step_00000004.safetensors"]
    moons = data.load("two_moons")
    config = TrainConfig.for_data(moons, steps=9, accumulation=2, **TINY)
    train(config, moons, tmp_path, console=Console(quiet=True))
    load_model(out / "run")
    alone, _ = checkpoint.read(tmp_path / "model.safetensors")
    together, _ = checkpoint.read(out / "run" / "model.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)
    assert not list((out / "run").rglob("*.partial"))
