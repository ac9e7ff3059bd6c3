# SPDX-License-Identifier: Apache-2.0
"""A trained model as a pipeline of diffusers: `pfgm export` writes it, `from_pretrained` reads it.

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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from pfgm_kernels._checks import integer
from pfgm_kernels.training.data.dataset import pictures
from pfgm_kernels.training.pipeline.model import PoissonFlowModel, Safetensors
from pfgm_kernels.training.pipeline.scheduler import Generators, PoissonFlowScheduler

__all__ = ["PoissonFlowModel", "PoissonFlowPipeline", "PoissonFlowScheduler"]

OUTPUTS = ("pil", "np", "pt", "latent")


class PoissonFlowPipeline(Safetensors, DiffusionPipeline):
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
            # Filled in on the device: a copy to it would be waited for.
            height = torch.full((len(x),), float(t), dtype=torch.float64, device=device)
            sample = self.scheduler.scale_model_input(x, t)
            slope = self.unet(sample, height, class_labels=labels).sample
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
        images = pictures(x, self.unet.config.low, self.unet.config.high)
        if output_type == "pt":
            return images.to(x.dtype)
        array = images.movedim(1, -1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array.astype("float32")
