"""The four demo pipelines as data: what each part looks like, and how it is sampled.

Block structure, key names, head sizes, rotary axes, latent scales and schedules are those of the
real models; widths and depths are the smallest that still learn the demo grammar and keep a
folder under 10 MB at 16 bits a weight. Where the real model's linear rows divide by 256 (text
contexts, Flux, Qwen-Image), these do too as far as the size allows, so that GGUF K-quants work.
"""

from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Family", "clip_config", "qwen_text_config", "t5_config"]

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One demo pipeline.

    Attributes:
        denoiser: ("unet" or "transformer", its diffusers class, its config).
        vae: (diffusers class, config); its latent constants are the real model's.
        text: part name -> (kind, width-dependent options); see assemble.py.
        dtype: of the saved weights, as a torch name.
        steps, guidance: what the sample sheet uses.
    """

    name: str
    title: str
    pipeline: str
    denoiser: tuple[str, str, Config]
    vae: tuple[str, Config]
    text: dict[str, tuple[str, Config]]
    scheduler: tuple[str, Config]
    sampler: str
    dtype: str
    steps: int
    guidance: float

    @property
    def folder(self) -> str:
        """Name of its folder under examples/."""
        return self.name.replace("_", "-") + "-shapes"


def clip_config(vocab: int, width: int, *, layers: int, inner: int, act: str) -> Config:
    """CLIP text model; heads of 64 and ids as in the published ones (bos, eos last)."""
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 1,
    }


def t5_config(vocab: int, *, width: int, inner: int, layers: int, heads: int) -> Config:
    """T5 v1.1 encoder: gated GELU, heads of 64."""
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": 64,
        "d_ff": inner,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def qwen_text_config(ids: dict[str, int], *, width: int, inner: int, layers: int) -> Config:
    """Qwen2.5-VL with heads of 128, and the smallest vision tower it can be built with."""
    text = {
        "vocab_size": max(ids.values()) + 1,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope_scaling": {
            "type": "default",
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 1,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
        "tokens_per_second": 2,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _kl(channels: list[int], latent_channels: int, **more: Any) -> tuple[str, Config]:
    return "AutoencoderKL", {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 128,
        **more,
    }


_UNET: Config = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_SCALED_LINEAR: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
_FLOW: Config = {
    "num_train_timesteps": 1000,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "use_dynamic_shifting": True,
}
_WIDE_CLIP: Config = {"width": 256, "layers": 1, "inner": 512, "act": "quick_gelu"}
_NARROW_CLIP: Config = {"width": 128, "layers": 2, "inner": 128, "act": "quick_gelu"}

FAMILIES: dict[str, Family] = {
    "sd15": Family(
        name="sd15",
        title="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        denoiser=(
            "unet",
            "UNet2DConditionModel",
            {
                **_UNET,
                "block_out_channels": [64, 64, 64, 64],
                "attention_head_dim": 8,
                "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            },
        ),
        vae=_kl([32, 32, 64, 64], 4, scaling_factor=0.18215),
        text={"text_encoder": ("clip", _WIDE_CLIP)},
        scheduler=(
            "PNDMScheduler",
            # As the published config: without clip_sample, DDIM would clamp latents to [-1, 1].
            {
                **_SCALED_LINEAR,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "clip_sample": False,
            },
        ),
        sampler="DDIMScheduler",
        dtype="float16",
        steps=25,
        guidance=3.0,
    ),
    "sdxl": Family(
        name="sdxl",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        denoiser=(
            "unet",
            "UNet2DConditionModel",
            {
                **_UNET,
                "block_out_channels": [64, 64, 64],
                "attention_head_dim": [1, 1, 1],
                "transformer_layers_per_block": [1, 2, 2],
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 64,
                "projection_class_embeddings_input_dim": 6 * 64 + 128,
                "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            },
        ),
        vae=_kl([32, 32, 64, 64], 4, scaling_factor=0.13025),
        text={
            "text_encoder": ("clip", _NARROW_CLIP),
            "text_encoder_2": ("clip_projection", {**_NARROW_CLIP, "act": "gelu"}),
        },
        scheduler=(
            "EulerDiscreteScheduler",
            {**_SCALED_LINEAR, "interpolation_type": "linear", "use_karras_sigmas": False},
        ),
        sampler="EulerDiscreteScheduler",
        dtype="float16",
        steps=25,
        guidance=3.0,
    ),
    "flux1": Family(
        name="flux1",
        title="FLUX.1-dev",
        pipeline="FluxPipeline",
        denoiser=(
            "transformer",
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 128,
                "num_attention_heads": 2,
                "joint_attention_dim": 256,
                "pooled_projection_dim": 128,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
        ),
        vae=_kl(
            [32, 32, 32, 32],
            16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text={
            "text_encoder": ("clip", {**_NARROW_CLIP, "layers": 1}),
            "text_encoder_2": ("t5", {"width": 256, "inner": 256, "layers": 1, "heads": 2}),
        },
        scheduler=(
            "FlowMatchEulerDiscreteScheduler",
            {**_FLOW, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0},
        ),
        sampler="FlowMatchEulerDiscreteScheduler",
        dtype="bfloat16",
        steps=20,
        guidance=3.5,
    ),
    "qwen_image": Family(
        name="qwen_image",
        title="Qwen-Image",
        pipeline="QwenImagePipeline",
        denoiser=(
            "transformer",
            "QwenImageTransformer2DModel",
            {
                "patch_size": 2,
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 1,
                "attention_head_dim": 128,
                "num_attention_heads": 2,
                "joint_attention_dim": 256,
                "guidance_embeds": False,
                "axes_dims_rope": [16, 56, 56],
            },
        ),
        # latents_mean and latents_std stay diffusers' defaults, which are Qwen-Image's own.
        vae=(
            "AutoencoderKLQwenImage",
            {
                "base_dim": 16,
                "z_dim": 16,
                "dim_mult": [1, 2, 2, 2],
                "num_res_blocks": 1,
                "attn_scales": [],
                "temperal_downsample": [False, True, True],
            },
        ),
        text={"text_encoder": ("qwen", {"width": 256, "inner": 256, "layers": 2})},
        scheduler=(
            "FlowMatchEulerDiscreteScheduler",
            {
                **_FLOW,
                "max_image_seq_len": 8192,
                "max_shift": 0.9,
                "shift": 1.0,
                "shift_terminal": 0.02,
                "time_shift_type": "exponential",
            },
        ),
        sampler="FlowMatchEulerDiscreteScheduler",
        dtype="bfloat16",
        steps=20,
        guidance=3.0,
    ),
}
