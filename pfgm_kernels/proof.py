# SPDX-License-Identifier: Apache-2.0
"""Whether kernels do on the device at hand what `eager` does there.

A family of kernels (a range of d; references as floats or in 8 bits; forward or backward) is used
unasked only once it has proven itself: `check` compares it with `eager` on the `problems`, small
and nasty ones, at the tolerances of the contract, in poisoned memory, on a stream of its own, three
times with the same bits. The verdict stays in memory and in the user's cache folder, for as long as
device, versions and sources stay the same.

float64 queries belong to the family of their d and their references: the same kernels finish the
float32 queries that float32 does not do for. So each family has problems in float64.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pfgm_kernels.backends import BACKENDS, _native, triton
from pfgm_kernels.backends._values import decode
from pfgm_kernels.chunks import Chunks, Inputs, Saved, field_backward, field_forward
from pfgm_kernels.files import write_bytes
from pfgm_kernels.outputs import Output

BANDS = ("d ≤ 32", "32 < d ≤ 128", "d > 128")
DIMS = ((3, 32), (33, 128), (129, 300))
"""Of each band: few columns, and as many as it has or an odd number of tiles."""


class Family(NamedTuple):
    band: int
    """Of `BANDS`."""
    codes: bool
    """The references are in 8 bits."""
    backward: bool

    def __str__(self) -> str:
        stored, direction = ("float", "8-bit")[self.codes], ("forward", "backward")[self.backward]
        return f"{BANDS[self.band]}, {stored}, {direction}"


FAMILIES = tuple(starmap(Family, product(range(len(BANDS)), (False, True), (False, True))))


def band_of(d: int) -> int:
    return 0 if d <= 32 else 1 if d <= 128 else 2


class Problem(NamedTuple):
    x: Tensor
    t: Tensor
    x0: Tensor
    D: float = 1
    strict: bool = False
    """It is in the contract's stricter column at any d."""
    values_grad: bool = False
    """Gradients of x0 are asked for, too, unless it is in 8 bits."""
    cut: bool = False
    """The workspace is so small that the references are cut into chunks."""

    def tensors(self, family: Family, device: torch.device) -> list[Tensor]:
        """x, t, values, table, and cotangents of the displacement and of the log mass."""
        values, table = encode(self.x0) if family.codes else (self.x0, self.x0.new_empty(0).float())
        g, g_log_mass = self.x.nan_to_num(1, 1).cos(), self.t.nan_to_num(1).sin()
        return [each.to(device) for each in (self.x, self.t, values, table, g, g_log_mass)]


def problems(family: Family) -> dict[str, Problem]:
    """By name, on the CPU; the same ones whenever they are asked for."""
    generator = torch.Generator("cpu").manual_seed(family.band)
    few, many = DIMS[family.band]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    def even(start: float, end: float, count: int) -> Tensor:
        return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")

    def stored(x0: Tensor) -> Tensor:
        return decode(*encode(x0)).float() if family.codes else x0

    def heights(count: int, d: int, D: float = 1) -> Tensor:
        """t from where normal references share the weight down to where a few have it."""
        widest = math.sqrt((1 if math.isinf(D) else d + D) * math.sqrt(2 * d))
        return widest * even(1, 0.35, count)

    offset = stored(100 + 2e-3 * normal(300, few))
    amid = offset[:16] + 1e-3 / math.sqrt(few) * normal(16, few)

    # Three references that almost coincide; and sixteen on a sphere, equally far from its centre,
    # which are more that have much of the weight than a pass lists for a query in one tile.
    near, centre = 1e-3 / math.sqrt(few), normal(1, few)
    clusters = normal(130, few)
    clusters[70:72] = clusters[0] + near * normal(2, few)
    clusters[33:49] = centre + torch.nn.functional.normalize(normal(16, few), dim=1)
    clusters = stored(clusters)
    within = torch.cat([clusters[[0, 70, 71]].mean(0).expand(6, few), centre.expand(6, few)])
    within = within + near * normal(12, few)
    spread = 10 ** even(-0.5, 0.5, 6)

    # On references, at t = 0 on one that is there twice; and rows that are no numbers.
    points = stored(normal(100, few))
    points[60] = points[3]
    on, above = points[:14].clone(), 10 ** even(-5, 4, 14)
    on[9, few // 2], on[11, 0], above[12], above[[0, 3]] = math.nan, math.inf, math.nan, 0

    finer = normal(20, few).double() / 3
    crowds, far = stored(normal(4, few)).repeat(66, 1), even(10, 300, 12)
    return {
        "tails": Problem(normal(131, many), heights(131, many), stored(normal(277, many))),
        "one": Problem(normal(1, few), heights(1, few), stored(normal(1, few)), values_grad=True),
        "chunks": Problem(
            *(normal(3, many), heights(3, many, math.inf), stored(normal(500, many))),
            D=math.inf,
            cut=True,
        ),
        "offset": Problem(amid, 2e-3 * heights(16, few), offset),
        "clusters": Problem(
            within, torch.cat([1e-3 * math.sqrt(few) * spread, spread]), clusters, strict=True
        ),
        "points": Problem(on, above, points, strict=True),
        "crowds": Problem(normal(12, few), far * few**0.25, crowds, D=1e4, values_grad=True),
        "float64": Problem(finer, heights(20, few), normal(99, few) + finer[:1], values_grad=True),
        "float64 queries": Problem(finer, heights(20, few), stored(normal(99, few))),
    }


def encode(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 close to x0 (N, d), exactly where it is what codes stand for, and their table."""
    low, high = x0.amin().double(), x0.amax().double()
    steps = torch.arange(256, dtype=torch.float64, device=x0.device)
    codes = ((x0.double() - low) / (high - low) * 255).round().to(torch.uint8)
    return codes, (low + (high - low) * steps / 255).float()


FRESH = (torch.empty, torch.empty_like, Tensor.new_empty)
"""What backends take memory by."""
RUNS = 3


class _Poison(TorchFunctionMode):
    """Memory that nothing has written to is NaN, and −1 in integers: an index that stays near."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in FRESH:
            unsigned = result.dtype == torch.uint8
            result.fill_(math.nan if result.is_floating_point() else 255 if unsigned else -1)
        return result


@functools.cache
def _aside(device: torch.device) -> Any:
    """A stream that is not the default one; always the same, since memory stays with a stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _late(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that the current stream makes after a pause: other streams find poison there."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if tensors[0].device.type == "cuda":
        torch.cuda.synchronize(tensors[0].device)
        torch.cuda._sleep(20_000_000)  # cycles: longer than it takes to launch a call's kernels
    return [copy.copy_(tensor) for copy, tensor in zip(copies, tensors, strict=True)]


def _run(
    backend: str, problem: Problem, family: Family, tensors: list[Tensor]
) -> dict[str, Tensor]:
    """What the backend makes of the problem's tensors, by name."""
    x, t, values, table, g, g_log_mass = _late(tensors)
    module, output = BACKENDS[backend], Output("displacement", 0, 1)
    operands = module.prepare(values, table, values.nbytes)
    inputs = Inputs(x, t, values, table, operands, x.shape[1] + problem.D)
    workspace = 1 << 28
    while problem.cut and workspace > 1 and len(Chunks(inputs, workspace, module).references) == 1:
        workspace //= 2
    v, log_mass, *saved = field_forward(inputs, output, family.backward, workspace, backend)
    if not family.backward:
        return {"displacement": v, "log_mass": log_mass}
    values_grad = problem.values_grad and not family.codes
    arguments = (g, g_log_mass, values_grad, workspace, backend)
    gradients = field_backward(inputs, output, Saved(*saved), *arguments)
    names = ("gradient of x", "gradient of t", *(("gradient of x0",) if values_grad else ()))
    return dict(zip(names, gradients, strict=False))


def _allowed(problem: Problem, tensors: list[Tensor]) -> dict[str, Tensor]:
    """What each row of a result may be off by, by the contract: a share of the sum of the absolute
    values of its terms. Those too small to be summed may be missing.
    """
    x, t, values, table, g, g_log_mass = tensors
    k, x0 = x.shape[1] + problem.D, decode(values, table)
    distances = torch.cdist(x.double(), x0, compute_mode="donot_use_mm_for_euclid_dist")
    squares, heights = distances.square(), t[:, None].abs()
    nearest = squares.amin(1, keepdim=True)
    if math.isinf(k):
        rates, stretch = 0.5 / heights.square(), 2 * squares / heights
        depths = (squares - nearest) * rates
    else:
        rates, stretch = k / 2 / (squares + heights.square()), 2 * heights
        depths = k / 2 * ((squares - nearest) / (nearest + heights.square())).log1p()
    weights = (-depths).softmax(1)
    least = weights.amax(1, keepdim=True) / len(x0)

    def terms(tolerance: float) -> Tensor:
        missing = weights < min(tolerance, math.exp(-16)) * least
        return torch.where(missing, weights, tolerance * weights).nan_to_num(0)

    share, size = terms(1e-5), g.double().norm(dim=1, keepdim=True)
    mean = (weights * distances).sum(1, keepdim=True)
    slopes = share * (size * (distances + mean) + g_log_mass[:, None].abs()) * rates
    slopes = slopes.nan_to_num(0, 0)
    tolerance = 1e-6 if problem.strict or x.shape[1] <= 16 else 5e-6
    tolerance = 1e-10 if x.dtype == torch.float64 else tolerance
    return {
        "displacement": (terms(tolerance) * distances.hypot(heights)).sum(1),
        "log_mass": torch.full_like(t, 1e-6),
        "gradient of x": 1e-5 * size[:, 0] + 2 * (slopes * distances).sum(1),
        "gradient of t": (slopes * stretch).sum(1),
        "gradient of x0": (share * size + 2 * slopes * distances).sum(0),
    }


def _errors(found: Tensor, expected: Tensor, allowed: Tensor, family: Family) -> Tensor:
    """The error of each row beside what is allowed on top of the rounding of the result."""
    info = torch.finfo(found.dtype)
    found, expected = (each.double().reshape(len(each), -1) for each in (found, expected))
    error = (found - expected).abs().where(found != expected, 0.0)  # infinite ones, too
    right = found.isnan() | family.backward  # gradients of what is NaN may be anything
    error = error.where(~(expected.isnan() & right), 0.0)
    rounding = info.eps / 2 * expected.norm(dim=1).nan_to_num(0, 0) + info.tiny
    return error.norm(dim=1).nan_to_num(math.inf) / (allowed.nan_to_num(0, 0) + rounding)


class Verdict(NamedTuple):
    passed: bool
    figures: str

    def __str__(self) -> str:
        return f"{'proven' if self.passed else 'FAILED'}: {self.figures}"


def check(backend: str, family: Family, device: torch.device) -> Verdict:
    """Runs the family on all problems. What it raises is its failure, but for want of memory.

    Raises:
        torch.OutOfMemoryError: nothing was found out.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what failed before is not ours
    began, worst, faults, name = time.perf_counter(), 0.0, [], ""
    try:
        with _Poison(), torch.cuda.stream(_aside(device)):
            for name, problem in problems(family).items():
                tensors = problem.tensors(family, device)
                expected, allowed = (
                    _run("eager", problem, family, tensors),
                    _allowed(problem, tensors),
                )
                runs = [_run(backend, problem, family, tensors) for _ in range(RUNS)]
                for what, result in runs[0].items():
                    errors = _errors(result, expected[what], allowed[what], family)
                    error, row = (each.item() for each in errors.max(0))
                    worst = max(worst, error)
                    if error > 1:
                        faults.append(f"{name}: {what} off by {error:.2g} × allowed in row {row}")
                    if not all(_same_bits(result, run[what]) for run in runs):
                        faults.append(f"{name}: {what} differs from run to run")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, of a launch, or of the driver
        faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
    if faults:
        return Verdict(False, f"{'; '.join(faults[:3])}; {len(faults)} faults in all"[:2000])
    seconds = time.perf_counter() - began
    return Verdict(True, f"errors up to {worst:.0%} of what is allowed, in {seconds:.1f} s")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (a, b)))


DRIVER = Path("/proc/driver/nvidia/version")
_verdicts: dict[tuple[str, Family, torch.device], Verdict] = {}
_proving = threading.Lock()


def proven(backend: str, family: Family, device: torch.device) -> bool:
    """Whether the family may be used unasked. Has it proven where nothing is known of it, and warns
    once where it failed.

    Raises:
        RuntimeError: nothing is known of it, and a CUDA graph is captured.
    """
    key = backend, family, device
    if key not in _verdicts:
        with _proving:
            if key not in _verdicts:
                found = recall(*key)
                gpu = device.type == "cuda"
                if found is None and gpu and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"backend {backend!r} has yet to prove itself on {device} for {family}, "
                        "which a CUDA graph cannot capture: call the op once before the capture"
                    )
                found = _verdicts[key] = found or prove(*key)
                if not found.passed:
                    warnings.warn(
                        f"backend {backend!r} failed its self-check on {device} for {family} and "
                        f"is used there only where it is asked for: {found.figures}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
    return _verdicts[key].passed


def prove(backend: str, family: Family, device: torch.device) -> Verdict:
    """Checks the family, whatever is known of it, and keeps the verdict.

    In a thread of its own, where nothing holds that the caller's may be within: tracing with fake
    tensors, a transform, autocast, inference mode, another default device.
    """
    thread = ThreadPoolExecutor(1)
    try:
        verdict = thread.submit(check, backend, family, device).result()
    except torch.OutOfMemoryError:
        return Verdict(False, "there was not enough memory to find out")
    finally:
        thread.shutdown(wait=False)  # an interrupt is not to wait for it
    _verdicts[backend, family, device] = verdict
    with suppress(OSError, RuntimeError):  # a home that is not there, or not writable
        content = {"environment": environment(device), **verdict._asdict()}
        write_bytes(_file(backend, family, device), json.dumps(content, indent=1).encode())
    return verdict


def recall(backend: str, family: Family, device: torch.device) -> Verdict | None:
    """What is known of the family here, or was left by another process."""
    found = _verdicts.get((backend, family, device))
    if found is None:
        with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):
            content = json.loads(_file(backend, family, device).read_bytes())
            passed, figures = content["passed"], content["figures"]
            if content["environment"] == environment(device) and isinstance(passed, bool):
                found = Verdict(passed, str(figures))
    return found


def _file(backend: str, family: Family, device: torch.device) -> Path:
    """One for each verdict: processes that prove at once take nothing from one another."""
    parent = os.environ.get("XDG_CACHE_HOME") or ""
    folder = Path(parent) if os.path.isabs(parent) else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(environment(device)).encode()).hexdigest()
    return folder / "pfgm_kernels" / digest[:16] / f"{backend}, {family}.json"


def environment(device: torch.device) -> dict[str, str]:
    """All that a verdict holds for."""
    found = {
        "torch": torch.__version__,
        "triton": triton.version() or "",
        "sources": _sources(),
        "device": str(device.type),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found["driver"] = DRIVER.read_text() if DRIVER.exists() else ""
    return found


@functools.cache
def _sources() -> str:
    """A digest of the backends, of what joins their results, of this file and of the extension."""
    package = Path(__file__).parent
    files = sorted(package.glob("backends/**/*.py"))
    files += [package / f"{name}.py" for name in ("chunks", "merge", "outputs", "proof")]
    if _native.missing_reason is None:
        files.append(Path(str(_native._C.__file__)))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
