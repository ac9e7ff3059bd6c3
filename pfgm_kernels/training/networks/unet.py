# SPDX-License-Identifier: Apache-2.0
"""U-Nets of diffusers for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PRESETS: dict[str, dict[str, Any]] = {
    # About a million parameters. It sees images in half the resolution, four pixels as four
    # channels: as good, four times as fast, so that a CPU trains it.
    "unet": {
        "patch": 2,
        "block_out_channels": (48, 80),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    # What corresponds to DDPM++ on CIFAR-10: 128 channels, four levels of (1, 2, 2, 2), four blocks
    # a level, attention at 16x16 by one head, dropout.
    "ddpmpp": {
        "patch": 1,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 4,
        "norm_num_groups": 32,
        "attention_head_dim": None,
        "dropout": 0.1,
    },
}


class UNet(nn.Module):
    """A preset of `UNet2DModel` for images (B, h, w) or (B, c, h, w).

    It is called as every network here, (x (B, *event), noise_condition (B,), labels (B,) or none)
    -> (B, *event), and with `height` also gives the t-component of a field, (B,): the mean of one
    more channel, as in the published networks.

    Raises ValueError for events that are no images, or whose sides the preset cannot halve.
    """

    def __init__(
        self, preset: str, event_shape: Sequence[int], *, num_classes: int = 0, height: bool = False
    ) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        options = dict(PRESETS[preset])
        self.patch, self.height = options.pop("patch"), height
        halvings = self.patch * 2 ** (len(options["block_out_channels"]) - 1)
        if len(event_shape) not in (2, 3) or any(side % halvings for side in event_shape[-2:]):
            raise ValueError(
                f"the network {preset} expects images (h, w) or (c, h, w) whose sides are "
                f"multiples of {halvings}, got events of shape {tuple(event_shape)}"
            )
        channels = 1 if len(event_shape) == 2 else event_shape[0]
        self.unet: Any = UNet2DModel(
            in_channels=channels * self.patch**2,
            out_channels=(channels + height) * self.patch**2,
            num_class_embeds=num_classes or None,
            **options,
        )

    def forward(
        self, x: Tensor, noise_condition: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        images = x[:, None] if x.dim() == 3 else x
        patches = pixel_unshuffle(images, self.patch)
        output = pixel_shuffle(self.unet(patches, noise_condition, labels).sample, self.patch)
        if self.height:
            return output[:, :-1].reshape(x.shape), output[:, -1].flatten(1).mean(dim=1)
        return output.reshape(x.shape)
