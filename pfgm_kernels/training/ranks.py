# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: what they share, and what each does alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

DEVICES = ("auto", "cpu", "cuda")


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
