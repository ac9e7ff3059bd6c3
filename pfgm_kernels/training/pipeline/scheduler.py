# SPDX-License-Identifier: Apache-2.0
"""The sampling ODE as a scheduler of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from pfgm_kernels._checks import integer
from pfgm_kernels.flow import grid, sample_prior
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.flow.grid import T_MIN
from pfgm_kernels.flow.solvers import step
from pfgm_kernels.training.pipeline.model import as_json

ORDERS = {"euler": 1, "heun": 2}
Generators = torch.Generator | Sequence[torch.Generator] | None


class PoissonFlowScheduler(SchedulerMixin, ConfigMixin):
    """The steps of the sampling ODE, dx/dt = F_x / F_t from t = T to 0, as `sample` takes them.

    n inference steps are n of the solver from T to t_min, between the heights of `grid`, and the
    final one of Euler to t = 0: n + 1 timesteps of euler, 2n + 1 of heun.

    Args:
        T: > t_min, where sampling starts, in the units of x.
        D: > 0, dimensions added to the data's; of the prior.
        t_min: > 0, where the solver ends; None is the noise level 1e-3, as of `pfgm sample`.
        solver: heun or euler. (What adapts its steps does not fit into such a loop: for rk45 there
            is `pfgm_kernels.flow.sample`.)
        rho: of the grid, 7 for EDM's; None for equal ratios.

    Attributes:
        timesteps: float64, the heights at which the model is to be evaluated, in this order.
    """

    order = 1
    timesteps: Tensor

    @register_to_config
    def __init__(
        self,
        T: float,
        D: float | str = 1.0,
        t_min: float | None = None,
        solver: str = "heun",
        rho: float | None = None,
    ) -> None:
        self.register_to_config(D=as_json(D))
        if solver not in ORDERS:
            raise ValueError(f"solver expects one of {', '.join(ORDERS)}, got {solver!r}")
        self.order = ORDERS[solver]
        self.set_timesteps(50)

    @property
    def init_noise_sigma(self) -> float:
        """T, the standard deviation of the prior of D = ∞. Raises ValueError for a finite D, whose
        prior is no Gaussian.
        """
        if math.isfinite(D := float(self.config.D)):
            raise ValueError(
                f"the prior of D = {D:g} is not Gaussian: expected a draw of "
                "scheduler.sample_prior, got one that asks for its standard deviation"
            )
        return float(self.config.T)

    def sample_prior(
        self,
        count: int,
        event_shape: int | Sequence[int],
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """``count`` draws (count, *event_shape) of the prior on the plane t = T, on ``device``.

        generator: drawn from on its own device; or as many as draws, for each its own: it is then
        the same in any batch. Raises ValueError for another number of them.
        """
        T, D = self.config.T, float(self.config.D)
        if generator is None or isinstance(generator, torch.Generator):
            where = device if generator is None else None
            x = sample_prior(count, event_shape, T=T, D=D, generator=generator, device=where)
            return x.to(device=device, dtype=dtype)
        if len(generator) != integer("count", count):
            raise ValueError(f"generator expects one, or {count} in a list, got {len(generator)}")
        draws = [sample_prior(1, event_shape, T=T, D=D, generator=each) for each in generator]
        return torch.cat(draws).to(device=device, dtype=dtype)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Begins anew, with so many steps ≥ 1.

        device: of `timesteps`; None for the CPU, where reading one does not wait for a GPU.
        """
        config = self.config
        t_min = T_MIN * root_of(float(config.D)) if config.t_min is None else config.t_min
        steps = integer("num_inference_steps", num_inference_steps)
        self._heights = [*grid(config.T, t_min, steps + 1, config.rho).tolist(), 0.0]
        first, *later = self._heights[:-1]
        times = [first, *(t for t in later for _ in range(self.order))]
        self.timesteps = torch.tensor(times, dtype=torch.float64, device=device or "cpu")
        self.num_inference_steps = steps
        self._begun: tuple[float, Tensor, Tensor] | None = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample itself: the model scales what its network sees."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:  # SchedulerOutput | tuple[Tensor]
        """What to evaluate the model at next, (B, *event).

        Args:
            model_output: dx/dt (B, *event) at (sample, timestep).
            timestep: the next of `timesteps`; the first may be any.
            sample: (B, *event). In the second half of a step of Heun the state before the first
                one is gone back to.

        Raises ValueError for a timestep out of turn.
        """
        t = float(timestep)
        begun, self._begun = self._begun, None
        if begun is not None:
            t_before, before, first = begun
            self._expect(t, [self._next(t_before)])
            # The package's own step of Heun, which is told the two slopes that it asks for.
            end = step(_told(first, model_output), before, t_before, t, 2)
        else:
            self._expect(t, self._heights[:-1])
            t_next = self._next(t)
            end = step(_told(model_output), sample, t, t_next, 1)
            if self.order == 2 and t_next > 0:
                self._begun = t, sample, model_output
        return SchedulerOutput(prev_sample=end) if return_dict else (end,)

    def _next(self, t: float) -> float:
        return self._heights[self._heights.index(t) + 1]

    @staticmethod
    def _expect(t: float, heights: Sequence[float]) -> None:
        if t not in heights:
            wanted = f"{heights[0]:g}" if len(heights) == 1 else "one of scheduler.timesteps"
            raise ValueError(f"timestep expects {wanted}, got {t:g}")


def _told(*slopes: Tensor) -> Callable[..., Tensor]:
    """A slope that is not evaluated but known already, in the order of the evaluations."""
    remaining = iter(slopes)
    return lambda x, t, rows: next(remaining)
