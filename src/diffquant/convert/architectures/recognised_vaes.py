"""Autoencoders that are recognised and never rewritten: of videos, of Sana, of sound.

Marks and channels: Comfy-Org/ComfyUI@35ead00:comfy/sd.py, VAE.__init__; Diffusers names of the
classes in huggingface/diffusers@58eb52c:src/diffusers/models/autoencoders/.
"""

from __future__ import annotations

from diffquant.convert.architectures.base import Variant
from diffquant.convert.architectures.recognised import Known

__all__ = ["HUNYUAN", "HUNYUAN_15", "KNOWN_VAES", "LTX", "WAN_22"]

_CAUSAL = ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight")
_CAUSAL_LATENTS = (("decoder.conv_in.conv.weight", 1),)
_LATENTS = (("decoder.conv_in.weight", 1),)

WAN_22 = Known(
    "vae_wan22",
    "autoencoder of Wan 2.2 or Qwen-Image 2.1",
    {
        "canonical": (
            "encoder.down_blocks.0.resnets.0.norm1.gamma",
            "decoder.up_blocks.0.resnets.0.norm1.gamma",
            "decoder.mid_block.attentions.0.to_qkv.weight",
            "decoder.norm_out.gamma",
            "post_quant_conv.weight",
        ),
        "alternate": (
            "conv1.weight",
            "conv2.weight",
            "encoder.conv1.weight",
            "decoder.middle.0.residual.0.gamma",
            "decoder.upsamples.0.upsamples.0.residual.2.weight",
        ),
    },
    sizes={"z_dim": (("post_quant_conv.bias", 0), ("conv2.bias", 0))},
    members=(
        Variant("48_channels", {"z_dim": 48}, "48 latent channels: Wan 2.2 TI2V 5B"),
        Variant("64_channels", {"z_dim": 64}, "64 latent channels: Qwen-Image 2.1"),
    ),
)
LTX = Known(
    "vae_ltx",
    "autoencoder of LTX-Video",
    {
        "canonical": (*_CAUSAL, "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"),
        "diffusers": (*_CAUSAL, "latents_mean", "decoder.mid_block.resnets.0.conv1.conv.weight"),
    },
    sizes={"latent_channels": _CAUSAL_LATENTS},
    where={"latent_channels": (128,)},
    members=(Variant("128_channels", {}, "128 latent channels: LTX-Video or LTX-2"),),
)
HUNYUAN = Known(
    "vae_hunyuan_video",
    "autoencoder of HunyuanVideo",
    {
        "canonical": (*_CAUSAL, "post_quant_conv.weight", "decoder.mid.block_1.norm1.weight"),
        "diffusers": (
            *_CAUSAL,
            "post_quant_conv.weight",
            "decoder.mid_block.resnets.0.norm1.weight",
        ),
    },
    sizes={"latent_channels": _CAUSAL_LATENTS},
    members=(Variant("16_channels", {"latent_channels": 16}, "16 latent channels: HunyuanVideo"),),
)
HUNYUAN_15 = Known(
    "vae_hunyuan_15",
    "autoencoder of HunyuanVideo 1.5 or of HunyuanImage's refiner",
    {"canonical": (*_CAUSAL, "decoder.norm_out.gamma")},
    sizes={"latent_channels": _CAUSAL_LATENTS},
    where={"latent_channels": (32,)},
    members=(
        Variant(
            "32_channels",
            {},
            "32 latent channels: HunyuanVideo 1.5 and HunyuanImage's refiner have the same names "
            "and shapes and cannot be told apart",
        ),
    ),
)

KNOWN_VAES: tuple[Known, ...] = (
    WAN_22,
    LTX,
    HUNYUAN,
    HUNYUAN_15,
    Known(
        "vae_hunyuan_image",
        "autoencoder of HunyuanImage 2.1",
        {
            "diffusers": (
                "encoder.conv_in.weight",
                "encoder.down_blocks.0.norm1.weight",
                "decoder.up_blocks.0.norm1.weight",
                "decoder.mid_block.resnets.0.norm1.weight",
            )
        },
        sizes={"latent_channels": _LATENTS},
        members=(Variant("64_channels", {"latent_channels": 64}, "64 latent channels, 32 pixels"),),
    ),
    Known(
        "vae_dc",
        "deep compression autoencoder",
        {
            "canonical": (
                "encoder.project_out.0.conv.weight",
                "decoder.project_in.conv.weight",
                "decoder.stages.1.op_list.0.main.conv.conv.bias",
            ),
            "diffusers": (
                "encoder.down_blocks.0.0.conv1.weight",
                "encoder.conv_out.weight",
                "decoder.conv_in.weight",
                "decoder.norm_out.weight",
            ),
        },
        sizes={"latent_channels": (*_LATENTS, ("decoder.project_in.conv.weight", 1))},
        members=(
            Variant("32_channels", {"latent_channels": 32}, "32 latent channels: Sana (f32c32)"),
            Variant("128_channels", {"latent_channels": 128}, "128 latent channels (f64c128)"),
            Variant("512_channels", {"latent_channels": 512}, "512 latent channels (f128c512)"),
        ),
    ),
    Known(
        "vae_cogvideox",
        "autoencoder of CogVideoX",
        {"canonical": (*_CAUSAL, "decoder.mid_block.resnets.0.norm1.norm_layer.weight")},
        sizes={"latent_channels": _CAUSAL_LATENTS},
        members=(Variant("16_channels", {"latent_channels": 16}, "16 latent channels"),),
    ),
    Known(
        "vae_mochi",
        "autoencoder of Mochi",
        {
            "canonical": ("decoder.blocks.2.blocks.3.stack.5.weight",),
            "alternate": ("blocks.2.blocks.3.stack.5.weight",),
            "gguf": ("layers.4.layers.1.attn_block.attn.qkv.weight",),
            "diffusers": ("encoder.proj_in.weight", "decoder.block_in.resnets.0.conv1.conv.weight"),
        },
        members=(Variant("12_channels", {}, "12 latent channels"),),
    ),
    Known(
        "vae_cosmos",
        "autoencoder of Cosmos 1",
        {
            "canonical": ("decoder.unpatcher3d.wavelets",),
            "diffusers": ("encoder.conv_in.conv_s.weight", "decoder.conv_in.conv_s.weight"),
        },
    ),
    Known(
        "vae_svd",
        "KL autoencoder with a decoder of videos (Stable Video Diffusion)",
        {
            "canonical": ("encoder.conv_in.weight", "decoder.mid.block_1.mix_factor"),
            "diffusers": ("encoder.conv_in.weight", "decoder.time_conv_out.weight"),
        },
        sizes={"latent_channels": _LATENTS},
        members=(Variant("4_channels", {"latent_channels": 4}, "4 latent channels"),),
        prefixes=("first_stage_model.",),
    ),
    Known(
        "vae_allegro",
        "autoencoder of Allegro",
        {"diffusers": ("encoder.temp_conv_in.weight", "decoder.temp_conv_in.weight")},
        sizes={"latent_channels": _LATENTS},
    ),
    Known(
        "vae_consistency",
        "consistency decoder of SD 1.x",
        {"diffusers": ("encoder.conv_in.weight", "decoder_unet.conv_in.weight")},
    ),
    Known(
        "vae_cascade",
        "autoencoder of Stable Cascade (stage A)",
        {"canonical": ("vquantizer.codebook.weight",)},
    ),
    Known(
        "vae_oobleck",
        "autoencoder of sound (Oobleck, as in Stable Audio)",
        {
            "canonical": (
                "decoder.layers.1.layers.0.beta",
                "encoder.layers.1.layers.0.layers.0.beta",
            ),
            "diffusers": ("encoder.conv1.weight_g", "decoder.block.0.snake1.alpha"),
        },
    ),
    Known(
        "vae_tiny_video",
        "tiny autoencoder of videos (TAEHV)",
        {"canonical": ("encoder.0.weight", "decoder.1.weight", "decoder.22.bias")},
        sizes={"latent_channels": (("decoder.1.weight", 1),)},
        members=(
            Variant(
                "16_channels",
                {"latent_channels": 16},
                "16 latent channels: HunyuanVideo, Wan 2.1 or Qwen-Image, not told apart",
            ),
            Variant("48_channels", {"latent_channels": 48}, "48 latent channels: Wan 2.2 TI2V 5B"),
        ),
    ),
)
