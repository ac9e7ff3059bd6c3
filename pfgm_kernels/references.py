# SPDX-License-Identifier: Apache-2.0
"""ReferenceSet: a reference batch checked and prepared once."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pfgm_kernels._checks import check_references, check_shape, integer, tensor
from pfgm_kernels.backends import BACKENDS
from pfgm_kernels.backends._values import table_of
from pfgm_kernels.choice import choose
from pfgm_kernels.chunks import References, default_workspace, flatten
from pfgm_kernels.classes import Classes, grouped
from pfgm_kernels.edits import EDITED, version_of
from pfgm_kernels.nearby import Nearby
from pfgm_kernels.on_disk import OnDisk, Paths
from pfgm_kernels.roll_call import telling
from pfgm_kernels.shards import QUERIES, Sharded

LEAST_WORKSPACE = 1 << 20
CALLS = 32
"""After so many a set takes the time for a sketch, of some ten calls."""

_preparing = threading.Lock()


class ReferenceSet:
    """The reference batch x0 of the field, checked and prepared once, constant under autograd.

    Holds a view of `x0`, not a copy (except where float16 or bfloat16 must become float32, or
    where `x0` is not contiguous), and what the backend computes from it once: on a CPU norms,
    where float32 values turn out to be 8-bit images a copy in 8 bits, and of many images, at the
    32nd call, coordinates by which later ones find the references near a query; for Triton what
    tensor cores multiply. That of another backend is made when asked for. `nbytes` counts all.

    The references are as they were when the set was made: a call that finds `x0` edited raises.
    That is seen by the version that PyTorch counts, for edits through any tensor that shares the
    memory, but not for what is written through `.data`, by NumPy or by another process, nor to
    tensors made in inference mode; a function compiled for a GPU does not look.

    Args:
        x0: (N, *event) float16, bfloat16, float32 or float64, dense, finite, N ≥ 1.
        labels: (N,) integers ≥ 0, the classes of the references, for calls with labels. They are
            then stored class by class: a copy, unless x0 is sorted so.
        workspace: bytes of temporaries that one call of the op may take, whatever B and N; ≥ 2²⁰.
            By default 256 MiB, and 1 GiB on a GPU, where small chunks would leave it idle.
        backend: the one that the op will run on where it is not asked for another; by default the
            first that can run and, on a GPU, has proven itself there.
        group: of torch.distributed, each of whose ranks makes such a set of its part of the
            references, of one shape, dtype and D. Every call is then one of all ranks, and answers
            for the references of all; its gradients are whole on each rank.
        queries: of a group's calls: "replicated", the same on each rank, or "local", each rank's
            own, with its own labels, which all ranks answer together.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: `x0` is empty, holds NaN or Inf, holds nothing (device meta), or requires grad
            (a ReferenceSet is constant: pass the tensor itself to the op instead); `workspace` is
            too small; `backend` is not a backend's name.
        RuntimeError: the backend asked for cannot run here; the message says why.
        ConnectionError: in calls of a group, where a rank is lost or failed by itself: by gloo it
            is named, on each rank, and the group answers no more; ValueError where calls differ.
    """

    values: References
    """(N, d) float32 or float64, or uint8 codes into `table`; or what stands for that."""
    own: Tensor | OnDisk
    """Those of this process: all, but where the references are those of a group."""
    table: Tensor
    """(256,) float32, what each 8-bit code stands for; (0,) for floating-point values."""
    event_shape: torch.Size
    workspace: int
    backend: str | None
    """As asked for."""
    classes: Classes | None
    """Which references have which label."""
    operands: dict[str, list[Tensor]]
    """What each backend that ran, or will run, prepared of the references, by its name."""

    @telling
    def __init__(
        self,
        x0: Tensor,
        *,
        labels: Tensor | None = None,
        workspace: int | None = None,
        backend: str | None = None,
        group: ProcessGroup | None = None,
        queries: str = "replicated",
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
        self._set(*grouped(values, labels), table, x0.shape[1:], workspace, backend, group, queries)

    @classmethod
    @telling
    def from_images(
        cls,
        images: Tensor,
        low: float = -1.0,
        high: float = 1.0,
        *,
        labels: Tensor | None = None,
        workspace: int | None = None,
        backend: str | None = None,
        group: ProcessGroup | None = None,
        queries: str = "replicated",
    ) -> ReferenceSet:
        """References stored as 8-bit images, a quarter of the bytes of float32.

        A pixel u stands for float32(low + (high − low)·u/255), formed in float64 and rounded once,
        so the set is exactly that float32 data set.

        Args:
            images: (N, *event) uint8, N ≥ 1.
            low, high: the values of the pixels 0 and 255, low < high.
            labels, workspace, backend: as for the constructor.

        Raises:
            TypeError: `images` is not a dense uint8 tensor; another argument of the wrong type.
            ValueError: no image, or not low < high with both finite; else as for the constructor.
            RuntimeError: as for the constructor.
        """
        tensor("images", images, (torch.uint8,), "a uint8 tensor (N, *event)")
        table = table_of(low, high, images.device)
        check_shape("images", images)
        references = cls.__new__(cls)
        values, classes = grouped(flatten(images), labels)
        shape = images.shape[1:]
        references._set(values, classes, table, shape, workspace, backend, group, queries)
        return references

    @classmethod
    @telling
    def from_files(
        cls,
        paths: Paths,
        low: float = -1.0,
        high: float = 1.0,
        *,
        labels: Tensor | None = None,
        workspace: int | None = None,
        backend: str | None = None,
        group: ProcessGroup | None = None,
        queries: str = "replicated",
        device: torch.device | str | None = None,
        sketch: str | os.PathLike[str] | None = None,
    ) -> ReferenceSet:
        """References that stay in .npy files, for data larger than memory.

        Each call reads them once from beginning to end, the next chunk while the kernels work on
        the last one, within the workspace: as many queries a call as there are is cheapest. Results
        are those of the same references in memory. Gradients by x and t, forward mode and labels
        go as ever; a compiled function takes no references in files.

        Files must stay as they are: each read looks at their size and the time of their last
        change, and raises where they differ. Values are looked at when they are read.

        Args:
            paths: one or several .npy files, or folders, whose .npy files follow by name: arrays
                (n, *event) of one dtype, uint8 (images, as of `from_images`), float16, float32 or
                float64, in C order.
            low, high: of uint8, the values of the pixels 0 and 255, low < high.
            labels: as for the constructor. Rows of a class are best stored side by side: where they
                are not, each call gathers them.
            workspace: as for the constructor, but 768 MiB by default, and 2 GiB on a GPU. The
                files are read once for as many queries as it holds, 512 (d + 8) bytes each.
            backend: as for the constructor.
            device: where calls compute, that of their queries; the CPU by default.
            sketch: a file of coordinates in few dimensions, by which queries near the data read the
                references near them alone. Made where it is not there, in two passes over all.
                In a group each rank has one of its part, or none has.

        Raises:
            FileNotFoundError, TypeError, ValueError: a file that is missing, damaged, of another
                kind or of another event or dtype than the ones before it; else as for
                `from_images`. Calls raise ValueError for a file that was changed, or that holds NaN
                or Inf.
            OSError: a file that cannot be read, then or in a call.
        """
        values = OnDisk.open(paths, torch.empty(0, device=device or "cpu").device)
        table = torch.empty(0, dtype=torch.float32, device=values.device)
        if values.dtype == torch.uint8:
            table = table_of(low, high, values.device)
        references = cls.__new__(cls)
        rows, classes = grouped(values, labels)
        if sketch is not None and isinstance(rows, OnDisk):
            rows.near = Nearby.open(Path(sketch), rows, table)
        shape = values.event_shape
        references._set(rows, classes, table, shape, workspace, backend, group, queries)
        return references

    def _set(
        self,
        values: Tensor | OnDisk,
        classes: Classes | None,
        table: Tensor,
        event_shape: torch.Size,
        workspace: int | None,
        backend: str | None,
        group: ProcessGroup | None = None,
        queries: str = "replicated",
    ) -> None:
        if queries not in QUERIES:
            raise ValueError(f"queries expects one of {', '.join(QUERIES)}, got {queries!r}")
        if workspace is None:
            workspace = default_workspace(values.device, isinstance(values, OnDisk))
        self.workspace = integer("workspace", workspace, LEAST_WORKSPACE)
        self.own, self.table, self.classes = values, table, classes
        self.values: References = values
        if group is not None:
            self.values = Sharded(values, table, event_shape, classes, group, queries)
            self.classes = self.values.classes
        self.event_shape, self.backend = event_shape, backend
        self._version = version_of(self.own)
        self.operands, self._calls = {}, 0
        codes = values.dtype == torch.uint8
        self._prepare(choose(backend, values.device, values.shape[1], codes, derivatives=False))

    def stored(self) -> tuple[References, Tensor]:
        """`values` and `table`.

        Raises:
            RuntimeError: the values were edited since they were prepared.
            NotImplementedError: they are not in memory, or not all, and a function is compiled.
        """
        if not torch.compiler.is_compiling():
            if version_of(self.own) != self._version:
                raise RuntimeError(EDITED)
        elif not isinstance(self.values, Tensor):
            where = "in files" if isinstance(self.values, OnDisk) else "of several processes"
            raise NotImplementedError(
                f"a compiled function expects references in memory, got some {where}: call the op "
                "outside of it, or leave out fullgraph=True"
            )
        elif self.device.type == "cpu" and not torch.compiler.is_exporting():
            # Versions are known when the graph runs. CUDA graphs run on copies, an exported
            # program elsewhere: nothing was remembered of those.
            version = -1 if self._version is None else self._version
            return self.values, torch.ops.pfgm.stored_table(self.values, self.table, version)
        return self.values, self.table

    def operands_for(self, backend: str) -> list[Tensor]:
        """What a backend prepared of the references: now, where this is the first call for it."""
        if torch.compiler.is_compiling() or backend not in self.operands:
            self._prepare(backend)
        elif hasattr(BACKENDS[backend], "sketch") and isinstance(self.own, Tensor):
            self._calls += 1
            if self._calls == CALLS:
                self._sketch(backend)
        return self.operands[backend]

    def _prepare(self, backend: str) -> None:
        with _preparing:
            values, table = self.own, self.table
            if isinstance(values, OnDisk):  # what is read is prepared in the call
                self.operands = self.operands | {backend: []}
            elif backend not in self.operands:
                # What is made within a transform of torch.func would be of no use after it.
                with torch._C._DisableFuncTorch():
                    operands = BACKENDS[backend].prepare(values, table, values.nbytes)
                self.operands = self.operands | {backend: operands}  # others may read the old one

    def _sketch(self, backend: str) -> None:
        with _preparing, torch._C._DisableFuncTorch():
            operands = BACKENDS[backend].sketch(self.own, self.table, self.operands[backend])
            self.operands = self.operands | {backend: operands}

    # A compiled function prepares while it is traced. This is torch.compiler.assume_constant_result
    # without its import of the compiler.
    _prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> ReferenceSet:
        """The same set on another device (itself where it is there already), with its workspace
        and its backend, which prepares the references there.

        non_blocking: copy from pinned memory to a GPU without waiting, as `Tensor.to` does.
        """
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if isinstance(self.values, Sharded):
            raise ValueError("references of a group stay where they are: make others anew")
        if device.type == "meta":
            raise ValueError("ReferenceSet expects a device that holds data, got meta")
        non_blocking &= device.type != "cpu"  # the CPU would prepare what has not arrived
        self.stored()
        values = self.own.to(device, non_blocking=non_blocking)
        table = self.table.to(device, non_blocking=non_blocking)
        return self._like(values, self.classes and self.classes.to(device), table)

    def __getitem__(self, index: slice | Tensor) -> ReferenceSet:
        """A subset of the references, which are counted as they were given, with their labels:
        `references[labels == 3]`. A copy, but for a slice of a set without labels.

        index: slice, (N,) bool or (n,) integers, on the device of the set; something of it.

        Raises:
            TypeError, ValueError, IndexError: another index, or one of nothing.
        """
        self.stored()
        if isinstance(self.values, Sharded):
            raise ValueError("a subset expects references of one process, got those of a group")
        if isinstance(index, Tensor):
            if index.dim() != 1 or index.dtype not in (torch.bool, torch.int32, torch.int64):
                raise TypeError(
                    "a subset expects a slice, (N,) bool or (n,) integers, "
                    f"got {index.dtype} of shape {tuple(index.shape)}"
                )
        elif not isinstance(index, slice):
            raise TypeError(
                f"a subset expects a slice or a tensor of one axis, got {type(index).__name__}"
            )
        labels = None
        if self.classes is not None:
            labels = self.classes.labels[index]
            index = self.classes.place()[index]
        values = self.own[index]
        check_shape("a subset", values)
        return self._like(*grouped(values, labels), self.table)

    def _like(
        self, values: Tensor | OnDisk, classes: Classes | None, table: Tensor
    ) -> ReferenceSet:
        """Other references, else the same set."""
        made = type(self).__new__(type(self))
        made._set(values, classes, table, self.event_shape, self.workspace, self.backend)
        return made

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, those of the references in the order in which they were given."""
        return self.classes and self.classes.labels

    def cuda(
        self, device: torch.device | str | int = "cuda", non_blocking: bool = False
    ) -> ReferenceSet:
        """`to` a GPU, by default the current one."""
        device = torch.device("cuda", device) if isinstance(device, int) else device
        return self.to(device, non_blocking)

    def cpu(self) -> ReferenceSet:
        """`to` the CPU."""
        return self.to("cpu")

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
        prepared = [each for operands in self.operands.values() for each in operands]
        held = [self.table, *(self.classes or ()), *prepared]
        if isinstance(self.own, Tensor):
            held.append(self.own)
        return sum(each.nbytes for each in held)

    def __getstate__(self) -> dict[str, Any]:
        self.stored()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and what is read from a file count versions anew."""
        vars(self).update(state)
        self._version = version_of(self.own)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        stored = "8-bit" if self.table.numel() else str(self.dtype).removeprefix("torch.")
        where = "" if isinstance(self.own, Tensor) else "in files, "
        where += f"{len(self.own)} of them here, " if isinstance(self.values, Sharded) else ""
        return (
            f"ReferenceSet({len(self)} references of shape {tuple(self.event_shape)}, "
            f"{stored}, {where}{self.nbytes / 2**20:.1f} MiB on {self.device})"
        )
