# SPDX-License-Identifier: Apache-2.0
"""The numbers of the op (k = d + D, gamma, scale) where torch.compile traces ones that change.

A number that an op is given belongs to the graph, which is then compiled anew for every number.
The overloads `of_tensors` take 0-dim tensors on the CPU instead, and read them whenever the graph
runs; they are not for CUDA graphs, which would keep the first ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfgm_kernels import ops


def traceable(*numbers: float) -> tuple[Any, ...]:
    """The numbers; as tensors where one is a symbol of a graph that is being traced."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not all(has_static_value(number) for number in numbers):
            zero = torch.zeros((), dtype=torch.float64, device="cpu")
            return tuple(zero + number for number in numbers)
    return numbers


def _define(name: str) -> None:
    op = getattr(torch.ops.pfgm, name).default
    floats = [i for i, each in enumerate(op._schema.arguments) if str(each.type) == "float"]
    overload = f"pfgm::{name}.of_tensors"
    schema = ops.SCHEMAS[name].replace("float ", "Tensor ")
    torch.library.define(overload, schema, tags=(torch.Tag.cudagraph_unsafe,))

    def call(arguments: tuple[Any, ...], number: Any) -> Any:
        return op(*(number(each) if i in floats else each for i, each in enumerate(arguments)))

    torch.library.register_fake(overload, lambda *a: call(a, lambda _: 1.0))  # shapes do not depend
    torch.library.impl(overload, "CompositeExplicitAutograd", lambda *a: call(a, Tensor.item))
    torch.library.impl(overload, "Batched", ops.no_vmap)
    torch.library.register_vmap(overload, ops.no_vmap)


for _name in ops.SCHEMAS:
    _define(_name)
