"""ComfyUI's own loaders: Load Checkpoint, Load Diffusion Model, Load CLIP, Load VAE, Load LoRA.

What a model is, ComfyUI tells by names and shapes; how a layer is packed, by `comfy_quant` markers.
"""

from __future__ import annotations

from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.comfyui_packed import PACKED
from diffquant.inspect.loader_rules.looks import (
    extension_denies,
    foreign_names,
    keys_like,
    lacks_parts,
    odd_unet_width,
    short_pad_tokens,
)
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["ROWS"]

_DETECT = "Comfy-Org/ComfyUI@0b61ce5:comfy/model_detection.py"
_MODELS = "Comfy-Org/ComfyUI@01f03bb:comfy/supported_models.py"
_UTILS = "Comfy-Org/ComfyUI@09708ea:comfy/utils.py"
_SD = "Comfy-Org/ComfyUI@35ead00:comfy/sd.py"
_LORA = "Comfy-Org/ComfyUI@17358c8:comfy/lora.py"

_UNETS = frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner"})
_KNOWN = _UNETS | {
    "sd3",
    "flux1",
    "flux2",
    "chroma",
    "qwen_image",
    "z_image",
    "lumina2",
    "omnigen2",
    "hidream",
    "pixart",
    "auraflow",
    "wan",
    "hunyuan",
    "ltx",
    "krea2",
    "anima",
    "ideogram4",
}
# Diffusers' names that convert_diffusers_mmdit translates.
_TRANSLATED = frozenset({"flux1", "sd3", "auraflow", "pixart", "z_image"})
# Diffusers' UNets that unet_config_from_diffusers_unet has in its table.
_UNET_TABLE = {
    "sd15": {"base", "inpainting", "sdxs"},
    "sd2": {"base", "sdxs"},
    "sdxl": {
        "base",
        "inpainting",
        "ip2p",
        "ssd_1b",
        "vega",
        "koala_700m",
        "koala_1b",
        "playground_v2.5",
        "v_prediction",
    },
    "sdxl_refiner": {""},
}
_DISTILLED = ("bk_sdm_base", "bk_sdm_small", "bk_sdm_tiny")
_SD_NAME = "model.diffusion_model."


def _in_unet_table(case: Case) -> str | None:
    """A Diffusers UNet that the table lacks."""
    if not case.diffusers_names or case.variant in _UNET_TABLE[case.architecture]:
        return None
    return case.variant or "an unlisted member of the family"


def _distilled_in_ldm(case: Case) -> str | None:
    return case.variant if not case.diffusers_names and case.variant in _DISTILLED else None


def _no_prefix(case: Case) -> str | None:
    part = case.denoiser
    if part is None or part.layout == "diffusers" or part.prefix == _SD_NAME:
        return None
    return f"the denoiser's keys begin with {part.prefix or 'nothing'}"


def _whole(case: Case) -> str | None:
    """A checkpoint whose names lead it through Load Checkpoint."""
    return "" if case.container in FILES and _no_prefix(case) is None else None


ROWS = (
    LoaderRule(
        "comfyui.checkpoint",
        "accepts",
        "Load Checkpoint (models/checkpoints)",
        f"{_SD} load_checkpoint_guess_config; {_MODELS}",
        kinds=frozenset({"checkpoint"}),
        containers=FILES,
        architectures=_KNOWN,
        when=_whole,
    ),
    LoaderRule(
        "comfyui.diffusion-model",
        "accepts",
        "Load Diffusion Model (models/diffusion_models)",
        f"{_SD} load_diffusion_model_state_dict; {_MODELS}",
        kinds=MODELS,
        containers=FILES,
        architectures=_KNOWN,
        when=lambda case: "" if case.kind == "diffusion_model" or _no_prefix(case) else None,
    ),
    LoaderRule(
        "comfyui.vae",
        "accepts",
        "Load VAE (models/vae)",
        f"{_SD} VAE",
        kinds=frozenset({"vae"}),
        containers=FILES,
        architectures=frozenset({"vae_kl", "vae_flux2", "vae_qwen"}),
    ),
    LoaderRule(
        "comfyui.tiny-vae",
        "caveat",
        "Load VAE takes tiny autoencoders by name, an encoder and a decoder each in a file of its "
        "own: models/vae_approx/taesd_encoder and taesd_decoder (taesdxl, taesd3, taef1)",
        "Comfy-Org/ComfyUI:nodes.py VAELoader.load_taesd",
        kinds=frozenset({"vae"}),
        containers=FILES,
        architectures=frozenset({"vae_tiny", "vae_tiny_encoder", "vae_tiny_decoder"}),
    ),
    LoaderRule(
        "comfyui.tiny-vae-file",
        "accepts",
        "a tiny autoencoder's half in its makers' names",
        "Comfy-Org/ComfyUI:nodes.py VAELoader.load_taesd",
        kinds=frozenset({"vae"}),
        containers=FILES,
        architectures=frozenset({"vae_tiny_encoder", "vae_tiny_decoder"}),
    ),
    LoaderRule(
        "comfyui.text-encoder",
        "accepts",
        "Load CLIP (models/text_encoders)",
        f"{_SD} load_text_encoder_state_dicts, detect_te_model",
        kinds=frozenset({"text_encoder"}),
        containers=FILES,
        architectures=frozenset(
            {
                "clip_text",
                "openclip_text",
                "t5_encoder",
                "qwen2_vl_text",
                "qwen3_text",
                "gemma2_text",
                "mistral_text",
            }
        ),
    ),
    LoaderRule(
        "comfyui.lora",
        "accepts",
        "Load LoRA (models/loras); it does not tell which base a LoRA is for, maps the keys it "
        "knows and only logs the others",
        f"{_LORA} load_lora, model_lora_keys_unet",
        kinds=frozenset({"lora"}),
        containers=FILES,
    ),
    LoaderRule(
        "comfyui.lora-indexed",
        "refuses",
        "cloneofsimo's format numbers its layers: none of the names is known to the loader, and "
        "it changes nothing; the trainer's own scripts apply it",
        f"{_LORA} load_lora",
        kinds=frozenset({"lora"}),
        when=keys_like(r"^(text_encoder|unet):\d+:(up|down)$", "tensors"),
    ),
    LoaderRule(
        "comfyui.textual-inversion",
        "accepts",
        "models/embeddings, then embedding:NAME in the prompt",
        "Comfy-Org/ComfyUI:comfy/sd1_clip.py load_embed",
        kinds=frozenset({"textual_inversion"}),
        containers=FILES,
    ),
    LoaderRule(
        "comfyui.controlnet",
        "accepts",
        "Load ControlNet Model (models/controlnet)",
        "Comfy-Org/ComfyUI@03b1ca6:comfy/controlnet.py load_controlnet_state_dict",
        kinds=frozenset({"controlnet"}),
        containers=FILES,
    ),
    LoaderRule(
        "comfyui.gguf",
        "refuses",
        "its own nodes list no .gguf: install ComfyUI-GGUF and use Unet Loader (GGUF), or "
        "`diffquant convert` it to .safetensors",
        f"{_UTILS} load_torch_file",
        containers=frozenset({"gguf"}),
    ),
    LoaderRule(
        "comfyui.folder",
        "refuses",
        "its loaders take single files: `diffquant convert` the folder to one .safetensors file",
        "Comfy-Org/ComfyUI:nodes.py CheckpointLoaderSimple, UNETLoader",
        containers=frozenset({"folder"}),
    ),
    LoaderRule(
        "comfyui.component-folder",
        "caveat",
        "its loaders take single files: give it the safetensors file inside, which must be one, "
        "not shards",
        "Comfy-Org/ComfyUI:nodes.py UNETLoader",
        containers=frozenset({"component"}),
        kinds=frozenset({"diffusion_model", "vae", "text_encoder"}),
    ),
    LoaderRule(
        "comfyui.component-file",
        "accepts",
        "the file inside, through Load Diffusion Model, Load VAE or Load CLIP",
        "Comfy-Org/ComfyUI:nodes.py UNETLoader",
        containers=frozenset({"component"}),
        kinds=frozenset({"diffusion_model", "vae", "text_encoder"}),
    ),
    LoaderRule(
        "comfyui.shards",
        "refuses",
        "it reads no shard index: `diffquant convert` the shards to one .safetensors file",
        f"{_UTILS} load_torch_file",
        containers=frozenset({"sharded"}),
    ),
    LoaderRule(
        "comfyui.extension",
        "refuses",
        "it chooses its reader by the file's extension: rename the file",
        f"{_UTILS} load_torch_file",
        when=extension_denies,
    ),
    LoaderRule(
        "comfyui.pickle",
        "caveat",
        "pickles are read with weights_only: what holds other objects than tensors is refused; "
        "`diffquant convert` it to .safetensors",
        f"{_UTILS} load_torch_file",
        containers=frozenset({"pickle"}),
    ),
    LoaderRule(
        "comfyui.parts",
        "caveat",
        "give the others with Load VAE, Load CLIP (or Dual and Triple)",
        f"{_SD} load_checkpoint_guess_config",
        kinds=MODELS,
        containers=FILES,
        architectures=_KNOWN,
        when=lacks_parts,
    ),
    LoaderRule(
        "comfyui.diffusers-unet",
        "refuses",
        "its table of Diffusers UNets has no such member (could not detect model type): "
        "`diffquant convert` it to .safetensors, which has LDM names",
        f"{_DETECT} unet_config_from_diffusers_unet",
        kinds=MODELS,
        architectures=_UNETS,
        when=_in_unet_table,
    ),
    LoaderRule(
        "comfyui.distilled-unet",
        "unknown",
        "it is told as its family's full model by three widths; whether the missing blocks are "
        "allowed for has not been tried",
        f"{_DETECT} detect_unet_config",
        kinds=MODELS,
        architectures=_UNETS,
        when=_distilled_in_ldm,
    ),
    LoaderRule(
        "comfyui.diffusers-names",
        "refuses",
        "its detection does not know this model by them: `diffquant convert` it to .safetensors, "
        "which has the makers' names",
        f"{_DETECT} convert_diffusers_mmdit",
        kinds=MODELS,
        architectures=_KNOWN - _TRANSLATED - _UNETS,
        when=foreign_names,
    ),
    LoaderRule(
        "comfyui.unet-width",
        "refuses",
        "it matches a UNet's widths against its table of models (could not detect model type)",
        _MODELS,
        kinds=MODELS,
        architectures=_UNETS,
        when=odd_unet_width,
    ),
    LoaderRule(
        "comfyui.clip-names",
        "unknown",
        "names of transformers 5, without text_model.: whether its detection takes them has not "
        "been tried",
        f"{_SD} detect_te_model",
        kinds=frozenset({"text_encoder"}),
        architectures=frozenset({"clip_text", "openclip_text"}),
        when=keys_like(r"^embeddings\.position_embedding\.weight$", "tensor"),
    ),
    LoaderRule(
        "comfyui.kolors",
        "unknown",
        "Kolors' projection of ChatGLM3's features has no node of ComfyUI's own",
        _MODELS,
        kinds=MODELS,
        architectures=frozenset({"kolors"}),
    ),
    LoaderRule(
        "comfyui.pad-tokens",
        "refuses",
        "they lost their leading 1 (size mismatch, [1, width] expected): write the file again from "
        "its source",
        "city96/ComfyUI-GGUF pull request 392",
        kinds=MODELS,
        when=short_pad_tokens,
    ),
    *PACKED,
)
