# SPDX-License-Identifier: Apache-2.0
"""Does a ReferenceSet notice that its references were edited after it was prepared? And does a
call with a tensor answer for what that holds?
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import seeded
from oracle import assert_displacement, float32_contract, solve
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pfgm_kernels import ReferenceSet, poisson_displacement, poisson_field
from pfgm_kernels.flow import FieldLoss

EDITED = r"^ReferenceSet expects its references as .* edited since$"
EDITS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda y: y.mul_(2),
    "one value": lambda y: y.view(-1)[3].add_(1),
    "a row": lambda y: y.__setitem__(0, 7),
    "through a view": lambda y: y[2:4].zero_(),
    "detached": lambda y: y.detach().add_(1),
    "copied over": lambda y: y.copy_(y.flip(0)),
}


def in_a_thread(y: Tensor) -> None:
    thread = threading.Thread(target=lambda: y.data.mul_(2))
    thread.start()
    thread.join()


UNSEEN: dict[str, Callable[[Tensor], object]] = {
    "data": lambda y: y.data.mul_(2),
    "one value of the data": lambda y: y.data.view(-1)[77].add_(1),
    "NumPy": lambda y: y.numpy().__imul__(2),
    "other storage": lambda y: y.set_(y.flip(0) * 2),
    "other storage of the data": lambda y: setattr(y, "data", y.flip(0) * 2),
    "resized": lambda y: y.resize_(2 * len(y), y.shape[1]).copy_(stored(y.dtype, *y.shape)),
    "fewer": lambda y: y.resize_(len(y) // 2, y.shape[1]),
    "a swap": lambda y: torch.utils.swap_tensors(y, y.flip(0) * 2),
    "another thread": in_a_thread,
}
"""Edits that no version, no address or neither tells of."""


def stored(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(1, 100, shape, generator=seeded()).to(dtype)


def prepare(y: Tensor, **options) -> ReferenceSet:
    build = ReferenceSet.from_images if y.dtype == torch.uint8 else ReferenceSet
    return build(y, **options)


def with_gradients(x: Tensor, references: ReferenceSet) -> None:
    v, log_mass = poisson_displacement(x.requires_grad_(), 1.0, references)
    (v.sum() + log_mass.sum()).backward()


def move(x: Tensor, references: ReferenceSet) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # knows devices that this machine lacks
        references.cuda()


CALLS: dict[str, Callable[[Tensor, ReferenceSet], object]] = {
    "field": lambda x, references: poisson_field(x, 1.0, references),
    "displacement": lambda x, references: poisson_displacement(x, torch.ones(4), references),
    "eager": lambda x, references: poisson_field(x, 1.0, references, backend="eager"),
    "gradients": with_gradients,
    "loss": lambda x, references: FieldLoss(references)(lambda x, t: x, x),
    "move": move,
    "copy": lambda x, references: copy.deepcopy(references),
    "pickle": lambda x, references: pickle.dumps(references),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize(("edit", "d"), [(edit, d) for edit in EDITS for d in (3, 40)])
def test_an_edit_is_noticed(edit, dtype, d):
    y = stored(dtype, 9, d)
    y.add_(1)  # before the set is made, as much as one likes
    references, x = prepare(y), torch.ones(4, d)
    poisson_field(x, 1.0, references)
    EDITS[edit](y)
    with pytest.raises(RuntimeError, match=EDITED):
        poisson_field(x, 1.0, references)


@pytest.mark.parametrize("call", CALLS)
def test_by_every_call(call):
    y = stored(torch.float32, 9, 2, 3)
    references, x = ReferenceSet(y), torch.ones(4, 2, 3)
    y.mul_(0.5)
    with pytest.raises(RuntimeError, match="edited"):
        CALLS[call](x, references)


def test_edits_that_are_no_concern_of_the_set(backend):
    """It holds a copy, it is prepared anew, or the edit came before."""
    x = torch.rand(4, 6, generator=seeded())
    for dtype, layout in ((torch.float16, 0), (torch.bfloat16, 0), (torch.float32, 1)):
        y = torch.rand(9, 6, generator=seeded()).to(dtype)
        y = y.T.contiguous().T if layout else y
        expected = solve(x, 1.0, y.clone())
        references = ReferenceSet(y)
        y.zero_()
        v, _ = backend.displacement(x, 1.0, references)
        assert_displacement(v, expected, float32_contract(backend.name))
    y = torch.rand(9, 6, generator=seeded())
    ReferenceSet(y)
    y.mul_(0.5)
    for references in (ReferenceSet(y), y):
        v, _ = backend.displacement(x, 1.0, references)
        assert_displacement(v, solve(x, 1.0, y), float32_contract(backend.name))


@pytest.mark.parametrize("d", [3, 40, 100])
@pytest.mark.parametrize("edit", EDITS | UNSEEN)
def test_a_tensor_is_what_it_holds(edit, d, backend):
    """Nothing that was prepared of it is taken for it. Integers are images, which are encoded; so
    far away all of them have weight, by what was prepared.
    """
    x, y = torch.rand(4, d, generator=seeded()), stored(torch.float32, 200, d)
    for _ in range(3):
        v, _ = backend.displacement(x, 300.0, y)
        assert_displacement(v, solve(x, 300.0, y), float32_contract(backend.name))
        (EDITS | UNSEEN)[edit](y)


@pytest.mark.parametrize("d", [3, 40])
def test_other_tensors_at_the_same_address(d, backend):
    x, memory = torch.rand(4, d, generator=seeded()), stored(torch.float32, 400, d).numpy()
    for rows in (slice(0, 200), slice(0, 200), slice(0, 100), slice(200, 400)):
        memory[:200] = memory[rows].repeat(200 // len(memory[rows]), axis=0) * 2
        y = torch.from_numpy(memory[:200])
        v, _ = backend.displacement(x, 300.0, y)
        assert_displacement(v, solve(x, 300.0, y), float32_contract(backend.name))
        del y
    base = stored(torch.float32, 400, 2 * d)
    for y in (base[:, :d], base[:, d:], base[::2, :d], base[:, :d]):
        v, _ = backend.displacement(x, 300.0, y)
        assert_displacement(v, solve(x, 300.0, y), float32_contract(backend.name))
        base.data.mul_(2)


def test_copies_count_anew():
    y = stored(torch.float32, 9, 40).add_(1)
    references, x = ReferenceSet(y), torch.ones(4, 40)
    expected = poisson_field(x, 1.0, references)
    copies = copy.deepcopy(references), pickle.loads(pickle.dumps(references))
    y.mul_(0.5)
    for each in copies:
        assert torch.equal(poisson_field(x, 1.0, each), expected)
        each.values.add_(1)
        with pytest.raises(RuntimeError, match="edited"):
            poisson_field(x, 1.0, each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_tensors_without_versions(dtype):
    """What is made in inference mode counts none; what is not, counts there too."""
    with torch.inference_mode():
        y = stored(dtype, 9, 40)
        references = prepare(y)
        inside = poisson_field(torch.ones(4, 40), 1.0, references)
    assert torch.equal(poisson_field(torch.ones(4, 40), 1.0, references), inside)
    y = stored(dtype, 9, 40)
    references = prepare(y)
    with torch.inference_mode():
        y.add_(1)
    with pytest.raises(RuntimeError, match="edited"):
        poisson_field(torch.ones(4, 40), 1.0, references)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_compiled_function_notices(compiler, dtype):
    torch._dynamo.reset()

    @partial(torch.compile, fullgraph=True, backend=compiler)
    def run(x: Tensor, t: float, references: ReferenceSet) -> Tensor:
        return 2 * poisson_field(x, t, references)

    y, x = stored(dtype, 9, 40).add_(1), torch.ones(4, 40)
    references = prepare(y)
    for t in (1.0, 2.0, 3.0):
        expected = 2 * poisson_field(x, t, references)
        torch.testing.assert_close(run(x, t, references), expected)
    y.mul_(0.5) if dtype.is_floating_point else y.add_(1)
    with pytest.raises(RuntimeError, match=EDITED):
        run(x, 4.0, references)
    again = prepare(y)
    torch.testing.assert_close(run(x, 4.0, again), 2 * poisson_field(x, 4.0, again))
    with torch.inference_mode():
        uncounted = prepare(y.clone())
    torch.testing.assert_close(run(x, 4.0, uncounted), 2 * poisson_field(x, 4.0, again))


def test_an_exported_program_runs_elsewhere():
    y = stored(torch.float32, 9, 3).add_(1)

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.references = ReferenceSet(y)

        def forward(self, x: Tensor) -> Tensor:
            return poisson_field(x, 1.0, self.references)

    x = torch.ones(4, 3)
    exported = torch.export.export(Field(), (x,)).module()
    torch.testing.assert_close(exported(x), Field()(x))
