# SPDX-License-Identifier: Apache-2.0
"""Does a query with a label see the references of its class, and these alone?"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import seeded
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)

from pfgm_kernels import (
    ReferenceSet,
    divergence,
    log_density,
    merge,
    poisson_displacement,
    poisson_field,
    posterior_mean,
)

SIZES = [40, 1, 0, 137, 3, 64]
"""References a class; one has none."""


def problem(d: int, batch: int = 23, dtype: torch.dtype = torch.float32, D: float = 1):
    """x, t, x0, the labels of the queries and of the references, these in no order."""
    generator = seeded(d)
    labels = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    x0 = torch.randn(len(labels), d, dtype=dtype, generator=generator)
    x = torch.randn(batch, d, dtype=dtype, generator=generator)
    t = torch.linspace(1, 3, batch, dtype=dtype) * (d**0.25 if math.isinf(D) else d**0.75)
    wanted = torch.tensor([0, 1, 3, 4, 5])[torch.randint(5, (batch,), generator=generator)]
    return x, t, x0, wanted, labels


@pytest.mark.parametrize("d", [2, 20, 40, 300])
@pytest.mark.parametrize("D", [1, math.inf])
@pytest.mark.parametrize("kind", ["float32", "float64", "images", "decoded images"])
def test_values_and_gradients(backend, d, D, kind):
    dtype = torch.float64 if kind == "float64" else torch.float32
    x, t, x0, wanted, labels = problem(d, dtype=dtype, D=D)
    options = {"labels": labels.to(backend.device), "backend": backend.name}
    images = (40 * x0 + 128).clamp(0, 255).to(torch.uint8)
    if kind == "decoded images":
        x, x0 = 0.3 * x, images.float() / 127.5 - 1
        t = t * torch.logspace(-2, -0.5, len(t))
    if kind == "images":
        references = ReferenceSet.from_images(images.to(backend.device), **options)
        x0 = references.table.cpu()[images.long()]
        x, t = 0.3 * x, 0.3 * t
    else:
        references = ReferenceSet(x0.to(backend.device), **options)
    x.requires_grad_(), t.requires_grad_()
    v, log_mass = backend.displacement(x, t, references, D=D, labels=wanted)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    tolerance = FLOAT64 if kind == "float64" else float32_contract(backend.name, named=d <= 16)
    largest = 0.0
    for label in wanted.unique():
        rows, seen = wanted == label, x0[labels == label]
        truth = solve(x[rows], t[rows], seen, D)
        largest = max(largest, truth.effective_sample_size.max().item())
        assert_displacement(v[rows].detach(), truth, tolerance)
        assert_log_mass(log_mass[rows].detach(), truth)
        expected = differentiate(truth, x[rows], seen, g_v[rows], g_m[rows], D)
        assert_gradients(expected, dx=dx[rows], dt=dt[rows])
    assert largest > 2


@pytest.mark.parametrize("d", [3, 300])
def test_one_call_a_class_gives_the_same(backend, d):
    """In float64 to 1e-9, forward, backward and in forward mode, and so does a cut workspace."""
    x, t, x0, wanted, labels = problem(d, dtype=torch.float64)
    tangent = torch.randn(x.shape, dtype=x.dtype, generator=seeded(1))
    made = {"labels": labels.to(backend.device), "backend": backend.name}
    for workspace in (1 << 20, 1 << 28):
        references = ReferenceSet(x0.to(backend.device), workspace=workspace, **made)

        def run(x, references=references):
            return backend.field(x, t, references, gamma=0.5, labels=wanted)

        def one_by_one(x):
            rows = [
                backend.field(x[[i]], t[[i]], x0[labels == wanted[i]], gamma=0.5)
                for i in range(len(x))
            ]
            return torch.cat(rows)

        found, slope = torch.func.jvp(run, (x,), (tangent,))
        expected, expected_slope = torch.func.jvp(one_by_one, (x,), (tangent,))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-9, atol=1e-9)


def test_a_thousand_classes(backend):
    """Each query its own, some twice: all that is different from one call is what each sees."""
    generator = seeded()
    labels = torch.arange(1000).repeat_interleave(3)
    x0 = torch.randn(3000, 70, generator=generator)
    wanted = torch.randint(1000, (200 if backend.name in ("cpu", "eager") else 6,))
    x = x0[3 * wanted] + torch.randn(len(wanted), 70, generator=generator)
    references = ReferenceSet(x0.to(backend.device), labels=labels.to(backend.device))
    v, _ = backend.displacement(x, 20.0, references, labels=wanted)
    for row, label in enumerate(wanted.tolist()):
        truth = solve(x[[row]], 20.0, x0[3 * label : 3 * label + 3])
        assert_displacement(v[[row]], truth, float32_contract(backend.name))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(backend, compiler):
    x, t, x0, wanted, labels = problem(40)
    references = ReferenceSet(x0.to(backend.device), labels=labels.to(backend.device))

    def run(x, t, wanted):
        return backend.displacement(x, t, references, labels=wanted)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for found, expected in zip(compiled(x, t, wanted), run(x, t, wanted), strict=True):
        assert torch.equal(found, expected)
    # It cannot look at labels, so that one that is wrong makes a row that is.
    wanted[3], wanted[5] = 2, 6
    v, log_mass = compiled(x, t, wanted)
    assert v.isnan().any(1).nonzero().flatten().tolist() == [3, 5]
    assert log_mass.isnan().nonzero().flatten().tolist() == [3, 5]


def test_what_is_derived_from_it():
    x, t, x0, _, labels = problem(30)
    wanted = torch.tensor([0, 3, 5]).repeat(8)[: len(x)]
    references = ReferenceSet(x0, labels=labels)
    halves = [ReferenceSet(x0[i::2], labels=labels[i::2]) for i in range(2)]
    parts = [poisson_displacement(x, t, half, labels=wanted) for half in halves]
    v, log_mass = merge(parts)
    expected, expected_mass = poisson_displacement(x, t, references, labels=wanted)
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_mass, expected_mass, rtol=0, atol=1e-6)
    mean = posterior_mean(x, t, references, labels=wanted)
    torch.testing.assert_close(mean, x + expected, rtol=0, atol=1e-5)
    density = log_density(x, t, references, labels=wanted)
    spread = divergence(x, t, references, labels=wanted)
    for label in (0, 3, 5):
        rows, seen = wanted == label, x0[labels == label]
        expected = log_density(x[rows], t[rows], seen)
        torch.testing.assert_close(density[rows], expected, rtol=0, atol=1e-6)
        expected = divergence(x[rows], t[rows], seen)
        torch.testing.assert_close(spread[rows], expected, rtol=1e-5, atol=0)
    one = poisson_field(x, t, references, labels=3)
    torch.testing.assert_close(one, poisson_field(x, t, references[labels == 3]))


def test_no_query(backend):
    _, _, x0, _, labels = problem(30)
    references = ReferenceSet(x0.to(backend.device), labels=labels.to(backend.device))
    none = torch.empty(0, dtype=torch.int64)
    v, log_mass = backend.displacement(torch.empty(0, 30), 1.0, references, labels=none)
    assert v.shape == (0, 30)
    assert log_mass.shape == (0,)


@pytest.mark.parametrize("images", [False, True])
def test_subsets_are_of_the_references_as_given(images):
    x, t, x0, _, labels = problem(30)
    given = (40 * x0 + 128).clamp(0, 255).to(torch.uint8) if images else x0
    build = ReferenceSet.from_images if images else ReferenceSet
    references = build(given, labels=labels)
    assert torch.equal(references.labels, labels)
    for index in (slice(3, 90, 7), labels == 3, torch.tensor([5, 5, 200, 7])):
        subset = references[index]
        assert torch.equal(subset.labels, labels[index])
        expected = poisson_field(x, t, build(given[index]))
        torch.testing.assert_close(poisson_field(x, t, subset), expected, rtol=1e-6, atol=1e-6)
        for copied in (copy.deepcopy(subset), pickle.loads(pickle.dumps(subset)), subset.to("cpu")):
            label = int(subset.labels[0])
            assert torch.equal(
                poisson_field(x, t, copied, labels=label), poisson_field(x, t, subset, labels=label)
            )
    plain = build(given)[10:20]
    assert plain.labels is None
    assert torch.equal(poisson_field(x, t, plain), poisson_field(x, t, build(given[10:20])))


def test_a_set_that_is_grouped_already_is_not_copied():
    x0, labels = torch.randn(60, 5), torch.arange(6).repeat_interleave(10)
    assert ReferenceSet(x0, labels=labels).values.data_ptr() == x0.data_ptr()
    assert ReferenceSet(x0, labels=labels.flip(0)).values.data_ptr() != x0.data_ptr()
    extra = 8 * (60 + 60 + 7 + 6)
    assert ReferenceSet(x0, labels=labels).nbytes == ReferenceSet(x0).nbytes + extra


LABELS = torch.tensor([0, 2, 2, 5])
SET = ReferenceSet(torch.ones(4, 3), labels=LABELS)
X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReferenceSet(torch.ones(4, 3), labels=[0, 1, 2, 3]), TypeError, "tensor.*list"),
        (
            lambda: ReferenceSet(torch.ones(4, 3), labels=torch.ones(4)),
            TypeError,
            "integers.*float",
        ),
        (lambda: ReferenceSet(torch.ones(4, 3), labels=LABELS[:3]), ValueError, r"\(4,\).*\(3,\)"),
        (lambda: ReferenceSet(torch.ones(4, 3), labels=-LABELS), ValueError, "≥ 0, got -5"),
        (lambda: ReferenceSet(torch.ones(4, 3), labels=LABELS << 30), ValueError, "below"),
        (lambda: poisson_field(X, 1.0, SET, labels=LABELS), ValueError, r"\(2,\).*\(4,\)"),
        (lambda: poisson_field(X, 1.0, SET, labels=1), ValueError, "0 … 5 that have.*got 1"),
        (lambda: poisson_field(X, 1.0, SET, labels=6), ValueError, "0 … 5 that have.*got 6"),
        (lambda: poisson_field(X, 1.0, SET, labels=-1), ValueError, "≥ 0, got -1"),
        (lambda: poisson_field(X, 1.0, SET, labels=1.5), TypeError, "integer.*float"),
        (lambda: poisson_field(X, 1.0, SET, labels=-LABELS[:2]), ValueError, "got -2"),
        (lambda: poisson_field(X, 1.0, torch.ones(4, 3), labels=0), ValueError, "labels=.*none"),
        (lambda: poisson_field(X, 1.0, SET[:0], labels=0), ValueError, r"N ≥ 1.*\(0, 3\)"),
        (lambda: SET[2], TypeError, "slice.*int"),
        (lambda: SET[X], TypeError, r"slice.*float32.*\(2, 3\)"),
        (lambda: SET[torch.tensor([9])], IndexError, "9"),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
