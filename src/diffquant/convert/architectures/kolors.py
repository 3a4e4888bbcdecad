"""Kolors: SDXL's UNet with a projection from ChatGLM3's width, LDM names for the rest."""

from __future__ import annotations

from diffquant.convert.architectures import (
    unet,
    vae_kl,
)
from diffquant.convert.architectures.base import (
    Architecture,
    Family,
    Keep,
    Latent,
    Sampling,
    Variant,
)

__all__ = ["KOLORS"]

# Kwai-Kolors/Kolors-diffusers: unet, vae, scheduler config.json
KOLORS = Architecture(
    slug="kolors",
    title="Kolors",
    components=(
        unet.component(
            {"use_linear_projection": (True,), "_added": (True,), "_deepest_attention": (True,)},
            text_projection=True,
        ),
        vae_kl.component(("first_stage_model.", "vae.")),
    ),
    variants=(
        Variant("inpainting", {"in_channels": 9}, "9 input channels: inpainting"),
        Variant("", {}, "a projection of ChatGLM3's features: Kolors"),
    ),
    keep=(
        *unet.KEEP,
        Keep(
            r"^encoder_hid_proj\.",
            "text input, and detection reads its width",
            "huggingface/diffusers@58eb52c:src/diffusers/models/unets/unet_2d_condition.py",
        ),
    ),
    families=(Family("v", unet.FAMILY_V), Family("ffn_down", unet.FFN_DOWN)),
    gguf_architecture="sdxl",
    gguf_prefix="model.diffusion_model.",
    gguf_note=(
        "GGUF readers know Kolors as sdxl at most: none of them reads encoder_hid_proj or ChatGLM3"
    ),
    reshapes=True,
    latent=Latent(4, 8, 0.13025, space="sdxl"),
    sampling={
        "": Sampling(
            50, 5.0, None, "euler", "normal", 1024, 1024, "KolorsPipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        "denoiser": {
            **unet.DEFAULTS,
            "attention_head_dim": (5, 10, 20),
            "addition_time_embed_dim": 256,
            "encoder_hid_dim_type": "text_proj",
            "sample_size": 128,
        },
        "vae": vae_kl.SDXL_DEFAULTS,
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.014,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1100,
            "prediction_type": "epsilon",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_karras_sigmas": False,
        },
    },
)
