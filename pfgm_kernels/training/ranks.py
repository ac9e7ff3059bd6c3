# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: what they share, and what each does alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pfgm_kernels.roll_call import is_lost

DEVICES = ("auto", "cpu", "cuda")
TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for one that is silent before they end with an error."""


class Ranks(NamedTuple):
    """This process among those of the run; by itself, as it is without `torchrun`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Among those of this machine: the number of its GPU."""

    def device(self, name: str) -> torch.device:
        """What ``auto``, ``cpu`` or ``cuda`` means here. Raises ValueError where it is missing."""
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda expects a GPU that torch sees, got none")
        if name == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model that averages its gradients over the ranks, with the weights of the first."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)

    def apart(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it gradients stay this rank's own, to be averaged later."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def agree(self, loss: float, stop: bool, device: torch.device) -> tuple[float, bool]:
        """The mean of the ranks' losses, and whether any is to stop."""
        if self.world == 1:
            return loss, stop
        both = torch.tensor([loss / self.world, float(stop)], dtype=torch.float64, device=device)
        dist.all_reduce(both)
        mean, stops = both.tolist()
        return mean, stops > 0

    def same(self, step: int, device: torch.device) -> None:
        """Waits for all ranks. Raises ValueError where they are at different steps."""
        if self.world == 1:
            return
        steps = torch.tensor([step, -step], dtype=torch.int64, device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        most, least = steps[0].item(), -steps[1].item()
        if most != least:
            raise ValueError(
                f"ranks read different checkpoints: expected one step, got {least} to {most}; "
                "the folder of the run must be the same for all"
            )

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, or that this process joined itself; else it is alone.

    Raises ConnectionError where another rank is lost: it was killed, ended with an error of its
    own, or was silent for `TIMEOUT`.
    """
    ours = not dist.is_initialized()
    if ours and not dist.is_torchelastic_launched():
        yield Ranks()
        return
    on_gpu = Ranks(local=_local()).device(device).type == "cuda"
    try:
        if ours:
            if on_gpu:
                torch.cuda.set_device(_local())
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        yield Ranks(dist.get_rank(), dist.get_world_size(), _local())
        if ours:
            dist.barrier()  # the first, which the others talk through, is not to leave before them
    except RuntimeError as error:
        if not is_lost(error):
            raise
        # gloo's say where in its sources they are.
        known = isinstance(error, dist.DistError)
        reason = f" ({str(error).splitlines()[0]})" if known else ""
        raise ConnectionError(
            "another rank is lost: it was killed, ended with an error, which it tells itself, or "
            f"was silent for {TIMEOUT.total_seconds():g} s{reason}; start all ranks again, with "
            "--resume to go on from the last checkpoint"
        ) from error
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK") or 0)
