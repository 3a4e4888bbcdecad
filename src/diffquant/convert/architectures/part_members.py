"""MEMBERS: which size or relative a part in a file of its own is, told by its shapes.

Of each kind the first row that fits decides; what names and shapes cannot tell is said.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures import vae_tiny
from diffquant.convert.architectures.base import Variant

__all__ = ["MEMBERS"]

MEMBERS: Mapping[str, tuple[Variant, ...]] = {
    "clip_text": (
        Variant("clip_l", {"hidden_size": 768}, "768 wide: CLIP-L"),
        Variant("openclip_h", {"hidden_size": 1024}, "1024 wide: OpenCLIP-H, as SD 2 reads it"),
        Variant("openclip_g", {"hidden_size": 1280}, "1280 wide: OpenCLIP-bigG"),
    ),
    "openclip_text": (
        Variant("openclip_h", {"hidden_size": 1024}, "1024 wide: OpenCLIP-H"),
        Variant("openclip_g", {"hidden_size": 1280}, "1280 wide: OpenCLIP-bigG"),
    ),
    "t5_encoder": (
        Variant(
            "umt5_xxl",
            {"_bias_per_layer": True, "d_model": 4096},
            "position bias in every layer, 4096 wide: UMT5-XXL",
        ),
        Variant(
            "pile_t5_xl",
            {"_bias_per_layer": True, "d_model": 2048},
            "position bias in every layer, 2048 wide: Pile-T5-XL, which AuraFlow reads",
        ),
        Variant("umt5", {"_bias_per_layer": True}, "position bias in every layer: UMT5"),
        Variant("t5_xxl", {"d_model": 4096}, "position bias in the first layer, 4096 wide: XXL"),
        Variant(
            "byt5_small",
            {"d_model": 1472},
            "1472 wide: byT5 small, of characters, which Glyph and HunyuanImage read",
        ),
        Variant(
            "mt5_xl",
            {"d_model": 2048, "vocab_size": 250112},
            "2048 wide, 250112 tokens: mT5-XL, which HunyuanDiT reads",
        ),
        Variant("t5_xl", {"d_model": 2048}, "2048 wide: XL"),
        Variant("t5_large", {"d_model": 1024}, "1024 wide: large"),
        Variant("t5_base", {"d_model": 768}, "768 wide: base, which Stable Audio reads"),
        Variant("t5_small", {"d_model": 512}, "512 wide: small"),
        Variant("", {}, "position bias in the first layer alone: T5"),
    ),
    "qwen2_vl_text": (
        Variant("7b", {"hidden_size": 3584}, "3584 wide: 7B"),
        Variant("3b", {"hidden_size": 2048}, "2048 wide: 3B"),
        Variant("", {}, "of Qwen 2's structure, in a size that no Qwen2.5-VL has"),
    ),
    "qwen3_text": (
        Variant("0.6b", {"hidden_size": 1024}, "1024 wide: 0.6B"),
        Variant("1.7b", {"hidden_size": 2048}, "2048 wide: 1.7B"),
        Variant("4b", {"hidden_size": 2560}, "2560 wide: 4B"),
        Variant("8b", {"hidden_size": 4096}, "4096 wide: 8B"),
    ),
    "gemma2_text": (
        Variant("2b", {"hidden_size": 2304}, "2304 wide: 2B"),
        Variant("9b", {"hidden_size": 3584}, "3584 wide: 9B"),
    ),
    "mistral_text": (Variant("24b", {"hidden_size": 5120}, "5120 wide: 24B"),),
    "vae_kl": (
        Variant(
            "asymmetric",
            {},
            "an encoder of the masked image beside a larger decoder: the asymmetric autoencoder",
            starts="decoder.condition_encoder.",
        ),
        Variant(
            "4_channels",
            {"latent_channels": 4, "block_out_channels": (128, 256, 512, 512)},
            "4 latent channels: SD 1.x and 2.x, SDXL, PixArt or AuraFlow, which names and shapes "
            "do not tell apart",
        ),
        Variant(
            "4_channels_f4",
            {"latent_channels": 4, "block_out_channels": (128, 256, 512)},
            "4 latent channels, three levels: SD's x4 upscaler",
        ),
        Variant("4_channels", {"latent_channels": 4}, "4 latent channels, in a width of its own"),
        Variant(
            "hunyuan_image",
            {"latent_channels": 64},
            "64 latent channels: HunyuanImage 2.1",
        ),
        Variant(
            "16_channels",
            {"latent_channels": 16},
            "16 latent channels: Flux.1 (which Chroma, Lumina 2, OmniGen2, HiDream and Z-Image "
            "use) or SD 3, which names and shapes do not tell apart",
        ),
    ),
    "vae_flux2": (
        Variant(
            "32_channels",
            {"latent_channels": 32},
            "32 latent channels, a batch norm: Flux.2, which Ideogram 4 uses",
        ),
    ),
    "vae_qwen": (
        Variant(
            "16_channels",
            {"z_dim": 16},
            "16 latent channels: Wan 2.1's and Qwen-Image's have the same names and shapes and "
            "cannot be told apart",
        ),
    ),
    **dict.fromkeys(("vae_tiny", "vae_tiny_encoder", "vae_tiny_decoder"), vae_tiny.VARIANTS),
}
