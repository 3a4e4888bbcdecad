"""SPACES: latent spaces by name. Latents of one mean something to one family of decoders alone.

Two models share a space when one's latents may be handed to the other: the same encoder made them,
and the same numbers scale them. Equal channel counts say nothing: SD 1.5's and SDXL's four
channels, Flux.1's and SD 3's sixteen are different numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SPACES", "LatentSpace"]


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """One row of SPACES.

    Attributes:
        title: for people.
        channels: of the latents, before any patching.
        downscale: pixels per latent pixel along a side.
        vae: kind of the part that decodes it, "" where none is recognised.
        scaling: how a model's latents follow from the encoder's: (z - shift) * scale, or mean and
            deviation by channel.
        scaling_factor, shift_factor: those numbers, where a config.json holds them.
        tiny: tiny autoencoder for previews, "" where none is known.
        source: where the numbers stand.
    """

    title: str
    channels: int
    downscale: int
    vae: str
    scaling: str
    source: str
    scaling_factor: float | None = None
    shift_factor: float | None = None
    tiny: str = ""


_DIF = "huggingface/diffusers@58eb52c:src/diffusers/models/autoencoders/"

SPACES: Mapping[str, LatentSpace] = {
    "sd": LatentSpace(
        "Stable Diffusion 1 and 2",
        4,
        8,
        "vae_kl",
        "scale 0.18215",
        "runwayml/stable-diffusion-v1-5: vae/config.json",
        0.18215,
        tiny="taesd",
    ),
    "sdxl": LatentSpace(
        "Stable Diffusion XL",
        4,
        8,
        "vae_kl",
        "scale 0.13025",
        "stabilityai/stable-diffusion-xl-base-1.0: vae/config.json",
        0.13025,
        tiny="taesdxl",
    ),
    "playground_v2.5": LatentSpace(
        "Playground v2.5",
        4,
        8,
        "vae_kl",
        "SDXL's autoencoder, scale 0.5 after a mean and deviation by channel",
        "playgroundai/playground-v2.5-1024px-aesthetic: vae/config.json",
        0.5,
        tiny="taesdxl",
    ),
    "sd3": LatentSpace(
        "Stable Diffusion 3",
        16,
        8,
        "vae_kl",
        "scale 1.5305, shift 0.0609",
        "stabilityai/stable-diffusion-3-medium-diffusers: vae/config.json",
        1.5305,
        0.0609,
        tiny="taesd3",
    ),
    "flux1": LatentSpace(
        "Flux.1",
        16,
        8,
        "vae_kl",
        "scale 0.3611, shift 0.1159",
        "black-forest-labs/FLUX.1-dev: vae/config.json",
        0.3611,
        0.1159,
        tiny="taef1",
    ),
    "flux2": LatentSpace(
        "Flux.2",
        32,
        8,
        "vae_flux2",
        "a batch norm over patches of 2 x 2, in the autoencoder's file",
        f"{_DIF}autoencoder_kl_flux2.py",
        tiny="taef2",
    ),
    "wan21": LatentSpace(
        "Wan 2.1 and Qwen-Image",
        16,
        8,
        "vae_qwen",
        "a mean and deviation by channel",
        f"{_DIF}autoencoder_kl_wan.py and autoencoder_kl_qwenimage.py: one encoder, the same means "
        "and deviations; Qwen-Image's decoder was trained on",
        tiny="taew2_1",
    ),
    "wan22": LatentSpace(
        "Wan 2.2 5B",
        48,
        16,
        "",
        "a mean and deviation by channel",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers: vae/config.json",
    ),
    "hunyuan_video": LatentSpace(
        "HunyuanVideo",
        16,
        8,
        "",
        "scale 0.476986",
        f"{_DIF}autoencoder_kl_hunyuan_video.py",
        0.476986,
    ),
    "hunyuan_video_1.5": LatentSpace(
        "HunyuanVideo 1.5", 32, 16, "", "scale 1.03682", f"{_DIF}autoencoder_kl_hunyuanvideo15.py"
    ),
    "hunyuan_image": LatentSpace(
        "HunyuanImage 2.1",
        64,
        32,
        "",
        "a scale of its own",
        f"{_DIF}autoencoder_kl_hunyuanimage.py",
    ),
    "ltx": LatentSpace(
        "LTX-Video",
        128,
        32,
        "",
        "a mean and deviation by channel",
        f"{_DIF}autoencoder_kl_ltx.py",
    ),
    "ltx2": LatentSpace(
        "LTX-2", 128, 32, "", "a mean and deviation by channel", f"{_DIF}autoencoder_kl_ltx2.py"
    ),
}
