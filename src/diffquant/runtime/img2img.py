"""Image to image: pictures to latents, and the sizes that pictures are brought to.

The encoder's distribution is sampled, not its mean taken, and noise comes after it from the same
stream: as diffusers does, so that one seed makes one picture in both.
Source: huggingface/diffusers 0.42 pipelines/stable_diffusion/pipeline_stable_diffusion_img2img.py
(prepare_latents) and models/autoencoders/vae.py (DiagonalGaussianDistribution).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffquant.runtime.families.base import device_of
from diffquant.runtime.models.autoencoder import Autoencoder, from_pixels
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.noise import NoiseSource
from diffquant.runtime.strips import Decoding, encode_in

__all__ = ["encode_picture", "resize"]


def encode_picture(
    vae: Autoencoder,
    pictures: Tensor,
    noise: NoiseSource,
    count: int,
    decoding: Decoding | None = None,
) -> Tensor:
    """Encode pictures to latents, drawing one sample for each picture that will be made.

    Args:
        vae: the autoencoder.
        pictures: (1 or B, H, W, 3) in [0, 1].
        noise: streams of the B pictures.
        count: B; a single picture is encoded once and sampled B times.
        decoding: how the autoencoder runs.

    Returns:
        (B, C, h, w) float32 on the autoencoder's device.
    """
    device, dtype = device_of(vae), param_dtype(vae)
    how = decoding or Decoding()
    found = [
        encode_in(vae, one.to("cpu" if how.mode == "host" else device, dtype), how)
        for one in from_pixels(pictures.float())[:, None]
    ]
    mean, spread = (torch.cat(parts).float() for parts in zip(*found, strict=True))
    deviation = torch.exp(0.5 * spread.clamp(-30, 20))
    drawn = noise.draw((count, *mean.shape[1:])).to(device)
    return vae.scale(mean + deviation * drawn).float()


def resize(pictures: Tensor, width: int, height: int) -> Tensor:
    """Resize pictures (B, H, W, 3) in [0, 1] with Lanczos' filter, without rounding to 8 bits."""
    made = [
        [
            np.asarray(
                Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS)
            ).copy()
            for channel in one.permute(2, 0, 1).float().cpu().contiguous().numpy()
        ]
        for one in pictures
    ]
    stacked = torch.from_numpy(np.asarray(made, np.float32))  # (B, 3, height, width)
    return stacked.permute(0, 2, 3, 1).clamp(0, 1).contiguous()
