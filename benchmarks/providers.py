# SPDX-License-Identifier: Apache-2.0
"""Who computes it. A provider is one function, of peers.py or here: add it to `providers()` and it
takes part in every benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu_peers import split_composite
from benchmarks.peers import Field, RefusedError
from benchmarks.problems import GAMMA, Problem
from pfgm_kernels import poisson_field
from pfgm_kernels.backends import BACKENDS
from tests.op import oracle


@dataclass(frozen=True)
class Provider:
    """prepare(problem, gradient) -> field, `gradient` telling whether gradients will be taken.

    tolerances: of `Exact.forward_error` and `Exact.gradient_error`; a provider that is further off
    is not timed. temporaries(problem, gradient): bytes that one query takes, for a provider whose
    memory and time are proportional to the queries; where they are too many or would take too long,
    it is run on some. one_batch_size: whatever it prepares in its first call serves that call's
    number of queries alone.
    """

    name: str
    prepare: Callable[[Problem, bool], Field]
    tolerances: tuple[float, float]
    temporaries: Callable[[Problem, bool], int] | None = None
    one_batch_size: bool = False
    ours: bool = False

    def __str__(self) -> str:
        return self.name


PEER_TOLERANCES = (1e-2, 1e-2)
"""Peers are timed with the error that they have, and it is shown; this stops only nonsense."""
OUR_TOLERANCES = (1e-6, oracle.GRADIENT)
"""The accuracy contract."""


EAGER_LARGEST = 1 << 33
"""B·N·d beyond which the portable backend is refused: one call had not ended
after 90 s on two busy cores."""


def ours(backend: str, prepared: bool) -> Callable[[Problem, bool], Field]:
    """The op on a ReferenceSet (of 8-bit images where the data are images) or on a plain tensor."""

    def prepare(problem: Problem, gradient: bool) -> Field:
        reason = BACKENDS[backend].unsupported_reason(problem.x0.device)
        if reason is not None:
            raise RefusedError(reason)
        if backend == "eager" and len(problem.x) * problem.x0.numel() > EAGER_LARGEST:
            raise RefusedError("too slow: the portable backend takes over a minute for so many")
        references = problem.reference_set() if prepared else problem.x0

        def field(x: Tensor, t: Tensor) -> Tensor:
            return poisson_field(
                x, t, references, gamma=GAMMA, scale=problem.scale, backend=backend
            )

        return field

    return prepare


def providers(device: torch.device) -> list[Provider]:
    """Peers that fit the device, then ours by backend that runs on it."""
    tolerances, float32 = PEER_TOLERANCES, torch.float32
    others = [
        Provider("published formula", peers.published, tolerances, peers.published_temporaries),
        Provider("KeOps", peers.keops, tolerances, peers.keops_temporaries),
        Provider("float32 composite", peers.composite(float32), tolerances),
        Provider("float64 composite", peers.composite(torch.float64), tolerances),
        Provider(
            "float32 composite, torch.compile",
            peers.compiled_composite,
            tolerances,
            one_batch_size=True,
        ),
    ]
    if device.type == "cuda":
        others += [
            # After the composite that resets torch.compile, and loses what was compiled before it.
            Provider("bfloat16 split products", split_composite, tolerances, one_batch_size=True),
        ]
    else:
        others += [Provider("float32 composite, oneDNN", peers.onednn_composite, tolerances)]
    available = [name for name, b in BACKENDS.items() if b.unsupported_reason(device) is None]
    return others + [
        Provider(
            f"pfgm_kernels {name}, {form}",
            ours(name, form == "ReferenceSet"),
            OUR_TOLERANCES,
            ours=True,
        )
        for name in available
        # `eager` is slow and prepares nothing: its two forms would show the same time twice.
        for form in (("tensor",) if name == "eager" else ("ReferenceSet", "tensor"))
    ]
