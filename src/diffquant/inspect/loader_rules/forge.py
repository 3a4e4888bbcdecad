"""stable-diffusion-webui-forge, as its repository stood in June 2025 (not its successors)."""

from __future__ import annotations

from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.looks import (
    foreign_names,
    lacks_parts,
    named,
    odd_unet_width,
    only_variants,
    packed_as,
    reshaped,
    unread_formats,
)
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["ROWS"]

_FO = "lllyasviel/stable-diffusion-webui-forge@dfdcbab"
_ENGINES = frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner", "sd3", "flux1", "chroma"})
_OTHERS = frozenset(
    {
        "flux2", "qwen_image", "z_image", "lumina2", "omnigen2", "hidream", "pixart",
        "auraflow", "kolors", "wan", "hunyuan", "ltx", "krea2", "anima", "ideogram4"
    }
)  # fmt: skip
_SINGLE = FILES | {"gguf"}
# backend/patcher/lora.py:417-438, packages_3rdparty/gguf/quants.py:172-176
_REQUANTIZED = frozenset({"q4_0", "q5_0", "q8_0"})
_LORA_MARKS = ("modelspec.architecture", "modelspec.implementation", "ss_base_model_version")


def _untold_lora(case: Case) -> str | None:
    said = any(key in case.metadata for key in (*_LORA_MARKS, "ss_v2"))
    return None if said else "no modelspec or ss_ metadata"


def _not_requantized(case: Case) -> str | None:
    rows = [
        one.key
        for one in case.stored
        if one.format not in ("f32", "f16", "bf16") and one.format not in _REQUANTIZED
    ]
    return named(rows, "weights")


ROWS = (
    LoaderRule(
        "forge.model",
        "accepts",
        "models/Stable-diffusion, chosen as checkpoint",
        f"{_FO}:backend/diffusion_engine; backend/loader.py:442-575",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_ENGINES,
    ),
    LoaderRule(
        "forge.vae",
        "accepts",
        "models/VAE, chosen under VAE / Text Encoder",
        f"{_FO}:modules_forge/main_entry.py",
        kinds=frozenset({"vae"}),
        containers=FILES,
        architectures=frozenset({"vae_kl"}),
    ),
    LoaderRule(
        "forge.text-encoder",
        "accepts",
        "models/text_encoder, chosen under VAE / Text Encoder",
        f"{_FO}:modules_forge/main_entry.py; backend/loader.py",
        kinds=frozenset({"text_encoder"}),
        containers=_SINGLE,
        architectures=frozenset({"clip_text", "openclip_text", "t5_encoder"}),
    ),
    LoaderRule(
        "forge.lora",
        "accepts",
        "models/Lora",
        f"{_FO}:packages_3rdparty/comfyui_lora_collection/lora.py:55-175",
        kinds=frozenset({"lora"}),
        containers=FILES,
    ),
    LoaderRule(
        "forge.lora-metadata",
        "caveat",
        "it tells a LoRA's base by metadata alone and lists this one as of unknown base",
        f"{_FO}:extensions-builtin/sd_forge_lora/network.py:52-68",
        kinds=frozenset({"lora"}),
        containers=FILES,
        when=_untold_lora,
    ),
    LoaderRule(
        "forge.textual-inversion",
        "accepts",
        "models/embeddings",
        f"{_FO}:modules/textual_inversion",
        kinds=frozenset({"textual_inversion"}),
        containers=FILES,
    ),
    LoaderRule(
        "forge.controlnet",
        "accepts",
        "models/ControlNet",
        f"{_FO}:extensions-builtin/sd_forge_controlnet",
        kinds=frozenset({"controlnet"}),
        containers=FILES,
        architectures=frozenset({"sd15", "sd2", "sdxl"}),
    ),
    LoaderRule(
        "forge.engine",
        "refuses",
        "it has engines for SD1.5, SD2, SDXL, SD3.5, Flux.1 and Chroma alone: use ComfyUI, "
        "Diffusers or stable-diffusion.cpp",
        f"{_FO}:backend/diffusion_engine",
        kinds=MODELS,
        architectures=_OTHERS,
    ),
    LoaderRule(
        "forge.unet-width",
        "refuses",
        "it matches a UNet's widths against its table of models",
        "lllyasviel/huggingface_guess@7094202:model_list.py:99-370",
        kinds=MODELS,
        architectures=frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner"}),
        when=odd_unet_width,
    ),
    LoaderRule(
        "forge.sd3-medium",
        "unknown",
        "its engine is made for SD3.5; SD3 Medium passes its detection as one",
        f"{_FO}:backend/diffusion_engine/sd35.py:17",
        kinds=MODELS,
        architectures=frozenset({"sd3"}),
        when=only_variants("medium"),
    ),
    LoaderRule(
        "forge.folder",
        "refuses",
        "it loads single files: `diffquant convert` it to .safetensors",
        f"{_FO}:backend/loader.py:442-475",
        containers=frozenset({"folder", "component", "sharded"}),
    ),
    LoaderRule(
        "forge.diffusers-names",
        "refuses",
        "it puts model.diffusion_model. before every key and then looks for the makers' names: "
        "`diffquant convert` it to .safetensors",
        f"{_FO}:backend/loader.py:442-446; lllyasviel/huggingface_guess@7094202:detection.py",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_ENGINES,
        when=foreign_names,
    ),
    LoaderRule(
        "forge.parts",
        "caveat",
        "choose the others under VAE / Text Encoder",
        f"{_FO}:backend/loader.py:485-575",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_ENGINES,
        when=lacks_parts,
    ),
    LoaderRule(
        "forge.gguf-types",
        "refuses",
        "its GGUF layers have no such type: `diffquant quantize --target forge`",
        f"{_FO}:backend/operations_gguf.py:6-16",
        kinds=MODELS | {"text_encoder"},
        containers=frozenset({"gguf"}),
        when=unread_formats("forge"),
    ),
    LoaderRule(
        "forge.orig-shape",
        "refuses",
        "it takes shapes as they are stored: `diffquant quantize --target forge` keeps them",
        f"{_FO}:backend/operations_gguf.py",
        containers=frozenset({"gguf"}),
        when=reshaped,
    ),
    LoaderRule(
        "forge.gguf-lora",
        "caveat",
        "a LoRA cannot be merged into these: it packs Q4_0, Q5_0 and Q8_0 again and no other type; "
        "set Diffusion in Low Bits to an fp16 LoRA",
        f"{_FO}:backend/patcher/lora.py:417-438; packages_3rdparty/gguf/quants.py:172-176",
        kinds=MODELS,
        containers=frozenset({"gguf"}),
        when=_not_requantized,
    ),
    LoaderRule(
        "forge.scaled-fp8",
        "caveat",
        "the older spelling, scale_weight: it multiplies the scale in, and ignores input scales",
        f"{_FO}:backend/operations.py get_weight_and_bias",
        kinds=MODELS | {"text_encoder"},
        containers=FILES,
        when=packed_as("scaled_fp8"),
    ),
    LoaderRule(
        "forge.comfy-quant",
        "refuses",
        "it is older than comfy_quant and would load the bytes without their scales: quantize to "
        "nf4, plain fp8 or GGUF with --target forge",
        f"{_FO}:backend/memory_management.py:311-337",
        containers=FILES,
        when=packed_as("comfy", "modelopt"),
    ),
    LoaderRule(
        "forge.other-packing",
        "refuses",
        "it knows plain and scaled fp8, and bitsandbytes nf4 and fp4 alone",
        f"{_FO}:backend/memory_management.py:311-337",
        containers=FILES,
        when=lambda case: (
            packed_as("bfl", "sdnq")(case)
            or named(
                (one.key for one in case.stored if one.format == "int8_bnb"), "weights as int8_bnb"
            )
        ),
    ),
    LoaderRule(
        "forge.nf4-all",
        "caveat",
        "linear layers that are not packed become nf4 as well when the model goes to the GPU",
        f"{_FO}:backend/operations_bnb.py",
        kinds=MODELS,
        containers=FILES,
        when=packed_as("bnb"),
    ),
)
