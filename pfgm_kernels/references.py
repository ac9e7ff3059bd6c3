# SPDX-License-Identifier: Apache-2.0
"""ReferenceSet: a reference batch checked and prepared once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels.backends import BACKENDS, choose
from pfgm_kernels.chunks import flatten

DEFAULT_WORKSPACE = 256 << 20


class ReferenceSet:
    """The reference batch x0 of the field, checked and prepared once, constant under autograd.

    Holds a view of `x0`, not a copy (except where float16 or bfloat16 must become float32, or
    where `x0` is not contiguous), and what the backend computes from it once: on a CPU norms, and
    where float32 values turn out to be 8-bit images a copy in 8 bits; for Triton the parts that
    tensor cores multiply. `nbytes` counts everything.

    Args:
        x0: (N, *event), floating point, finite, N ≥ 1.
        workspace: bytes of temporaries that one call of the op may take, whatever B and N.
        backend: the one that the op will run on where it is not asked for another; by default the
            first that can.

    Raises:
        TypeError: `x0` is not a floating-point tensor.
        ValueError: `x0` is empty, holds NaN or Inf, or requires grad (a ReferenceSet is constant:
            pass the tensor itself to the op instead); `backend` is not a backend's name.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """

    values: Tensor
    """(N, d) float32 or float64, or uint8 codes into `table`."""
    table: Tensor
    """(256,) float32, what each 8-bit code stands for; (0,) for floating-point values."""
    event_shape: torch.Size
    workspace: int
    backend: str | None
    """As asked for."""
    operands: dict[str, list[Tensor]]
    """What the backend that will run prepared of the references, by its name."""

    def __init__(
        self, x0: Tensor, *, workspace: int = DEFAULT_WORKSPACE, backend: str | None = None
    ) -> None:
        if isinstance(x0, Tensor) and x0.requires_grad:
            raise ValueError(
                "ReferenceSet is constant and expects a tensor that does not require grad; "
                "pass the tensor itself to the op, or x0.detach()"
            )
        values = flatten(check_references(x0))
        # aminmax propagates NaN and needs no temporary of the size of x0.
        low, high = torch.aminmax(values)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("ReferenceSet expects finite references, got NaN or Inf in x0")
        table = values.new_empty(0, dtype=torch.float32)
        self._set(values, table, x0.shape[1:], workspace, backend)

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        low: float = -1.0,
        high: float = 1.0,
        *,
        workspace: int = DEFAULT_WORKSPACE,
        backend: str | None = None,
    ) -> ReferenceSet:
        """References stored as 8-bit images, a quarter of the bytes of float32.

        A pixel u stands for float32(low + (high − low)·u/255), formed in float64 and rounded once,
        so the set is exactly that float32 data set.

        Args:
            images: (N, *event) uint8, N ≥ 1.
            low, high: the values of the pixels 0 and 255, low < high.
            workspace, backend: as for the constructor.

        Raises:
            TypeError: `images` is not a uint8 tensor.
            ValueError: no image, or not low < high with both finite; not a backend's name.
            RuntimeError: as for the constructor.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"from_images expects a uint8 tensor (N, *event), got {got}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"from_images expects finite low < high, got {low} and {high}")
        _check_shape(images)
        codes = torch.arange(256, dtype=torch.float64, device=images.device)
        table = (low + (high - low) * codes / 255).float()
        references = cls.__new__(cls)
        references._set(flatten(images), table, images.shape[1:], workspace, backend)
        return references

    def _set(
        self,
        values: Tensor,
        table: Tensor,
        event_shape: torch.Size,
        workspace: int,
        backend: str | None,
    ) -> None:
        if not isinstance(workspace, int) or workspace < 1 << 20:
            raise ValueError(f"workspace expects a number of bytes ≥ {1 << 20}, got {workspace!r}")
        self.values, self.table = values, table
        self.event_shape, self.workspace, self.backend = event_shape, workspace, backend
        name = choose(backend, values.device, values.shape[1], requires_grad=False)
        self.operands = {name: BACKENDS[name].prepare(values, table, values.nbytes)}

    def to(self, device: torch.device | str) -> ReferenceSet:
        """The same set on another device (itself where it is there already)."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = type(self).__new__(type(self))
        values, table = self.values.to(device), self.table.to(device)
        moved._set(values, table, self.event_shape, self.workspace, self.backend)
        return moved

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the references that the set stands for."""
        return self.table.dtype if self.table.numel() else self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the set keeps alive."""
        prepared = [tensor for tensors in self.operands.values() for tensor in tensors]
        return sum(tensor.nbytes for tensor in (self.values, self.table, *prepared))

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        stored = "8-bit" if self.table.numel() else str(self.dtype).removeprefix("torch.")
        return (
            f"ReferenceSet({len(self)} references of shape {tuple(self.event_shape)}, "
            f"{stored}, {self.nbytes / 2**20:.1f} MiB on {self.device})"
        )


def check_references(x0: Tensor) -> Tensor:
    """x0 (N, *event) itself, if it is a floating-point tensor with something in it."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 expects a tensor or a ReferenceSet, got {type(x0).__name__}")
    if not x0.is_floating_point():
        raise TypeError(
            f"x0 expects a floating-point tensor, got {x0.dtype}"
            " (8-bit images: ReferenceSet.from_images)"
        )
    _check_shape(x0)
    return x0


def _check_shape(x0: Tensor) -> None:
    if x0.dim() < 1 or x0.numel() == 0:
        raise ValueError(f"x0 expects shape (N, *event) with N ≥ 1, got {tuple(x0.shape)}")
