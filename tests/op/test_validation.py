# SPDX-License-Identifier: Apache-2.0
"""Does bad input raise one clear exception that says what was expected and what came?"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pfgm_kernels import (
    ReferenceSet,
    divergence,
    log_density,
    merge,
    poisson_displacement,
    poisson_field,
    posterior_mean,
    report,
)
from pfgm_kernels.backends import BACKENDS
from pfgm_kernels.flow import FieldLoss, log_prior, perturb, sample

X, X0 = torch.ones(4, 2, 3), torch.zeros(7, 2, 3)
NAN, INF = math.nan, math.inf

# Arguments that replace good ones, the exception, and what its message says.
CALLS = [
    ({"x": [[1.0]]}, TypeError, "x expects a tensor.*list"),
    ({"x": X.long()}, TypeError, "x expects a floating.*int64"),
    ({"x": X.to(torch.complex64)}, TypeError, "x expects a floating.*complex64"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x expects shape .*\(2, 3\).*\(\)"),
    ({"x": torch.ones(4, 3, 2)}, ValueError, r"x expects shape .*\(2, 3\).*\(4, 3, 2\)"),
    ({"x": torch.ones(4, 6)}, ValueError, r"x expects shape .*\(2, 3\).*\(4, 6\)"),
    ({"x": X, "x0": ReferenceSet(torch.ones(5, 6))}, ValueError, r"\(6,\).*\(4, 2, 3\)"),
    ({"x0": [1.0]}, TypeError, "x0 expects a tensor or a ReferenceSet.*list"),
    ({"x0": X0.to(torch.uint8)}, TypeError, "x0 expects a floating.*uint8.*from_images"),
    ({"x0": X0[:0]}, ValueError, r"x0 expects .*N ≥ 1.*\(0, 2, 3\)"),
    ({"x0": torch.tensor(1.0)}, ValueError, r"x0 expects shape .*\(\)"),
    ({"x": torch.ones(4, 0), "x0": torch.ones(7, 0)}, ValueError, r"\(7, 0\)"),
    ({"t": "1"}, TypeError, "t expects a real number.*str"),
    ({"t": None}, TypeError, "t expects a real number.*NoneType"),
    ({"t": True}, TypeError, "t expects a real number.*bool"),
    ({"t": NAN}, ValueError, "t expects.*NaN"),
    ({"t": INF}, ValueError, "t expects a finite number.*inf"),
    ({"t": torch.ones(3)}, ValueError, r"t expects .*\(4,\).*\(3,\)"),
    ({"t": torch.ones(1)}, ValueError, r"t expects .*\(4,\).*\(1,\)"),
    ({"t": torch.ones(4, 1)}, ValueError, r"t expects .*\(4,\).*\(4, 1\)"),
    ({"t": torch.ones(4, dtype=torch.bool)}, TypeError, "t expects real.*bool"),
    ({"t": torch.ones(4, dtype=torch.complex64)}, TypeError, "t expects real.*complex64"),
    ({"t": 0, "D": INF}, ValueError, "t expects a number other than 0.*infinite"),
    ({"D": -1}, ValueError, "D expects a real number ≥ 0.*-1"),
    ({"D": -1e-9}, ValueError, "D expects a real number ≥ 0.*-1e-09"),
    ({"D": -INF}, ValueError, "D expects a real number ≥ 0.*-inf"),
    ({"D": NAN}, ValueError, "D expects.*NaN"),
    ({"D": "1"}, TypeError, "D expects a real number.*str"),
    ({"D": 1 + 1j}, TypeError, "D expects a real number.*complex"),
    ({"backend": "gpu"}, ValueError, "backend expects one of .*eager.*'gpu'"),
]
FIELD_CALLS = [
    ({"gamma": -1e-9}, ValueError, "gamma expects .*≥ 0.*-1e-09"),
    ({"gamma": INF}, ValueError, "gamma expects a finite.*inf"),
    ({"gamma": NAN}, ValueError, "gamma expects.*NaN"),
    ({"gamma": None}, TypeError, "gamma expects a real number.*NoneType"),
    ({"scale": INF}, ValueError, "scale expects a finite.*inf"),
    ({"scale": NAN}, ValueError, "scale expects.*NaN"),
    ({"scale": torch.ones(2)}, TypeError, "scale expects a real number.*Tensor"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CALLS)
@pytest.mark.parametrize("function", [poisson_displacement, poisson_field, divergence])
def test_all_functions(function, arguments, error, message):
    arguments = {"x": X, "t": 1.0, "x0": X0} | arguments
    with pytest.raises(error, match=message):
        function(arguments.pop("x"), arguments.pop("t"), arguments.pop("x0"), **arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), FIELD_CALLS)
def test_the_field_alone(arguments, error, message):
    with pytest.raises(error, match=message):
        poisson_field(X, 1.0, X0, **arguments)


@pytest.mark.parametrize(
    ("partials", "message"),
    [
        ([], "at least one.*none"),
        ([(torch.ones(3, 2), torch.ones(3)), (torch.ones(4, 2), torch.ones(4))], r"\(4, 2\)"),
        ([(torch.ones(3, 2), torch.ones(2))], r"\(3,\).*\(2,\)"),
    ],
)
def test_merge(partials, message):
    with pytest.raises(ValueError, match=f"merge expects.*{message}"):
        merge(partials)


UNFIT: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "meta": (lambda y: y.to("meta"), ValueError, "tensor that holds data, got one on the device"),
    "coo": (lambda y: y.to_sparse(), TypeError, "dense tensor, got a sparse_coo one"),
    "csr": (lambda y: y.to_sparse_csr(), TypeError, "dense tensor, got a sparse_csr one"),
    "mkldnn": (lambda y: y.to_mkldnn(), TypeError, "dense tensor, got a _mkldnn one"),
    "nested": (
        lambda y: torch.nested.nested_tensor(list(y)),
        TypeError,
        "dense tensor, got a nested one",
    ),
    "e4m3": (lambda y: y.to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    "e5m2": (lambda y: y.to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
    "quantized": (
        lambda y: torch.quantize_per_tensor(y, 1.0, 0, torch.quint8),
        TypeError,
        "got torch.quint8",
    ),
    "complex": (lambda y: y.to(torch.complex64), TypeError, "got torch.complex64"),
    "bool": (lambda y: y.bool(), TypeError, "got torch.bool"),
}
ROWS, PLANE = torch.ones(4), torch.ones(4, 3)
TAKERS: dict[str, Callable[[Tensor], object]] = {
    "x": lambda y: poisson_field(y, 1.0, PLANE),
    "x of a set": lambda y: poisson_displacement(y, 1.0, ReferenceSet(PLANE)),
    "x of a divergence": lambda y: divergence(y, 1.0, PLANE),
    "x of a density": lambda y: log_density(y, 1.0, PLANE),
    "x of a mean": lambda y: posterior_mean(y, 1.0, PLANE),
    "x0": lambda y: poisson_field(PLANE, 1.0, y),
    "x0 of a mean": lambda y: posterior_mean(PLANE, 1.0, y),
    "x0 of a set": lambda y: ReferenceSet(y),
    "images": lambda y: ReferenceSet.from_images(y),
    "displacement": lambda y: merge([(PLANE, ROWS), (y, ROWS)]),
    "log_mass": lambda y: merge([(PLANE, y)]),
    "x0 of perturb": lambda y: perturb(y),
    "x0 of a loss": lambda y: FieldLoss(PLANE)(lambda x, t: x, y),
    "x0 of references": lambda y: FieldLoss(y),
    "x of log_prior": lambda y: log_prior(y, T=1.0),
    "x of sample": lambda y: sample(lambda x, t: x, y, T=1.0),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("kind", UNFIT)
def test_tensors_that_no_kernel_can_read(kind, taker):
    make, error, message = UNFIT[kind]
    if taker == "images":
        if kind in ("csr", "mkldnn", "nested"):
            pytest.skip("torch has no such tensors of 8 bits")
        y = PLANE.to(torch.uint8) if kind in ("meta", "coo") else PLANE
    else:
        y = PLANE
    with pytest.raises(error, match=f"^{taker.split()[0]} expects .*{message}"):
        TAKERS[taker](make(y))


@pytest.mark.parametrize("kind", [kind for kind in UNFIT if kind not in ("csr", "nested")])
def test_heights_that_no_kernel_can_read(kind):
    make, error, message = UNFIT[kind]
    with pytest.raises(error, match=f"^t expects .*{message}"):
        poisson_field(PLANE, make(ROWS), PLANE)


@pytest.mark.parametrize("kind", ["meta", "e5m2", "complex", "bool"])
def test_of_no_dimension(kind):
    make, error, message = UNFIT[kind]
    for name in ("t", "D", "scale"):
        arguments = {"t": 1.0, name: make(torch.ones(()))}
        with pytest.raises(error, match=f"^{name} expects .*{message}"):
            poisson_field(PLANE, arguments.pop("t"), PLANE, **arguments)


@pytest.mark.parametrize(
    ("partials", "error", "message"),
    [
        ((PLANE, ROWS), TypeError, "expects .* pairs, got Tensor"),
        ([PLANE], TypeError, "expects .* pairs, got Tensor"),
        ([(PLANE, ROWS, ROWS)], TypeError, "expects .* pairs, got tuple"),
        ([(PLANE, 1.0)], TypeError, "log_mass expects a tensor, got float"),
        ([(ROWS[0], ROWS[0])], ValueError, r"\(B, \*event\)"),
        ([(PLANE, ROWS), None], TypeError, "expects .* pairs, got NoneType"),
    ],
)
def test_merge_takes_pairs_only(partials, error, message):
    with pytest.raises(error, match=message):
        merge(partials)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_cannot_run_says_why(monkeypatch, name):
    monkeypatch.setattr(
        BACKENDS[name], "unsupported_reason", lambda *_: "it lacks a flux capacitor"
    )
    with pytest.raises(RuntimeError, match=f"{name}.*lacks a flux capacitor"):
        poisson_field(X, 1.0, X0, backend=name)
    assert report()[name] == "it lacks a flux capacitor"


def test_without_the_extension_another_backend_is_chosen(monkeypatch):
    from pfgm_kernels.backends import _native

    expected = poisson_field(X, 1.0, X0)
    monkeypatch.setattr(_native, "missing_reason", "the extension is not built")
    assert "not built" in report()["cpu"]
    with pytest.raises(RuntimeError, match=r"cpu.*not built"):
        poisson_field(X, 1.0, X0, backend="cpu")
    torch.testing.assert_close(poisson_field(X, 1.0, X0), expected)


def test_no_backend_at_all(monkeypatch):
    for module in BACKENDS.values():
        monkeypatch.setattr(module, "unsupported_reason", lambda *_: "out of order")
    with pytest.raises(RuntimeError, match=r"no backend.*out of order"):
        poisson_field(X, 1.0, X0)


def test_the_report_names_every_backend():
    states = report()
    assert list(states) == [*BACKENDS, "extension"]
    assert states["eager"] == "available"
    assert all(name in str(states) and state in str(states) for name, state in states.items())
