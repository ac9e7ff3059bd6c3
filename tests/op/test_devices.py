# SPDX-License-Identifier: Apache-2.0
"""Does everything stay on the device of its inputs, whatever torch's default device is?"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from cases import seeded
from oracle import assert_displacement, float32_contract, solve
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pfgm_kernels
from pfgm_kernels import ReferenceSet, merge, poisson_displacement
from pfgm_kernels.flow import (
    Churn,
    FieldLoss,
    PosteriorMeanLoss,
    Preconditioned,
    UnnormalizedLoss,
    as_denoiser,
    as_field,
    encode,
    heights,
    interpolate,
    log_likelihood,
    log_prior,
    perturb,
    perturb_at,
    query_of_flow_matching,
    rescale,
    sample,
    sample_prior,
)

PACKAGE = Path(pfgm_kernels.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor",
    "tensor", "tril_indices", "triu_indices", "zeros", "Generator",
}  # fmt: skip
ELSEWHERE = "meta"  # holds no data: a value that gets there is not one that can be right


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("d", [3, 40, 200, 300])
@pytest.mark.parametrize("stored", ["tensor", "set", "images"])
def test_the_op(backend, stored, d):
    x0 = images(70, d)
    values = (2 * x0.double() / 255 - 1).float()
    x = values[:5] + 0.3 * torch.randn(5, d, generator=seeded())
    x0, values, x = (each.to(backend.device) for each in (x0, values, x))
    x.requires_grad_()
    with torch.device(ELSEWHERE):
        references = {
            "tensor": lambda: values,
            "set": lambda: ReferenceSet(values, workspace=1 << 20, backend=backend.name),
            "images": lambda: ReferenceSet.from_images(x0, backend=backend.name),
        }[stored]()
        v, log_mass = poisson_displacement(x, 2.0, references, backend=backend.name)
        (gradient,) = torch.autograd.grad(v.sum() + log_mass.sum(), x)
    assert {each.device for each in (v, log_mass, gradient)} == {x.device}
    expected = solve(x.detach().cpu(), 2.0, values.cpu())
    assert_displacement(v.detach().cpu(), expected, float32_contract(backend.name))
    again, log_mass = poisson_displacement(x, 2.0, references, backend=backend.name)
    assert torch.equal(gradient, torch.autograd.grad(again.sum() + log_mass.sum(), x)[0])


def flow_functions(x0: Tensor) -> dict[str, object]:
    """Of each function of the flow a result that is made of tensors, from x0 (B, *event)."""
    generator = torch.Generator("cpu").manual_seed(1)
    d, count = x0[0].numel(), len(x0)
    prior = sample_prior(count, x0.shape[1:], T=3.0, generator=generator)
    infinite = sample_prior(count, x0.shape[1:], T=3.0, D=float("inf"), generator=generator)
    field_fn = copy.copy(lambda x, t: pfgm_kernels.poisson_field(x, t, x0))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), t[:, None]], 1)

    options = {"T": 3.0, "steps": 2, "rtol": 0.1}
    noisy = {"T": 3.0, "steps": 2, "churn": Churn(1)}
    return {
        "churn": sample(field_fn, prior, generator=generator, **noisy).x,
        "seeds": sample(field_fn, prior, seeds=range(count), **noisy).x,
        "per_sample": sample(field_fn, prior, per_sample=True, **options).x,
        "likelihood": log_likelihood(field_fn, x0, generator=generator, **options).log_p,
        "arc": interpolate(x0[0], x0[1], 5),
        "rescaled": rescale(x0, 2.0),
        "prior": prior,
        "infinite": infinite,
        "log_prior": log_prior(prior, T=3.0),
        "gaussian": log_prior(prior, T=3.0, D=float("inf")),
        "perturb": perturb(x0, generator=generator)[1],
        "perturb_at": perturb_at(x0, 0.5, generator=generator),
        "heights": heights(count, D=2, generator=generator),
        "prior by seeds": sample_prior(count, 3, T=2.0, seeds=range(count), device="cpu"),
        "denoiser": as_denoiser(as_field(Preconditioned(lambda x, c: x, D=2)))(x0, 0.3),
        "flow matching": query_of_flow_matching(x0, 0.3)[1],
        "mean's loss": PosteriorMeanLoss(x0, D=8)(lambda x, t: x, x0, generator),
        "loss": FieldLoss(x0)(network, x0, generator),
        "eq_10": UnnormalizedLoss(sigma=1.0)(network, x0, generator),
        "merge": merge([poisson_displacement(x0, 1.0, x0[i::2]) for i in (0, 1)])[0],
        "d": d,
    } | {
        solver: torch.cat(
            [
                sample(field_fn, prior, solver=solver, keep_path=True, **options).path.flatten(),
                encode(field_fn, x0, solver=solver, **options).x.flatten(),
            ]
        )
        for solver in ("euler", "heun", "rk45")
    }


@pytest.mark.parametrize("how", ["with", "set_default_device"])
def test_the_flow(how):
    x0 = torch.rand(6, 2, 3, generator=seeded())
    expected = flow_functions(x0)
    if how == "with":
        with torch.device(ELSEWHERE):
            found = flow_functions(x0)
    else:
        torch.set_default_device(ELSEWHERE)
        try:
            found = flow_functions(x0)
        finally:
            torch.set_default_device(None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name, check_device=True)


def test_a_prior_without_a_generator_is_on_the_default_device_as_torchs_own_draws():
    with torch.device(ELSEWHERE):
        assert sample_prior(2, 3, T=1.0).device.type == ELSEWHERE
        assert sample_prior(2, 3, T=1.0, device="cpu").device.type == "cpu"


def calls_without_device(source: str) -> list[str]:
    """Calls of torch's factories that name no device and are not within `with torch.device(…)`."""
    tree, found = ast.parse(source), []
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.With)]:
        if any("device" in ast.unparse(item.context_expr) for item in block.items):
            block.body.clear()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            name = ast.unparse(call.func)
            if name.startswith("torch.") and call.func.attr in FACTORIES:
                named = call.func.attr == "Generator" and call.args
                if not named and "device" not in {keyword.arg for keyword in call.keywords}:
                    found.append(ast.unparse(call))
    return found


# What `draw_figure` draws it draws with the CPU for default device (tests/figures).
WITHOUT = PACKAGE / "figures"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if WITHOUT not in file.parents)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_allocation_names_its_device(file):
    """One that names none lands on the default device, which is not that of the inputs."""
    assert calls_without_device(file.read_text()) == []


def test_x_and_x0_on_two_devices():
    with FakeTensorMode():  # no GPU is needed for what has no values
        x, x0 = torch.empty(2, 3, device="cuda"), torch.empty(9, 3)
        with pytest.raises(ValueError, match="one device, got cuda:0 and cpu"):
            poisson_displacement(x, 1.0, x0)


def test_the_search_finds_allocations():
    source = (
        "a = torch.empty(3)\nwith torch.device('cpu'):\n  b = torch.zeros(1)\ntorch.Generator()"
    )
    assert calls_without_device(source) == ["torch.empty(3)", "torch.Generator()"]


@pytest.mark.parametrize("build", [ReferenceSet, ReferenceSet.from_images])
@pytest.mark.parametrize(
    "move",
    [
        lambda references: references.cuda(),
        lambda references: references.cuda(0, non_blocking=True),
        lambda references: references.to("cuda", non_blocking=True),
        lambda references: references.to(torch.device("cuda", 0)),
    ],
)
def test_a_set_moves_with_its_workspace_and_backend(build, move):
    """torch's fake tensors know devices that this machine lacks."""
    x0 = images(7, 2, 3)
    x0 = x0.float() if build is ReferenceSet else x0
    references = build(x0, workspace=3 << 20, backend="eager")
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = move(references)
        assert moved.device == torch.device("cuda", 0)
        assert moved.table.device == moved.device
        assert (moved.workspace, moved.backend) == (3 << 20, "eager")
        assert moved.event_shape == references.event_shape
        assert moved.dtype == references.dtype
        assert moved.cuda() is moved
        back = moved.cpu()
        assert back.device == torch.device("cpu")
        assert (back.workspace, back.backend) == (3 << 20, "eager")
        assert back.cpu() is back


def test_nothing_is_prepared_of_what_has_not_arrived(monkeypatch):
    """A copy to the CPU that does not wait is not there yet when its norms are taken."""
    references, waits = ReferenceSet(torch.rand(7, 3), backend="eager"), []
    to = Tensor.to

    def watched(values: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        waits.append(not non_blocking)
        return to(values, device, non_blocking=non_blocking)

    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(Tensor, "to", watched)
        references.cuda(non_blocking=True).to("cpu", non_blocking=True)
    assert waits == [False, False, True, True]


class Model(torch.nn.Module):
    """As the README has it."""

    def __init__(self, references: ReferenceSet) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.references = references

    def _apply(self, *args):
        super()._apply(*args)
        self.references = self.references.to(next(self.parameters()).device)
        return self


def test_a_module_moves_its_references_along(monkeypatch):
    asked = []
    monkeypatch.setattr(ReferenceSet, "to", lambda self, device: asked.append(device.type) or self)
    model = Model(ReferenceSet(torch.rand(7, 3)))
    model.half().to("meta")
    assert asked == ["cpu", "meta"]
