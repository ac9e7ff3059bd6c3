# SPDX-License-Identifier: Apache-2.0
"""Whether kernels do on the device at hand what `eager` does there.

A family of kernels (a range of d; references as floats or in 8 bits; forward or backward) is used
unasked only once it has proven itself: `check` compares it with `eager` on small and nasty
`problems`, at the tolerances of the contract, in poisoned memory, on a stream of its own, three
times with the same bits. The verdict stays in memory and in the user's cache folder, for as long as
device, versions and sources stay the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pfgm_kernels.backends import BACKENDS, _native, triton
from pfgm_kernels.chunks import Chunks, Inputs
from pfgm_kernels.files import cache_folder, write_bytes
from pfgm_kernels.loops import Saved, field_backward, field_forward
from pfgm_kernels.problems import Family, Problem, allowed_errors, problems

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
    module, output = BACKENDS[backend], problem.output
    operands = module.prepare(values, table, values.nbytes)
    inputs = Inputs(x, t, values, table, operands, x.shape[1] + problem.D)
    workspace = 1 << 28
    while problem.cut and workspace > 1 and len(Chunks(inputs, workspace, module).parts[0][1]) == 1:
        workspace //= 2
    result, log_mass, *saved = field_forward(inputs, output, family.backward, workspace, backend)
    found = {output.name: result, "log_mass": log_mass}
    found = {name: rows for name, rows in found.items() if len(rows)}
    if not family.backward:
        return found
    values_grad = problem.values_grad and not family.codes
    arguments = (g, g_log_mass, values_grad, workspace, backend)
    gradients = field_backward(inputs, output, Saved(*saved), *arguments)
    names = ("gradient of x", "gradient of t", *(("gradient of x0",) if values_grad else ()))
    return found | dict(zip(names, gradients, strict=False))


def _errors(found: Tensor, expected: Tensor, allowed: Tensor, gradient: bool) -> Tensor:
    """The error of each row beside what is allowed on top of the rounding of the result."""
    info = torch.finfo(found.dtype)
    found, expected = (each.double().reshape(len(each), -1) for each in (found, expected))
    error = (found - expected).abs().where(found != expected, 0.0)  # infinite ones, too
    right = found.isnan() | gradient  # gradients of what is NaN may be anything
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
                expected = _run("eager", problem, family, tensors)
                allowed = allowed_errors(problem, tensors)
                runs = [_run(backend, problem, family, tensors) for _ in range(RUNS)]
                for what, result in runs[0].items():
                    gradient = what.startswith("gradient")
                    errors = _errors(result, expected[what], allowed[what], gradient)
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
    digest = hashlib.sha256(json.dumps(environment(device)).encode()).hexdigest()
    return cache_folder() / digest[:16] / f"{backend}, {family}.json"


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
    others = ("chunks", "merge", "outputs", "problems", "proof", "rows")
    files = [*sorted(package.glob("backends/**/*.py")), *(package / f"{o}.py" for o in others)]
    if _native.missing_reason is None:
        files.append(Path(str(_native._C.__file__)))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
