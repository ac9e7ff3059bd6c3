# SPDX-License-Identifier: Apache-2.0
"""Does a ReferenceSet stand for exactly the data it was given, without copying it?"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

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

from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.backends import BACKENDS


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_view_of_floating_point_data(dtype):
    x0 = torch.randn(50, 3, 4, dtype=dtype, generator=seeded())
    references = ReferenceSet(x0)
    assert len(references) == 50
    assert references.event_shape == (3, 4)
    assert references.dtype == dtype
    assert references.device == x0.device
    assert references.values.data_ptr() == x0.data_ptr()
    assert references.nbytes == x0.nbytes
    assert "50 references of shape (3, 4)" in repr(references)
    assert references.to("cpu") is references


def test_a_view_of_images():
    images = codes(50, 3, 4)
    references = ReferenceSet.from_images(images)
    assert len(references) == 50
    assert references.event_shape == (3, 4)
    assert references.dtype == torch.float32
    assert references.values.data_ptr() == images.data_ptr()
    assert references.nbytes == images.nbytes + 256 * 4
    assert "8-bit" in repr(references)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.3, 17.1), (0.0, 255.0)])
def test_pixels_stand_for_rounded_values(low, high):
    """Pixel u is float32(low + (high − low)·u/255), formed in float64 and rounded once."""
    table = ReferenceSet.from_images(codes(2, 3), low, high).table
    expected = [low + (high - low) * u / 255 for u in range(256)]
    assert torch.equal(table, torch.tensor(expected, dtype=torch.float64).float())
    assert table[0].item() == torch.tensor(low).item()
    assert table[255].item() == torch.tensor(high).item()


@pytest.mark.parametrize(("d", "count"), [(1, 600), (3, 513), (20, 300), (64, 65), (784, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_equal_the_floats_they_stand_for(backend, d, count, dtype):
    images = codes(count, d)
    references = ReferenceSet.from_images(images, -2.0, 3.0)
    x0 = (-2 + 5 * images.double() / 255).float()
    x = (0.5 + 1.5 * torch.randn(6, d, generator=seeded())).to(dtype).requires_grad_()
    t = torch.linspace(0.2, 3, 6) * d**0.75
    truth = solve(x, t, x0)
    assert truth.effective_sample_size.max() > 2
    v, log_mass = backend.displacement(x, t, references)
    assert v.dtype == dtype
    tolerance = FLOAT64 if dtype == torch.float64 else float32_contract(backend.name)
    assert_displacement(v.detach(), truth, tolerance)
    assert_log_mass(log_mass.detach(), truth)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    gradient = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    assert_gradients(differentiate(truth, x, x0, g_v, g_m), *gradient)
    v, log_mass = backend.displacement(x, t, x0)
    assert_displacement(v.detach(), truth, tolerance)
    assert_log_mass(log_mass.detach(), truth)


@pytest.mark.parametrize("images", [False, True])
def test_it_is_prepared_once_for_the_backend_asked_for(backend, images, monkeypatch):
    """The op runs there, and cuts what was prepared where its workspace holds less."""
    x0 = codes(2100, 40)
    if images:
        stored = ReferenceSet.from_images(
            x0.to(backend.device), workspace=1 << 20, backend=backend.name
        )
        values = (2 * x0.double() / 255 - 1).float()
    else:
        values = torch.randn(2100, 40, generator=seeded())
        stored = ReferenceSet(values.to(backend.device), workspace=1 << 20, backend=backend.name)
    module = BACKENDS[backend.name]
    reason = module.unsupported_reason(backend.device)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    assert list(stored.operands) == [backend.name]
    kept = stored.values.nbytes + stored.table.nbytes
    assert stored.nbytes == kept + sum(each.nbytes for each in stored.operands[backend.name])
    if stored.operands[backend.name]:
        monkeypatch.setattr(module, "prepare", None)
    x = torch.randn(20, 40, generator=seeded(1), requires_grad=True)
    t = torch.linspace(0.2, 3, 20) * 40**0.75
    truth = solve(x, t, values)
    assert truth.effective_sample_size.max() > 2
    used = []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: used.append(0) or forward(*args))
    v, log_mass = poisson_displacement(x.to(backend.device), t.to(backend.device), stored)
    assert len(used) > 1
    assert_displacement(v.detach().cpu(), truth, float32_contract(backend.name))
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    gradient = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    expected = differentiate(truth, x, values, g_v.cpu(), g_m.cpu())
    assert_gradients(expected, *gradient)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_backend_prepares_once_and_keeps_it(monkeypatch, compiled):
    """Asked for in a call; `nbytes` counts it, and one that ran before is not prepared again."""
    x0, x = torch.randn(50, 40, generator=seeded()), torch.ones(3, 40)
    stored, prepared, work = ReferenceSet(x0, backend="cpu"), [], BACKENDS["eager"].prepare
    cpu, nbytes = stored.operands["cpu"], stored.nbytes

    def prepare(values, table, workspace):
        prepared.append(workspace)
        return [*work(values, table, workspace), torch.ones(5)]

    monkeypatch.setattr(BACKENDS["eager"], "prepare", prepare)
    run = poisson_displacement
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for t in (1.0, 2.0, 3.0):
        v, _ = run(x, t, stored, backend="eager")
        assert_displacement(v, solve(x, t, x0), 1e-6)
        run(x, t, stored)
    assert prepared == [x0.nbytes]
    assert stored.operands["cpu"] is cpu
    assert stored.nbytes == nbytes + 20


def test_calls_of_several_threads_prepare_once(monkeypatch):
    stored, prepared = ReferenceSet(torch.randn(50, 40, generator=seeded())), []

    def prepare(values, table, workspace):
        time.sleep(0.05)
        prepared.append(threading.get_ident())
        return []

    monkeypatch.setattr(BACKENDS["eager"], "prepare", prepare)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(stored.operands_for, "eager") for _ in range(8)]
        assert [call.result() for call in calls] == [[]] * 8
    assert len(prepared) == 1


@pytest.mark.parametrize("images", [False, True])
def test_another_device_changes_nothing_else(images, monkeypatch):
    """The CPU, for a set that says it is elsewhere."""
    options = {"workspace": 3 << 20, "backend": "eager"}
    build = ReferenceSet.from_images if images else ReferenceSet
    stored = build(codes(9, 2, 3) if images else torch.randn(9, 2, 3), **options)
    monkeypatch.setattr(ReferenceSet, "device", torch.device("meta"))
    moved = stored.to("cpu")
    assert moved is not stored
    assert (moved.workspace, moved.backend) == (3 << 20, "eager")
    assert moved.event_shape == (2, 3)
    assert moved.dtype == stored.dtype
    assert torch.equal(moved.values, stored.values)
    assert torch.equal(moved.table, stored.table)
    assert list(moved.operands) == ["eager"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_references_become_float32(backend, dtype):
    x0 = torch.randn(100, 3, generator=seeded()).to(dtype)
    references = ReferenceSet(x0)
    assert references.dtype == torch.float32
    x = torch.randn(4, 3, generator=seeded())
    v, _ = backend.displacement(x, 0.5, references)
    assert v.dtype == torch.float32
    assert_displacement(v, solve(x, 0.5, x0), float32_contract(backend.name))


def test_a_non_contiguous_source(backend):
    x0 = torch.randn(6, 200, generator=seeded()).T
    images = codes(6, 200).T
    x = torch.randn(4, 6, generator=seeded())
    for references, values in (
        (ReferenceSet(x0), x0),
        (ReferenceSet.from_images(images), (2 * images.double() / 255 - 1).float()),
        (ReferenceSet(x0[::2]), x0[::2]),
        (ReferenceSet(torch.ones(1, 6).expand(30, 6)), torch.ones(30, 6)),
    ):
        v, _ = backend.displacement(x, 1.0, references)
        assert_displacement(v, solve(x, 1.0, values), float32_contract(backend.name))


def test_it_is_constant_under_autograd(backend):
    x0 = torch.randn(20, 3, requires_grad=True)
    with pytest.raises(ValueError, match="not require grad"):
        ReferenceSet(x0)
    v, log_mass = backend.displacement(torch.zeros(2, 3), 1.0, ReferenceSet(x0.detach()))
    assert not v.requires_grad
    assert not log_mass.requires_grad


def test_inputs_are_not_written_to(backend):
    images, x0 = codes(70, 40), torch.randn(70, 40, generator=seeded())
    x, t = torch.randn(5, 40, generator=seeded()), torch.linspace(1, 5, 5)
    inputs = [x, t, x0, images]
    before = [tensor.clone() for tensor in inputs]
    x.requires_grad_(), t.requires_grad_()
    for references in (ReferenceSet(x0), ReferenceSet.from_images(images), x0):
        v, log_mass = backend.displacement(x, t, references)
        (v.sum() + log_mass.sum()).backward()
    assert all(torch.equal(now, old) for now, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ReferenceSet([[1.0]]), TypeError, "tensor.*list"),
        (
            lambda: ReferenceSet(torch.ones(3, 2, dtype=torch.int64)),
            TypeError,
            "int64.*from_images",
        ),
        (lambda: ReferenceSet(codes(3, 2)), TypeError, "uint8"),
        (lambda: ReferenceSet(torch.ones(2, 3, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: ReferenceSet(torch.ones(3, 2), backend="gpu"), ValueError, "eager.*'gpu'"),
        (lambda: ReferenceSet(torch.ones(())), ValueError, r"N ≥ 1.*\(\)"),
        (lambda: ReferenceSet(torch.ones(0, 3)), ValueError, r"N ≥ 1.*\(0, 3\)"),
        (lambda: ReferenceSet(torch.ones(3, 0)), ValueError, r"\(3, 0\)"),
        (lambda: ReferenceSet(torch.ones(3, 2), workspace=1000), ValueError, "workspace.*1000"),
        (lambda: ReferenceSet(torch.ones(3, 2), workspace=1e9), TypeError, "workspace.*float"),
        (lambda: ReferenceSet.from_images(torch.ones(3, 2)), TypeError, "uint8.*float32"),
        (lambda: ReferenceSet.from_images([1, 2]), TypeError, "images.*tensor.*list"),
        (lambda: ReferenceSet.from_images(codes(0, 2)), ValueError, r"\(0, 2\)"),
        (lambda: ReferenceSet.from_images(codes(3), 1.0, 1.0), ValueError, "low < high"),
        (lambda: ReferenceSet.from_images(codes(3), high=float("inf")), ValueError, "finite"),
        (lambda: ReferenceSet.from_images(codes(3), low=float("nan")), ValueError, "low.*NaN"),
    ],
)
def test_bad_input_raises(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_the_default_backend_takes_it():
    x0 = torch.randn(9, 2, 2, generator=seeded())
    v, _ = poisson_displacement(torch.zeros(3, 2, 2), 1.0, ReferenceSet(x0))
    assert_displacement(v, solve(torch.zeros(3, 2, 2), 1.0, x0), 1e-6)


def test_a_set_may_be_prepared_within_a_transform(backend):
    """Where the first call that names a backend is one of torch.func's, and others follow."""
    x0, x = torch.randn(50, 40, generator=seeded()), torch.randn(3, 40, generator=seeded(1))
    stored = ReferenceSet(x0.to(backend.device), backend="eager")
    field, _ = torch.func.jvp(lambda x: backend.field(x, 9.0, stored), (x,), (x,))
    assert torch.equal(backend.field(x, 9.0, stored), field)
    assert stored.nbytes > 0
