"""Stable Diffusion 1.x and its distilled relatives (BK-SDM, small-sd, tiny-sd, SDXS)."""

from __future__ import annotations

from diffquant.convert.architectures import clip_text, unet, vae_kl
from diffquant.convert.architectures.base import Architecture, Family, Latent, Sampling, Variant

__all__ = ["SD15"]

_SCHEDULER = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5: scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}

SD15 = Architecture(
    slug="sd15",
    title="Stable Diffusion 1.x",
    components=(
        unet.component({"_generation": (1,), "_added": (False,)}),
        vae_kl.component(("first_stage_model.", "vae.")),
        clip_text.component(
            (
                "cond_stage_model.transformer.",
                "cond_stage_model.",
                "text_encoders.clip_l.transformer.",
            )
        ),
    ),
    variants=(
        Variant("inpainting", {"in_channels": 9}, "9 input channels: inpainting"),
        Variant(
            "zero123",
            {"in_channels": 8},
            "8 input channels and cc_projection: Zero123, views of an object",
            keys=("cc_projection.weight",),
        ),
        Variant("ip2p", {"in_channels": 8}, "8 input channels: instruction editing"),
        Variant(
            "sdxs",
            {"_middle": 0, "_first_attention": False},
            "no middle block, no attention at full resolution: SDXS",
        ),
        Variant(
            "bk_sdm_tiny",
            {"_middle": 0, "_levels": 3},
            "three levels and no middle block: BK-SDM-Tiny, which tiny-sd has the structure of",
        ),
        Variant("lcm", {"_guided": True}, "an embedding of the guidance scale: a full LCM"),
        Variant("bk_sdm_small", {"_middle": 0}, "no middle block: BK-SDM-Small"),
        Variant(
            "bk_sdm_base",
            {"layers_per_block": 1},
            "one resnet per level: BK-SDM-Base, which small-sd has the structure of",
        ),
        Variant(
            "base",
            {"in_channels": 4, "_depths": (1, 1, 1, 0), "layers_per_block": 2, "_middle": 2},
            "4 input channels, full depth",
        ),
        Variant(
            "",
            {"in_channels": 4, "_width": 320},
            "320 wide, and not as deep as the base: pruned, or an unlisted member of the family",
        ),
        Variant("base", {"in_channels": 4}, "4 input channels, of a width nobody has published"),
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
            25,
            7.5,
            None,
            "dpmpp_2m",
            "karras",
            512,
            512,
            "stable-diffusion-v1-5 model card (scale)",
        ),
        "sdxs": Sampling(
            1, 1.0, None, "euler", "normal", 512, 512, "IDKiro/sdxs-512-0.9 model card"
        ),
    },
    hyper_defaults={
        # stable-diffusion-v1-5/stable-diffusion-v1-5: unet, vae, text_encoder config.json
        "denoiser": {**unet.DEFAULTS, "attention_head_dim": 8, "sample_size": 64},
        "vae": {**vae_kl.DEFAULTS, "sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": clip_text.CLIP_L_DEFAULTS,
        "scheduler": _SCHEDULER,
    },
    variant_defaults={  # nota-ai/bk-sdm-small and others: unet/config.json
        name: {"denoiser": {"mid_block_type": None}}
        for name in ("sdxs", "bk_sdm_tiny", "bk_sdm_small")
    },
)
