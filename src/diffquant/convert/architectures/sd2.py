"""Stable Diffusion 2.x: the SD1 UNet with linear projections and OpenCLIP-H text."""

from __future__ import annotations

from diffquant.convert.architectures import openclip_text, unet, vae_kl
from diffquant.convert.architectures.base import Architecture, Family, Latent, Sampling, Variant

__all__ = ["SD2"]

_PREDICTION = (
    "whether it predicts the noise (512 pixels) or the velocity (768 pixels) is not in the header: "
    "velocity is assumed where no config says"
)

SD2 = Architecture(
    slug="sd2",
    title="Stable Diffusion 2.x",
    components=(
        unet.component({"_generation": (2,), "_added": (False,)}),
        unet.component(
            {
                "cross_attention_dim": (1024,),
                "projection_class_embeddings_input_dim": (1536, 2048),
            },
            image_class=True,
        ),
        vae_kl.component(("first_stage_model.", "vae.")),
        openclip_text.component(
            ("cond_stage_model.model.", "text_encoders.clip_h.transformer."),
            name="text_encoder",
            folder="text_encoder",
            penultimate=True,
        ),
    ),
    variants=(
        Variant("inpainting", {"in_channels": 9}, "9 input channels: inpainting"),
        Variant(
            "unclip_l",
            {"projection_class_embeddings_input_dim": 1536},
            "embedding of an image, 2 x 768: SD 2.1 unCLIP for CLIP-L; " + _PREDICTION,
        ),
        Variant(
            "unclip_h",
            {"projection_class_embeddings_input_dim": 2048},
            "embedding of an image, 2 x 1024: SD 2.1 unCLIP for OpenCLIP-H; " + _PREDICTION,
        ),
        Variant(
            "marigold",
            {"in_channels": 8},
            "8 input channels: an image beside the noise, as in Marigold's depth and normals",
        ),
        Variant("depth", {"in_channels": 5}, "5 input channels: depth to image"),
        Variant(
            "sdxs",
            {"_middle": 0, "_self_attention": False},
            "no middle block, no self-attention at full resolution: SDXS-0.9",
        ),
        Variant(
            "bk_sdm_tiny",
            {"_middle": 0, "_levels": 3},
            "three levels and no middle block: BK-SDM-v2-Tiny",
        ),
        Variant("bk_sdm_small", {"_middle": 0}, "no middle block: BK-SDM-v2-Small"),
        Variant("bk_sdm_base", {"layers_per_block": 1}, "one resnet per level: BK-SDM-v2-Base"),
        Variant(
            "base",
            {"in_channels": 4, "_depths": (1, 1, 1, 0), "layers_per_block": 2, "_middle": 2},
            _PREDICTION,
        ),
        Variant(
            "",
            {"in_channels": 4, "_width": 320},
            "320 wide, and not as deep as the base: pruned, or an unlisted member of the family; "
            + _PREDICTION,
        ),
        Variant("base", {"in_channels": 4}, _PREDICTION),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=unet.KEEP,
    families=(Family("v", unet.FAMILY_V), Family("ffn_down", unet.FFN_DOWN)),
    gguf_architecture="sd1",
    gguf_prefix="model.diffusion_model.",
    reshapes=True,
    latent=Latent(4, 8, 0.18215, space="sd"),
    sampling={
        "": Sampling(
            25, 7.5, None, "dpmpp_2m", "karras", 768, 768, "stable-diffusion-2-1 model card"
        )
    },
    hyper_defaults={
        # stabilityai/stable-diffusion-2-1: config.json of each part
        "denoiser": {**unet.DEFAULTS, "attention_head_dim": (5, 10, 20, 20), "sample_size": 96},
        "vae": {**vae_kl.DEFAULTS, "sample_size": 768, "scaling_factor": 0.18215},
        "text_encoder": openclip_text.H_DEFAULTS,
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "clip_sample": False,
        },
    },
    variant_defaults={
        name: {"denoiser": {"mid_block_type": None}}
        for name in ("sdxs", "bk_sdm_tiny", "bk_sdm_small")
    },
)
