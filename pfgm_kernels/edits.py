# SPDX-License-Identifier: Apache-2.0
"""Whether references were written to since they were prepared."""

from __future__ import annotations

import torch
from torch import Tensor

from pfgm_kernels.on_disk import OnDisk

EDITED = "ReferenceSet expects its references as they were prepared, but x0 was edited since"


def version_of(values: Tensor | OnDisk) -> int | None:
    """How often autograd saw the memory written to; None where it does not count."""
    if isinstance(values, OnDisk) or values.is_inference():
        return None
    return values._version


# What a traced call has of a set, looked at whenever its graph runs: the table, as a copy, since
# an op returns nothing of its arguments.
torch.library.define(
    "pfgm::stored_table", "(Tensor values, Tensor table, SymInt version) -> Tensor"
)


@torch.library.register_fake("pfgm::stored_table")
def _(values: Tensor, table: Tensor, version: int) -> Tensor:
    return torch.empty_like(table)


@torch.library.impl("pfgm::stored_table", "CompositeExplicitAutograd")
def _stored_table(values: Tensor, table: Tensor, version: int) -> Tensor:
    if version >= 0 and values._version != version:
        raise RuntimeError(EDITED)
    return table.clone()
