"""The SDXL refiner: one OpenCLIP text encoder, no attention at the first and the last level."""

from __future__ import annotations

from diffquant.convert.architectures import openclip_text, sdxl, unet, vae_kl
from diffquant.convert.architectures.base import Architecture, Family, Latent, Sampling, Variant

__all__ = ["SDXL_REFINER"]

SDXL_REFINER = Architecture(
    slug="sdxl_refiner",
    title="Stable Diffusion XL refiner",
    components=(
        unet.component(
            {
                "use_linear_projection": (True,),
                "_added": (True,),
                "_deepest_attention": (False,),
                "_first_attention": (False,),
            }
        ),
        vae_kl.component(("first_stage_model.", "vae.")),
        openclip_text.component(
            ("conditioner.embedders.0.model.", "text_encoders.clip_g.transformer."),
            name="text_encoder_2",
            folder="text_encoder_2",
        ),
    ),
    variants=(Variant("", {}, "size and aesthetic conditions, no attention at the last level"),),
    keep=unet.KEEP,
    families=(Family("v", unet.FAMILY_V), Family("ffn_down", unet.FFN_DOWN)),
    gguf_architecture="sdxl",
    gguf_prefix="model.diffusion_model.",
    reshapes=True,
    latent=Latent(4, 8, 0.13025, space="sdxl"),
    sampling={
        "": Sampling(
            25, 5.0, None, "dpmpp_2m", "karras", 1024, 1024, "StableDiffusionXLImg2ImgPipeline"
        )
    },
    hyper_defaults={
        # stabilityai/stable-diffusion-xl-refiner-1.0: config.json of each part
        "denoiser": {
            **unet.DEFAULTS,
            "attention_head_dim": (6, 12, 24, 24),
            "addition_time_embed_dim": 256,
            "sample_size": 128,
        },
        "vae": sdxl.VAE,
        "text_encoder_2": openclip_text.BIGG_DEFAULTS,
        "scheduler": sdxl.SCHEDULER,
    },
)
