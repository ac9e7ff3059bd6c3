# SPDX-License-Identifier: Apache-2.0
"""A trained model as a pipeline of diffusers: `export` writes the folder, `from_pretrained` reads
it.

    from pfgm_kernels.training.pipeline import PoissonFlowPipeline
    pipeline = PoissonFlowPipeline.from_pretrained("exported")
    images = pipeline(batch_size=16, generator=torch.Generator().manual_seed(0)).images

What the model gives is dx/dt of the sampling ODE, Eq. (4), whatever its network predicts, and the
scheduler takes the steps of the ODE; timesteps are heights t. Both work in loops of one's own:

    scheduler.set_timesteps(50)
    x = scheduler.sample_prior(16, unet.config.event_shape)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample

The samplers, the encoder and the likelihood of `pfgm_kernels.flow` take `unet.field`.
"""

# Annotations are not put off by an import from __future__ here: diffusers 0.35 looks at them.

import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import is_accelerate_available
from torch import Tensor

from pfgm_kernels._checks import integer, positive, shape_of_event
from pfgm_kernels.files import TEMPORARY, naming
from pfgm_kernels.flow import Substitution, grid, sample_prior
from pfgm_kernels.flow._queries import each_height, points, root_of
from pfgm_kernels.flow._slope import Slope
from pfgm_kernels.flow.grid import T_MIN
from pfgm_kernels.flow.solvers import step
from pfgm_kernels.training import methods, networks
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.networks import own
from pfgm_kernels.training.trainer import load_model

ORDERS = {"euler": 1, "heun": 2}
OUTPUTS = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None


class _Safetensors:
    """Reads weights from safetensors files alone: where there are none, no pickle instead."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Any:
        """As diffusers' own, whose options these are. Raises ValueError for use_safetensors=False,
        and OSError where there are no safetensors files.
        """
        if options.get("use_safetensors") is False:
            raise ValueError("use_safetensors expects True: no pickle is read here, got False")
        options["use_safetensors"] = True
        # Its own default is a warning where accelerate, which it does without, is not installed.
        options.setdefault("low_cpu_mem_usage", is_accelerate_available())
        return super().from_pretrained(folder, **options)  # type: ignore[misc]


class PoissonFlowModel(_Safetensors, ModelMixin, ConfigMixin):
    """A network of `pfgm_kernels.training.networks` and what it predicts.

    Args:
        event_shape, network, predicts, D, sigma_data, gamma, width, depth: as in `TrainConfig`.
        num_classes: of a class-conditional network; 0 is one without classes.
        substitute_below: the t below which the t-component of a network that predicts the field is
            substituted (`Substitution`); None for never.

    With weights of 16 bits the network computes in these; all around it stays float32. Raises
    ValueError for a network that cannot be had. One of the user's own, package.module:factory, has
    to be imported before: what a file names is not imported, as that would run it.
    """

    @register_to_config
    def __init__(
        self,
        event_shape: Sequence[int],
        network: str,
        predicts: str,
        D: float | str = 1.0,
        sigma_data: float = 0.5,
        gamma: float = 0.0,
        num_classes: int = 0,
        width: int = 256,
        depth: int = 4,
        substitute_below: float | None = None,
    ) -> None:
        super().__init__()
        self.register_to_config(D=_as_json(D))
        module, colon, _ = networks.check_name(network).partition(":")
        if colon and module not in sys.modules:
            raise ValueError(
                f"network {network} expects {module} to be imported before it is loaded; "
                "no file has code imported here"
            )
        self.model = networks.build(
            network,
            shape_of_event(event_shape),
            predicts=predicts,
            num_classes=num_classes,
            width=width,
            depth=depth,
            gamma=gamma,
            D=float(D),
            sigma_data=sigma_data,
        )
        self.substitution = (
            None if substitute_below is None else Substitution(gamma, below=substitute_below)
        )

    def field(self, x: Tensor, t: Tensor, **labels: Tensor) -> Tensor:
        """(B, d + 1), the t-component last, at x (B, *event) and t (B,), with labels= (B,) where
        there are classes: what samplers take, together with ``self.substitution``.
        """
        half = self.dtype.itemsize == 2
        with torch.autocast(x.device.type, self.dtype) if half else nullcontext():
            return methods.field_of(self.config, self.model)(x, t, **labels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """dx/dt (B, *event) of Eq. (4), float32 or wider, at the sample (B, *event) and the height
        ``timestep`` > 0, a number, 0-dim or (B,); class_labels (B,) int64.
        """
        x = points(sample, "sample")
        if isinstance(timestep, Tensor) and timestep.dim() == 0 and timestep.device.type == "cpu":
            timestep = timestep.item()  # a number needs no copy that a GPU would be waited for
        t = each_height("timestep", timestep, len(x), x.device)
        labels = {} if class_labels is None else {"labels": class_labels}
        slope = Slope(self.field, x, self.substitution, labels)(x, t)
        return UNet2DOutput(sample=slope) if return_dict else (slope,)


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
        self.register_to_config(D=_as_json(D))
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
        self.timesteps = torch.tensor(times, dtype=torch.float64, device=device)
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


class PoissonFlowPipeline(_Safetensors, DiffusionPipeline):
    """Draws samples of a trained model.

    Args:
        unet: a `PoissonFlowModel`.
        scheduler: a `PoissonFlowScheduler`.
    """

    unet: PoissonFlowModel
    scheduler: PoissonFlowScheduler
    model_cpu_offload_seq = "unet"

    def __init__(self, unet: PoissonFlowModel, scheduler: PoissonFlowScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 50,
        class_labels: int | Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, Tensor]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples, those of `pfgm sample` where batch, seeds, solver, steps and threads are the
        same.

        Args:
            batch_size: number of samples.
            generator: source of the prior's draws, on any device; or one for each sample in a list,
                which then does not depend on its batch.
            num_inference_steps: ≥ 1, see `PoissonFlowScheduler`.
            class_labels: of a class-conditional model: one for all, or one for each sample.
            output_type: pil, np (B, h, w, c), pt (B, c, h, w), both in [0, 1] and float32, or
                latent: (B, *event) as the ODE ends, which does for what are no images.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as (pipeline, index, timestep, {"latents": x}) after each
                evaluation; what it returns may hold other latents (B, *event) to go on from.

        Raises:
            TypeError, ValueError: an argument of the wrong type or out of its range.
            FloatingPointError: samples are not finite.
        """
        shape = tuple(self.unet.config.event_shape)
        if output_type not in OUTPUTS or (output_type != "latent" and len(shape) not in (2, 3)):
            known = ", ".join(OUTPUTS) if len(shape) in (2, 3) else f"latent for events {shape}"
            raise ValueError(f"output_type expects {known}, got {output_type!r}")
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        labels = self._class_labels(class_labels, integer("batch_size", batch_size))
        x = self.scheduler.sample_prior(
            batch_size, shape, generator=generator, device=device, dtype=dtype
        )
        self.scheduler.set_timesteps(num_inference_steps)
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            slope = self.unet(self.scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            x = self.scheduler.step(slope, t, x).prev_sample
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, index, t, {"latents": x}).get("latents", x)
        if broken := int((~x.flatten(1).isfinite().all(1)).sum()):
            raise FloatingPointError(f"samples are not finite: {broken} of {batch_size}")
        self.maybe_free_model_hooks()
        images = x if output_type == "latent" else self._pictures(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _class_labels(self, value: Any, count: int) -> Tensor | None:
        classes = self.unet.config.num_classes
        if not classes:
            if value is not None:
                raise ValueError("class_labels expects None for a model without classes")
            return None
        if value is None:
            raise ValueError(f"class_labels expects classes from 0 to {classes - 1}, got None")
        labels = torch.as_tensor(value, device=self._execution_device)
        if labels.dtype.is_floating_point or labels.shape not in ((), (count,)):
            raise ValueError(
                f"class_labels expects an integer or {count}, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        if not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"class_labels expects classes from 0 to {classes - 1}, got {value}")
        return labels.long().expand(count)

    def _pictures(self, x: Tensor, output_type: str) -> Any:
        # In float64, so that rounding gives the 8 bits that `pfgm sample` saves.
        images = (x.double() / 2 + 0.5).clamp(0, 1)
        images = images[:, None] if images.dim() == 3 else images
        if output_type == "pt":
            return images.to(x.dtype)
        array = images.movedim(1, -1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array.astype("float32")


def pipeline_of(model: torch.nn.Module, config: TrainConfig) -> PoissonFlowPipeline:
    """The pipeline of what `load_model` gave, with its own copy of the weights."""
    substitution = methods.substitution(config)
    unet = PoissonFlowModel(
        event_shape=config.event_shape,
        network=config.network,
        predicts=config.predicts,
        D=config.D,
        sigma_data=config.sigma_data,
        gamma=config.gamma,
        num_classes=config.classes,
        width=config.width,
        depth=config.depth,
        substitute_below=None if substitution is None else substitution.below,
    )
    unet.model.load_state_dict(model.state_dict())
    return PoissonFlowPipeline(unet.eval(), PoissonFlowScheduler(T=config.T, D=config.D))


def export(run: Path, folder: Path, network: str | None = None) -> PoissonFlowPipeline:
    """Writes the model of the finished run in ``run`` as a folder for `from_pretrained`, which is
    whole or not there, and returns its pipeline.

    network: for a run whose network was given from Python: the package.module:factory that makes
    it. Raises FileNotFoundError or ValueError where there is no finished run in ``run``, or
    something in ``folder``.
    """
    config = TrainConfig.read(run)
    if (config.network == networks.OWN) != (network is not None):
        raise ValueError(
            "expected the network as package.module:factory where, and only where, the run's was "
            f"given from Python: got network={config.network} and {network}"
        )
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"{folder} already holds something: name another folder")
    given = None
    if network is not None:
        given = own.make(networks.check_name(network), config.event_shape, config.classes)
    model, config = load_model(run, given)
    pipeline = pipeline_of(model, replace(config, network=network or config.network))
    temporary = folder.with_name(secrets.token_hex(8) + TEMPORARY)
    with naming(folder):
        try:
            pipeline.save_pretrained(temporary)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return pipeline


def _told(*slopes: Tensor) -> Callable[..., Tensor]:
    """A slope that is not evaluated but known already, in the order of the evaluations."""
    remaining = iter(slopes)
    return lambda x, t, rows: next(remaining)


def _as_json(D: float | str) -> float | str:
    """Infinity is no number of JSON: "inf" stands for it in files."""
    value = positive("D", float(D), finite=False)
    return value if math.isfinite(value) else "inf"
