"""ComfyUI-GGUF: Unet Loader (GGUF), and its CLIP loaders, which read llama.cpp's encoders.

`general.architecture` is a gate; what the model is, ComfyUI tells by names and shapes afterwards.
"""

from __future__ import annotations

from diffquant.convert.targets import TARGETS
from diffquant.core.dtypes import STORAGE
from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.looks import (
    all_in_one,
    extension_denies,
    foreign_names,
    lacks_parts,
    misplaced,
    named,
    packed_as,
    short_pad_tokens,
)
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["ROWS"]

_CG = "city96/ComfyUI-GGUF@795e451"
_GATE = f"{_CG}:loader.py:12-14,77-91"
_GGUF = frozenset({"gguf"})
_KEY = "general.architecture"

_IMAGE = frozenset(
    {
        "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan",
        "lumina2", "qwen_image"
    }
)  # fmt: skip
_TEXT = frozenset(
    {
        "t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl"
    }
)  # fmt: skip
_GUESSED = (None, "pig", "cow")  # read in compatibility mode: the architecture is guessed
# What tools/convert.py detect_arch knows; Qwen-Image trips over Flux's banned names.
_GUESSABLE = frozenset(
    {
        "sd15", "sd2", "sdxl", "sdxl_refiner", "sd3", "flux1", "flux2", "chroma", "z_image",
        "lumina2", "hidream", "auraflow", "wan", "hunyuan", "ltx", "anima"
    }
)  # fmt: skip
_ENCODERS = frozenset({"text_encoder"})
# gguf-py 0.19.0 quants.py has no dequantization for these.
_UNDECODABLE = frozenset({"q8_1", "q8_k", "q1_0"})
_UNREAD = (
    frozenset(name.lower() for name, row in STORAGE.items() if row.is_block)
    - TARGETS["comfyui-gguf"].reads["gguf"]
)


def _gate(case: Case) -> object:
    """What the file says it is."""
    return case.metadata.get(_KEY)


def _refused_architecture(case: Case) -> str | None:
    said = _gate(case)
    return None if said in _IMAGE or said in _GUESSED else f"{_KEY} {str(said)[:60]!r}"


def _no_string(case: Case) -> str | None:
    value = case.typed.get(_KEY)
    return f"a {value.type}" if value is not None and value.type != "str" else None


def _guessed(case: Case) -> str | None:
    said = _gate(case)
    if said not in _GUESSED or case.architecture not in _GUESSABLE:
        return None
    return f"{_KEY} {'missing' if said is None else repr(said)}"


def _not_guessed(case: Case) -> str | None:
    said = _gate(case)
    if said not in _GUESSED or case.architecture in _GUESSABLE:
        return None
    return f"{_KEY} {'missing' if said is None else repr(said)}"


def _refused_encoder(case: Case) -> str | None:
    said = _gate(case)
    if said in _TEXT or case.metadata.get("general.type") in ("mmproj", "clip-vision"):
        return None
    return f"{_KEY} {'missing' if said is None else repr(str(said)[:60])}"


def _taken_encoder(case: Case) -> str | None:
    return "" if _refused_encoder(case) is None else None


def _image_tower(case: Case) -> str | None:
    return "" if case.metadata.get("general.type") in ("mmproj", "clip-vision") else None


def _slow(case: Case) -> str | None:
    return _stored_as(case, _UNREAD - _UNDECODABLE)


def _stored_as(case: Case, formats: frozenset[str]) -> str | None:
    rows: dict[str, list[str]] = {}
    for one in case.stored:
        if one.format in formats:
            rows.setdefault(one.format, []).append(one.key)
    found = [f"{name}: {named(keys)}" for name, keys in rows.items()]
    return "; ".join(found) or None


def _slow_and_reshaped(case: Case) -> str | None:
    shaped = set(case.reshaped)
    return named(one.key for one in case.stored if one.format in _UNREAD and one.key in shaped)


ROWS = (
    LoaderRule(
        "comfyui-gguf.diffusion-model",
        "accepts",
        "Unet Loader (GGUF) (models/unet or models/diffusion_models)",
        f"{_CG}:nodes.py:140-170",
        kinds=MODELS,
        containers=_GGUF,
        when=lambda case: "" if _gate(case) in _IMAGE else None,
    ),
    LoaderRule(
        "comfyui-gguf.compatibility",
        "caveat",
        "it guesses the architecture by tensor names, in a mode of its own for files of "
        "stable-diffusion.cpp and calcuis/gguf",
        _GATE,
        kinds=MODELS,
        containers=_GGUF,
        when=_guessed,
    ),
    LoaderRule(
        "comfyui-gguf.guessed-model",
        "accepts",
        "Unet Loader (GGUF) (models/unet or models/diffusion_models)",
        _GATE,
        kinds=MODELS,
        containers=_GGUF,
        when=lambda case: None if _guessed(case) is None else "",
    ),
    LoaderRule(
        "comfyui-gguf.text-encoder",
        "accepts",
        "CLIPLoader (GGUF) (models/text_encoders)",
        f"{_CG}:loader.py:13,377-406",
        kinds=_ENCODERS,
        containers=_GGUF,
        when=_taken_encoder,
    ),
    LoaderRule(
        "comfyui-gguf.image-tower",
        "caveat",
        "it is found by its file's name: beside the encoder, with mmproj and the encoder's stem in "
        "it",
        f"{_CG}:loader.py:213-284",
        kinds=_ENCODERS,
        containers=_GGUF,
        when=_image_tower,
    ),
    LoaderRule(
        "comfyui-gguf.encoder-safetensors",
        "accepts",
        "CLIPLoader (GGUF) takes .safetensors encoders too, beside GGUF ones",
        f"{_CG}:nodes.py:200-225",
        kinds=_ENCODERS,
        containers=FILES,
    ),
    LoaderRule(
        "comfyui-gguf.scaled-encoder",
        "refuses",
        "an encoder of scaled fp8 beside GGUF is not implemented there: load it with ComfyUI's own "
        "Load CLIP",
        f"{_CG}:nodes.py:222-223",
        kinds=_ENCODERS,
        containers=FILES,
        when=packed_as("scaled_fp8", "comfy"),
    ),
    LoaderRule(
        "comfyui-gguf.not-gguf",
        "refuses",
        "its nodes list .gguf files: load this one with ComfyUI's own",
        f"{_CG}:nodes.py:20-30",
        kinds=frozenset({"checkpoint", "diffusion_model", "vae", "lora", "controlnet"})
        | {"textual_inversion"},
        containers=FILES | {"sharded", "folder", "component"},
    ),
    LoaderRule(
        "comfyui-gguf.kind",
        "refuses",
        "it has no node for such a file in GGUF: use the .safetensors file",
        f"{_CG}:nodes.py; city96/ComfyUI-GGUF issue 396",
        kinds=frozenset({"lora", "vae", "controlnet", "textual_inversion"}),
        containers=_GGUF,
    ),
    LoaderRule(
        "comfyui-gguf.extension",
        "refuses",
        "its nodes list files by extension: rename the file",
        f"{_CG}:nodes.py:20-30",
        containers=_GGUF,
        when=extension_denies,
    ),
    LoaderRule(
        "comfyui-gguf.architecture",
        "refuses",
        f"its gate knows {', '.join(sorted(_IMAGE))}: `diffquant convert` writes the name that "
        "belongs to the model, where there is one",
        _GATE,
        kinds=MODELS,
        containers=_GGUF,
        when=_refused_architecture,
    ),
    LoaderRule(
        "comfyui-gguf.architecture-type",
        "refuses",
        f"{_KEY} must be a string",
        f"{_CG}:loader.py:26-34",
        containers=_GGUF,
        when=_no_string,
    ),
    LoaderRule(
        "comfyui-gguf.not-guessed",
        "refuses",
        "without a name it guesses the model, and this one is not among its guesses: "
        "`diffquant convert` writes the name",
        f"{_GATE}; tools/convert.py:26-149",
        kinds=MODELS,
        containers=_GGUF,
        when=_not_guessed,
    ),
    LoaderRule(
        "comfyui-gguf.encoder-architecture",
        "refuses",
        f"its gate for text encoders knows {', '.join(sorted(_TEXT))}: use the .safetensors file",
        f"{_CG}:loader.py:13-14,87-89",
        kinds=_ENCODERS,
        containers=_GGUF,
        when=_refused_encoder,
    ),
    LoaderRule(
        "comfyui-gguf.placement",
        "refuses",
        "it unpacks in layers alone, and BF16 counts as packed: "
        "`diffquant quantize --target comfyui-gguf` keeps the others in F32",
        f"{_CG}:ops.py; dequant.py:7-13; issues 417, 419",
        kinds=MODELS,
        containers=_GGUF,
        when=misplaced("comfyui-gguf"),
    ),
    LoaderRule(
        "comfyui-gguf.undecodable",
        "refuses",
        "neither it nor gguf-py can decode the type: quantize anew, say with -t q4_k_m",
        f"{_CG}:dequant.py:24-28; gguf-py 0.19.0 quants.py",
        containers=_GGUF,
        when=lambda case: _stored_as(case, _UNDECODABLE),
    ),
    LoaderRule(
        "comfyui-gguf.slow-type",
        "caveat",
        "it has no kernel for the type: gguf-py decodes it on the processor at every step",
        f"{_CG}:dequant.py:24-28,287-301",
        containers=_GGUF,
        when=_slow,
    ),
    LoaderRule(
        "comfyui-gguf.slow-reshaped",
        "refuses",
        "what it decodes through gguf-py does not get its own shape back",
        f"{_CG}:dequant.py:24-28",
        containers=_GGUF,
        when=_slow_and_reshaped,
    ),
    LoaderRule(
        "comfyui-gguf.diffusers-names",
        "refuses",
        "Diffusers' names would have to be joined into the makers' layers, which packed weights "
        "do not allow: `diffquant convert` gives it the makers' names",
        f"{_CG}:loader.py:57-71; tools/convert.py:26-149",
        kinds=MODELS,
        containers=_GGUF,
        when=foreign_names,
    ),
    LoaderRule(
        "comfyui-gguf.pad-tokens",
        "refuses",
        "they lost their leading 1 (size mismatch, [1, width] expected): quantize again from the "
        "source",
        "city96/ComfyUI-GGUF issue 379, pull request 392",
        kinds=MODELS,
        containers=_GGUF,
        when=short_pad_tokens,
    ),
    LoaderRule(
        "comfyui-gguf.all-in-one",
        "caveat",
        "it takes the denoiser and leaves the rest: give VAE and text encoders on their own",
        f"{_CG}:loader.py:57-71",
        containers=_GGUF,
        when=all_in_one,
    ),
    LoaderRule(
        "comfyui-gguf.parts",
        "caveat",
        "give the others with Load VAE and the CLIP loaders",
        f"{_CG}:nodes.py:140-170",
        kinds=MODELS,
        containers=_GGUF,
        when=lacks_parts,
    ),
)
