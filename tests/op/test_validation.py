# SPDX-License-Identifier: Apache-2.0
"""Does bad input raise one clear exception that says what was expected and what came?"""

from __future__ import annotations

import math

import pytest
import torch

from pfgm_kernels import ReferenceSet, merge, poisson_displacement, poisson_field, report
from pfgm_kernels.backends import BACKENDS

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
@pytest.mark.parametrize("function", [poisson_displacement, poisson_field])
def test_both_functions(function, arguments, error, message):
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
