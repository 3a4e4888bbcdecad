"""Stable Diffusion XL base and its distilled relatives (SSD-1B, Vega, KOALA, Playground v2.5)."""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures import clip_text, openclip_text, unet, vae_kl
from diffquant.convert.architectures.base import Architecture, Family, Latent, Sampling, Variant

__all__ = ["SCHEDULER", "SDXL", "VAE"]

# stabilityai/stable-diffusion-xl-base-1.0, and the refiner's: vae, scheduler
VAE: Mapping[str, object] = {
    **vae_kl.SDXL_DEFAULTS,
    "force_upcast": True,
}
SCHEDULER: Mapping[str, object] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}

_KOALA: Mapping[str, object] = {"layers_per_block": 1}
_FULL: Mapping[str, object] = {
    "in_channels": 4,
    "_depths": (0, 2, 10),
    "_middle_depth": 10,
    "layers_per_block": 2,
}

SDXL = Architecture(
    slug="sdxl",
    title="Stable Diffusion XL",
    components=(
        unet.component(
            {
                "use_linear_projection": (True,),
                "_added": (True,),
                "_deepest_attention": (True,),
            }
        ),
        vae_kl.component(("first_stage_model.", "vae.")),
        clip_text.component(
            ("conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.")
        ),
        openclip_text.component(
            ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
            name="text_encoder_2",
            folder="text_encoder_2",
        ),
    ),
    variants=(
        Variant("inpainting", {"in_channels": 9}, "9 input channels: inpainting"),
        Variant("ip2p", {"in_channels": 8}, "8 input channels: instruction editing"),
        Variant(
            "playground_v2.5",
            {},
            "edm_mean and edm_std are there: Playground v2.5, EDM preconditioning",
            keys=("edm_mean", "edm_std"),
        ),
        Variant("v_prediction", {}, "marker key v_pred is there: v-prediction", keys=("v_pred",)),
        Variant("lcm", {"_guided": True}, "an embedding of the guidance scale: a full LCM"),
        Variant("ssd_1b", {"_depths": (0, 2, 4)}, "transformer depths 0, 2, 4: SSD-1B"),
        Variant("vega", {"_depths": (0, 1, 2)}, "transformer depths 0, 1, 2: Segmind Vega"),
        Variant(
            "koala_700m", {**_KOALA, "_depths": (0, 2, 5)}, "transformer depths 0, 2, 5: KOALA-700M"
        ),
        Variant(
            "koala_1b", {**_KOALA, "_depths": (0, 2, 6)}, "transformer depths 0, 2, 6: KOALA-1B"
        ),
        Variant(
            "base",
            _FULL,
            "4 input channels, full depth: base; Turbo, Lightning, Playground v2 and v-prediction "
            "fine-tunes have the same names and shapes and cannot be told from it",
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
    gguf_architecture="sdxl",
    gguf_prefix="model.diffusion_model.",
    reshapes=True,
    latent=Latent(4, 8, 0.13025, space="sdxl"),
    variant_spaces={"playground_v2.5": "playground_v2.5"},
    sampling={
        "": Sampling(
            30,
            5.0,
            None,
            "dpmpp_2m",
            "karras",
            1024,
            1024,
            "StableDiffusionXLPipeline defaults (scale)",
        ),
        "playground_v2.5": Sampling(
            50, 3.0, None, "dpmpp_2m", "edm", 1024, 1024, "playground-v2.5 model card"
        ),
    },
    hyper_defaults={
        # stabilityai/stable-diffusion-xl-base-1.0: config.json of each part
        "denoiser": {
            **unet.DEFAULTS,
            "attention_head_dim": (5, 10, 20),
            "addition_time_embed_dim": 256,
            "sample_size": 128,
        },
        "vae": VAE,
        "text_encoder": clip_text.CLIP_L_DEFAULTS,
        "text_encoder_2": openclip_text.BIGG_DEFAULTS,
        "scheduler": SCHEDULER,
    },
    variant_defaults={
        # playgroundai/playground-v2.5-1024px-aesthetic: scheduler, vae config.json
        "playground_v2.5": {
            "scheduler": {
                "_class_name": "EDMDPMSolverMultistepScheduler",
                "sigma_data": 0.5,
                "sigma_min": 0.002,
                "sigma_max": 80.0,
            },
            "vae": {
                "scaling_factor": 0.5,
                "latents_mean": (-1.6574, 1.886, -1.383, 2.5155),
                "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
            },
        },
        "v_prediction": {"scheduler": {"prediction_type": "v_prediction"}},
    },
)
