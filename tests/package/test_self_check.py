# SPDX-License-Identifier: Apache-2.0
"""Does the self-check find mistakes? `eager` with one of them at a time stands in for a backend."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import one_thread, solve
from stand_ins import backend, changed
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pfgm_kernels import backends, chunks, proof, rows
from pfgm_kernels.backends import BACKENDS, eager
from pfgm_kernels.backends._values import decode
from pfgm_kernels.problems import DIMS, FAMILIES, Family, band_of, encode, problems

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


def tail_is_not_read(x, t, values, *rest):
    return eager.forward(x, t, values[: len(values) // 16 * 16 or None], *rest)


def race() -> Callable[..., None]:
    runs = itertools.count()

    def change(results, *_):
        results[1].add_(1e-13 * next(runs))

    return change


def nan_spreads(results, *_):
    results[0][1:][results[0][:-1].isnan()] = math.nan


def nan_is_swallowed(results, *_):
    results[0].nan_to_num_(0)


def last_row_is_not_written(results, *_):
    v = torch.empty_like(results[0])
    v[:-1] = results[0][:-1]
    return v, *results[1:]


def last_anchor_is_not_written(results, *_):
    anchor = torch.empty_like(results[2])
    anchor[:-1] = results[2][:-1]
    return *results[:2], anchor, results[3]


def gradient_is_off(name: str) -> Callable[..., None]:
    def change(dvalues, queries, values, table, operands, cotangents, *_):
        off = dvalues if name == "dx0" else getattr(cotangents, name)
        if off is not None:
            off.mul_(1.01)

    return changed("backward", change)


def last_column_is_zero(queries, output, v, result):
    rows.finish(queries, output, v, result)
    if output.name == "field":
        result[:, -1] = 0


def residual_is_off(queries, output, v, result):
    rows.finish(queries, output, v, result)
    queries.residual.mul_(1.1)


def values_are_off_beside_gradients(queries, output, v, result):
    rows.finish(queries, output, v, result)
    if len(queries.residual):
        result.mul_(1.1)


def squares_by_products(x, t, values, table, operands, k):
    """Float32, written the plain way: ‖x‖² − 2 x·x0 + ‖x0‖²."""
    x, t, rows = x.float(), t.float(), decode(values, table).float()
    squares = x.square().sum(1)[:, None] - 2 * x @ rows.T + rows.square().sum(1)
    if math.isinf(k):
        logits = -squares / (2 * t.square()[:, None])
    else:
        logits = -(k / 2) * (squares + t.square()[:, None]).log()
    v, anchor = logits.softmax(1) @ rows - x, squares.argmin(1)
    log_weight = logits.log_softmax(1).gather(1, anchor[:, None])[:, 0]
    return v.double(), logits.logsumexp(1).double(), anchor, log_weight.double()


def raises(*_):
    raise RuntimeError("CUDA error: an illegal\nmemory access was encountered")


MISTAKES: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "tail": ({"forward": tail_is_not_read}, "tails: displacement off by .* allowed in row"),
    "race": (changed("forward", race()), "tails: log_mass differs from run to run"),
    "NaN spreads": (changed("forward", nan_spreads), "^points: displacement off by inf"),
    "NaN is swallowed": (changed("forward", nan_is_swallowed), "^points: displacement off by inf"),
    "row": (changed("forward", last_row_is_not_written), "^tails: displacement off by inf"),
    "anchor": (changed("forward", last_anchor_is_not_written), "^tails: gradient of x off by"),
    "slices": (
        {
            "prepare": lambda values, table, workspace: [values],
            "operands_of": lambda operands, rows: [operands[0][: rows.stop - rows.start]],
            "forward": lambda x, t, values, table, operands, k: eager.forward(
                x, t, *operands, table, [], k
            ),
        },
        "^chunks: displacement off by .*; 2 faults in all",
    ),
    "float32": ({"forward": squares_by_products}, "off by"),
    "float64": (
        {"forward": lambda x, *rest: eager.forward(x.float(), *rest)},
        "^float64: displacement off by",
    ),
    "large D": (
        {"forward": lambda *arguments: eager.forward(*arguments[:-1], min(arguments[-1], 1e5))},
        "^chunks: displacement off by",
    ),
    "field": ({"finish": last_column_is_zero}, "^field on points: field off by .*; crowds: field"),
    "residual": ({"finish": residual_is_off}, "^tails: gradient of x off by"),
    "raises": ({"forward": raises}, "^tails: RuntimeError: CUDA error: an illegal memory access"),
    "dx": (gradient_is_off("dx"), "gradient of x off by"),
    "dt": (gradient_is_off("dt"), "gradient of t off by"),
    "dx0": (gradient_is_off("dx0"), "gradient of x0 off by"),
    "values": ({"finish": values_are_off_beside_gradients}, "^tails: displacement off by"),
}
BACKWARD = {"anchor", "residual", "dx", "dt", "dx0", "values"}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_eager_passes(family):
    verdict = proof.check("eager", family, CPU)
    assert verdict.passed, verdict.figures
    assert verdict.figures.startswith("errors up to 0%")


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("codes", [False, True])
def test_it_finds(monkeypatch, name, codes):
    functions, figures = MISTAKES[name]
    if name == "dx0" and codes:
        pytest.skip("references in 8 bits have no gradients")
    family = Family(list(MISTAKES).index(name) % 3, codes, name in BACKWARD)
    monkeypatch.setitem(BACKENDS, "triton", backend(**functions))
    verdict = proof.check("triton", family, CPU)
    assert not verdict.passed
    assert re.search(figures, verdict.figures), verdict.figures


def test_memory_is_poisoned_while_it_runs():
    like = torch.zeros(3)
    with proof._Poison():
        floats = [torch.empty(3), torch.empty_like(like), like.new_empty(3)]
        others = [torch.empty(2, dtype=dtype) for dtype in (torch.int8, torch.int64, torch.uint8)]
        assert not torch.zeros(2).any()
    assert all(each.isnan().all() for each in floats)
    assert [each.tolist() for each in others] == [[-1, -1], [-1, -1], [255, 255]]


def test_no_memory_is_taken_that_is_not_poisoned():
    names = {function.__name__ for function in proof.FRESH}
    for file in [*Path(backends.__file__).parent.rglob("*.py"), Path(chunks.__file__)]:
        assert {*re.findall(r"\.(\w*empty\w*)\(", file.read_text())} <= names, file


def test_on_a_gpu_inputs_arrive_late_and_on_a_stream_of_its_own(monkeypatch):
    """Fake tensors are on a GPU without there being one; what is done in which order is noted."""
    events = []

    def stream(chosen):
        events.append(f"enter {chosen}")
        return nullcontext()

    def run(name, problem, family, tensors):
        proof._late([torch.empty(3, device=gpu)])
        raise ValueError("seen enough")

    gpu = torch.device("cuda", 0)
    proof._aside.cache_clear()
    for name, event in {"synchronize": "synchronize", "_sleep": "pause"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda argument, event=event: events.append(event))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream on {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Tensor, "copy_", lambda copy, _: events.append("copy") or copy)
    problem = SimpleNamespace(tensors=lambda *_: [])
    monkeypatch.setattr(proof, "problems", lambda family: {"one": problem})
    monkeypatch.setattr(proof, "_run", run)
    with FakeTensorMode():
        verdict = proof.check("triton", Family(0, False, False), gpu)
    proof._aside.cache_clear()
    assert "seen enough" in verdict.figures
    before = ["synchronize", "enter a stream on cuda:0"]
    assert events == [*before, "synchronize", "pause", "copy"]


@pytest.mark.parametrize("band", range(3))
def test_the_problems_are_what_they_are_said_to_be(band):
    few, many = DIMS[band]
    assert {band_of(d) for d in (few, many)} == {band}
    for codes in (False, True):
        family = Family(band, codes, False)
        found = problems(family)
        for problem in found.values():
            assert problem.x.shape[1] == problem.x0.shape[1] in (few, many)
        if codes:
            for name in found.keys() - {"float64"}:
                x0 = found[name].x0
                assert torch.equal(decode(*encode(x0)).float(), x0), name
        size = {
            name: solve(p.x, p.t, p.x0, p.D).effective_sample_size
            for name, p in found.items()
            if name in ("tails", "chunks", "clusters", "crowds")
        }
        assert all(each.max() > 2 for each in size.values())  # the dense sums are taken
        assert min(size["tails"].max(), size["chunks"].max()) > 100
        assert size["clusters"][6:].min() > 4  # more than a pass lists in a tile
        assert (found["clusters"].x0[[0, 70, 71]].std(0) < 1e-2).all() or codes
        assert found["one"].x.shape == found["one"].x0.shape == (1, few)
        points = found["points"]
        on = (points.x[:, None] == points.x0).all(2).sum(1)
        assert on[points.t == 0].tolist() == [1, 2]  # singular points
        assert (~points.x.isfinite()).any(1).sum() == 2
        assert (found["float64"].x.float() != found["float64"].x).any()
        assert len(found["crowds"].x0.unique(dim=0)) == 4
        assert found["offset"].x0.std() < 0.01 < 99 < found["offset"].x0.mean()
