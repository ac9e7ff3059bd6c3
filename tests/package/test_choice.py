# SPDX-License-Identifier: Apache-2.0
"""Which backend runs where none is asked for, and what does it cost to find out?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from stand_ins import backend, changed
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pfgm_kernels import (
    ReferenceSet,
    choice,
    poisson_displacement,
    poisson_field,
    posterior_mean,
    proof,
    report,
)
from pfgm_kernels.backends import BACKENDS, _native, cuda, triton
from pfgm_kernels.problems import DIMS, FAMILIES, Family, band_of
from pfgm_kernels.proof import Verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
X, X0 = torch.randn(5, 3), torch.randn(9, 3)
IMAGES = torch.arange(27, dtype=torch.uint8).reshape(9, 3)


def double_v(results: tuple[Tensor, ...], *_: Any) -> None:
    results[0].mul_(2)


def double_dx(dvalues: Tensor | None, *arguments: Any) -> None:
    arguments[4].dx.mul_(2)


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, Family, torch.device], Verdict]:
    """Those of this process, none at first; nothing is left to others."""
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "write_bytes", lambda *_: None)
    monkeypatch.setattr(proof, "_file", lambda *_: proof.Path("/nowhere"))
    return proof._verdicts


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, verdicts: dict) -> Callable[..., Counter[str]]:
    """A machine on which kernels come first that stand in for those of Triton, for CPU tensors;
    how often each of their functions was called.
    """

    def prefer(**functions: Callable[..., Any]) -> Counter[str]:
        calls: Counter[str] = Counter()

        def counted(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        module = backend(**functions)
        for name in ("unsupported_reason", "forward", "backward", "prepare"):
            vars(module)[name] = partial(counted, name, vars(module)[name])
        monkeypatch.setitem(BACKENDS, "triton", module)
        monkeypatch.setattr(choice, "preferred", lambda device, band: ("triton", "eager"))
        return calls

    return prefer


# Which


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, verdicts: dict) -> None:
    """All backends for GPUs can run, and all families have proven themselves."""
    for name in ("triton", "cuda"):
        monkeypatch.setattr(BACKENDS[name], "unsupported_reason", lambda *_: None)
        verdicts |= {(name, family, GPU): Verdict(True, "") for family in FAMILIES}


def test_on_a_gpu_what_launches_the_fewest_kernels_comes_first(gpu, monkeypatch):
    choose = partial(choice.choose, None, GPU, codes=False, derivatives=True)
    assert [choose(d) for d in (1, 32, 33, 3072)] == ["cuda", "cuda", "triton", "triton"]
    monkeypatch.setattr(cuda, "unsupported_reason", lambda *_: "no nvcc")
    choice._reason.cache_clear()
    assert [choose(d) for d in (32, 33)] == ["triton", "triton"]
    monkeypatch.setattr(triton, "unsupported_reason", lambda *_: "no triton")
    choice._reason.cache_clear()
    assert [choose(d) for d in (32, 33)] == ["eager", "eager"]


def test_on_a_cpu_nothing_has_to_prove_itself(verdicts):
    order = ["cpu", "eager"]
    assert list(choice.preferred(CPU, 0)) == list(choice.preferred(CPU, 2)) == order
    chosen = choice.choose(None, CPU, 3, codes=False, derivatives=True)
    assert chosen == ("cpu" if cpu_runs() else "eager")
    assert verdicts == {}


def cpu_runs() -> bool:
    return BACKENDS["cpu"].unsupported_reason(CPU) is None


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("failed", [False, True])
def test_a_family_that_failed_leaves_its_calls_to_the_next(gpu, verdicts, codes, failed):
    """And no other family's."""
    family = Family(2, codes, backward=True)
    verdicts["triton", family, GPU] = Verdict(False, "")
    if failed:
        verdicts["cuda", family, GPU] = Verdict(False, "")
    for other in FAMILIES:
        d = DIMS[other.band][0]
        chosen = choice.choose(None, GPU, d, other.codes, other.backward)
        best = "cuda" if other.band == 0 else "triton"
        assert chosen == (("eager" if failed else "cuda") if other == family else best)
    assert choice.choose("triton", GPU, 300, codes, True) == "triton"  # who asks for it gets it


def test_bands_are_the_ranges_that_the_backends_have():
    assert [band_of(d) for d in (1, cuda.MAX_DIRECT_DIM)] == [0, 0]
    assert [band_of(d) for d in (cuda.MAX_DIRECT_DIM + 1, cuda.MAX_THREE_PART_DIM)] == [
        1,
        1,
    ]
    assert band_of(cuda.MAX_THREE_PART_DIM + 1) == 2
    if importlib.util.find_spec("triton") is not None:
        from pfgm_kernels.backends.triton import direct, operands

        assert direct.MAX_DIM == cuda.MAX_DIRECT_DIM
        assert operands.FUSED_MAX_DIM == cuda.MAX_THREE_PART_DIM


# The first call and those that follow


def test_the_first_call_proves_and_the_next_ones_do_not(kernels, verdicts):
    calls = kernels()
    for _ in range(3):
        poisson_field(X, 1.0, X0)
    assert [family for _, family, _ in verdicts] == [Family(0, False, False)]
    proving = calls["forward"] - 3
    x = X.clone().requires_grad_()
    poisson_field(x, 1.0, X0).sum().backward()
    assert [family.backward for _, family, _ in verdicts] == [False, True]
    assert calls["backward"] > 1
    assert calls["forward"] > proving + 4
    before = calls["forward"]
    posterior_mean(X, 1.0, ReferenceSet.from_images(IMAGES))
    assert ("triton", Family(0, True, False), CPU) in verdicts
    assert calls["forward"] > before + 1


def test_what_failed_warns_and_is_not_used(kernels):
    kernels(**changed("forward", double_v))
    with pytest.warns(RuntimeWarning, match="'triton' failed .* tails: displacement off by"):
        field = poisson_field(X, 1.0, X0)
    assert torch.equal(field, poisson_field(X, 1.0, X0, backend="eager"))
    forced = poisson_displacement(X, 1.0, X0, backend="triton")[0]
    assert torch.equal(forced, 2 * poisson_displacement(X, 1.0, X0, backend="eager")[0])


def test_gradients_that_are_wrong_do_not_stand_in_the_way_of_values(kernels):
    calls = kernels(**changed("backward", double_dx))
    x = X.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match="backward.*gradient of x off by"):
        (dx,) = torch.autograd.grad(poisson_field(x, 1.0, X0).sum(), x)
    (expected,) = torch.autograd.grad(poisson_field(x, 1.0, X0, backend="eager").sum(), x)
    assert torch.equal(dx, expected)
    before = calls["forward"]
    with torch.no_grad():
        poisson_field(x, 1.0, X0)
    assert calls["forward"] == before + 1


def test_forward_mode_relies_on_what_is_saved_as_gradients_do(kernels):
    """Which only the check of gradients looks at."""
    calls = kernels(**changed("forward", lambda results, *_: (*results[:3], results[3] - 1)))
    with pytest.warns(RuntimeWarning, match="backward"):
        torch.func.jvp(lambda x: poisson_field(x, 1.0, X0), (X,), (X,))
    before = calls["forward"]
    torch.func.jvp(lambda x: poisson_field(x, 1.0, X0), (X,), (X,))
    assert calls["forward"] == before


def test_a_set_is_prepared_for_what_will_run(kernels, verdicts):
    calls = kernels(prepare=lambda values, table, workspace: [values.clone()])
    references = ReferenceSet(X0)
    assert [*references.operands] == ["triton"]
    before = calls["prepare"]
    poisson_field(X, 1.0, references)
    assert calls["prepare"] == before
    verdicts["triton", Family(0, False, False), GPU] = Verdict(True, "")
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = references.cuda()
    assert [*moved.operands] == ["triton"]


# Reasons


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Counter[str]) -> None:
    function = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def test_reasons_are_found_once(monkeypatch):
    """Of every backend, in the way that a GPU machine takes."""
    calls: Counter[str] = Counter()
    monkeypatch.setattr(choice, "preferred", lambda *_: ("cuda", "triton", "eager"))
    for owner, name in (
        (importlib.util, "find_spec"),
        (importlib.metadata, "version"),
        (triton, "version_of"),
        (torch.cuda, "is_available"),
        (torch.cuda, "get_device_capability"),
        *((module, "unsupported_reason") for module in BACKENDS.values()),
        *([(_native, "cuda_unavailable")] if _native.build_info else []),
    ):
        count(monkeypatch, owner, name, calls)
    poisson_field(X, 1.0, X0, backend="eager")
    references = ReferenceSet(X0)
    for backward in (False, True):
        poisson_field(X, 1.0, X0)
        poisson_field(X.clone().requires_grad_(backward), 1.0, references)
    assert calls["unsupported_reason"] == 3
    calls.clear()
    for _ in range(3):
        poisson_field(X, 1.0, X0)
        poisson_field(X, 1.0, references)
    assert not calls


def test_what_cannot_be_found_out_is_a_reason(kernels):
    def broken(*_):
        raise RuntimeError("the driver and its library do not fit")

    calls = kernels(unsupported_reason=broken)
    for _ in range(3):
        poisson_field(X, 1.0, X0)
    assert calls["unsupported_reason"] == 1
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: RuntimeError: the driver"):
        poisson_field(X, 1.0, X0, backend="triton")
    assert report()["triton"] == "RuntimeError: the driver and its library do not fit"


def test_a_reason_that_has_gone_is_noticed_by_who_asks(kernels):
    reasons = ["it is not installed"]
    kernels(unsupported_reason=lambda *_: reasons[0] if reasons else None)
    poisson_field(X, 1.0, X0)
    with pytest.raises(RuntimeError, match="not installed"):
        poisson_field(X, 1.0, X0, backend="triton")
    assert report()["triton"] == "it is not installed"
    reasons.clear()
    poisson_field(X, 1.0, X0, backend="triton")
    reasons.append("it is not installed")
    assert report()["triton"] == "it is not installed"
    reasons.clear()
    assert report()["triton"].startswith("available")


def test_triton_under_another_name(monkeypatch):
    """A nightly torch brings it as another distribution."""
    pytest.importorskip("triton")

    def version_of(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    found = triton.version()
    monkeypatch.setattr(triton, "version_of", version_of)
    assert triton.version() == found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.version() is None
    assert "not installed" in str(triton.unsupported_reason())


# torch.compile


@pytest.mark.parametrize("asked", [None, "triton"])
@pytest.mark.parametrize("stored", ["tensor", "set"])
def test_a_whole_graph_is_traced_though_reasons_cannot_be(monkeypatch, kernels, asked, stored):
    """Neither the extension nor the self-check can be traced: both are done with beforehand."""
    torch._dynamo.reset()

    def untraceable(*_):
        importlib.metadata.version("torch")
        if _native.build_info:
            _native._C.build_info()  # C++, as `cuda_unavailable` is

    calls = kernels(unsupported_reason=untraceable)
    x0 = X0 if stored == "tensor" else ReferenceSet(X0)
    run = torch.compile(partial(poisson_field, backend=asked), fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo does not know how to trace")
        field = run(x, 1.0, x0)
    torch.testing.assert_close(field, poisson_field(x, 1.0, X0, backend="eager"))
    (dx,) = torch.autograd.grad(field.sum(), x)
    (expected,) = torch.autograd.grad(poisson_field(x, 1.0, X0, backend="eager").sum(), x)
    torch.testing.assert_close(dx, expected)
    proven = {family for name, family, _ in proof._verdicts}
    values = {Family(0, False, False)} if stored == "set" else set()
    assert proven == (values if asked else {Family(0, False, False), Family(0, False, True)})
    before = calls["forward"]
    run(x, 2.0, x0)
    assert calls["forward"] == before + 1


ERRORS = {"gpu": (ValueError, "expects one of"), "cuda": (RuntimeError, "there is no GPU")}


@pytest.mark.parametrize("backend", ERRORS)
def test_errors_of_the_choice_are_those_of_an_ordinary_call(monkeypatch, backend):
    monkeypatch.setattr(cuda, "unsupported_reason", lambda *_: "there is no GPU")
    torch._dynamo.reset()
    run = torch.compile(partial(poisson_field, backend=backend), backend="eager")
    error, message = ERRORS[backend]
    with pytest.raises(error, match=message) as caught:
        run(X, 1.0, X0)
    assert caught.type is error


# The report


def test_the_report_names_every_backend(verdicts):
    states = report()
    assert list(states)[: len(BACKENDS) + 1] == [*BACKENDS, "extension"]
    if not torch.cuda.is_available():
        assert len(states) == len(BACKENDS) + 1


def test_the_report_says_what_is_known_and_checks_when_asked_to(monkeypatch, kernels, verdicts):
    kernels()
    known = Family(1, True, False)
    verdicts["triton", known, CPU] = Verdict(False, "tails: off by 3 × allowed")
    states = report()
    rows = {name: state for name, state in states.items() if name.startswith("triton, ")}
    assert list(rows) == [f"triton, {family}" for family in FAMILIES]
    assert rows.pop(f"triton, {known}") == "FAILED: tails: off by 3 × allowed"
    assert {*rows.values()} == {choice.UNKNOWN}

    checked = []
    monkeypatch.setattr(
        proof, "check", lambda *arguments: checked.append(arguments) or Verdict(True, "all right")
    )
    states = report(check=True)
    assert checked == [("triton", family, CPU) for family in FAMILIES]
    assert all(states[f"triton, {family}"] == "proven: all right" for family in FAMILIES)
    assert states == report()
    assert all(name in str(states) and state in str(states) for name, state in states.items())
