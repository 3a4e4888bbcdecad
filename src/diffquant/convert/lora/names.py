"""How an adapter file names modules: prefixes, the naming they make, and current spellings.

A module's name is prefix + name. The prefix says which part of the model is meant and whether dots
became underscores; together with the endings it tells whose naming the file has.

Sources:

- kohya-ss/sd-scripts@450630c:networks/lora_flux.py: lora_unet, lora_te1, lora_te3
- Comfy-Org/ComfyUI@17358c8:comfy/lora.py, model_lora_keys_unet and _clip: the other prefixes
- Comfy-Org/ComfyUI@2bffe2f:comfy/lora_convert.py: BFL control, Wan-Fun, USO names
- diffusers 0.42.1 (package), loaders/lora_pipeline.py: is_xlabs, is_bfl_control, is_fal_kontext
- diffusers 0.42.1 (package), utils/state_dict_utils.py: older suffixes, ".processor."
- lycoris-lora 4.1.3 (package), wrapper.py: LORA_PREFIX "lycoris"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["NAMINGS", "Naming", "NamingRow", "Place", "naming_of", "place"]

Naming: TypeAlias = Literal["underscored", "dotted", "counted"]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """One row: what stands before a module's name."""

    text: str
    part: str
    naming: Naming


_PREFIXES = (
    _Prefix("lora_unet__", "denoiser", "underscored"),  # Wan-Fun
    _Prefix("lora_unet_", "denoiser", "underscored"),
    _Prefix("lora_transformer_", "denoiser", "underscored"),  # OneTrainer
    _Prefix("lora_prior_unet_", "denoiser", "underscored"),  # Stable Cascade
    _Prefix("lycoris_", "denoiser", "underscored"),  # SimpleTuner
    _Prefix("lora_te_", "text_encoder", "underscored"),
    _Prefix("lora_te1_", "text_encoder", "underscored"),
    _Prefix("lora_te2_", "text_encoder_2", "underscored"),
    _Prefix("lora_te3_", "text_encoder_2", "underscored"),  # T5 of Flux, as sd-scripts counts
    _Prefix("model.diffusion_model.", "denoiser", "dotted"),
    _Prefix("diffusion_model.", "denoiser", "dotted"),
    _Prefix("transformer.", "denoiser", "dotted"),
    _Prefix("unet.", "denoiser", "dotted"),
    _Prefix("net.", "denoiser", "dotted"),  # Anima
    _Prefix("unet:", "denoiser", "counted"),
    _Prefix("text_encoder:", "text_encoder", "counted"),
    _Prefix("text_encoders.clip_l.transformer.", "text_encoder", "dotted"),
    _Prefix("text_encoders.clip_g.transformer.", "text_encoder_2", "dotted"),
    _Prefix("text_encoders.t5xxl.transformer.", "text_encoder_2", "dotted"),
    _Prefix("text_encoder_3.", "text_encoder_3", "dotted"),
    _Prefix("text_encoder_2.", "text_encoder_2", "dotted"),
    _Prefix("text_encoder.", "text_encoder", "dotted"),
    _Prefix("", "", "dotted"),
)
_ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.")  # ComfyUI's, of any other encoder
_WRAPPER = "base_model.model."
# Older names of a projection, by the module that holds it; see diffusers' DIFFUSERS_OLD_TO_PEFT.
_OLD_NAMES = (
    (re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1$"), r"\1.img_attn.\2"),
    (re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2$"), r"\1.txt_attn.\2"),
    (re.compile(r"(single_blocks\.\d+)\.processor\.proj$"), r"\1.linear2"),
    (re.compile(r"(single_blocks\.\d+)\.processor\.qkv$"), r"\1.linear1_qkv"),
    (re.compile(r"\.processor\.to_out$"), ".to_out.0"),
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"self_attn\.to_([qkv]|out)$"), r"self_attn.\1_proj"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module is.

    Attributes:
        part: denoiser, text_encoder, text_encoder_2 or _3; "" where the file does not say.
        naming: how `module` is written.
        module: the name without its prefix, older spellings made current.
        prefix: what was taken away, PEFT's wrapper aside.
    """

    part: str
    naming: Naming
    module: str
    prefix: str


def place(name: str) -> Place:
    """Split a name into its prefix and the module; PEFT's wrapper may stand on either side."""
    name = name.removeprefix(_WRAPPER)
    row = next(row for row in _PREFIXES if name.startswith(row.text))
    if not row.text and (encoder := _ENCODER.match(name)):
        row = _Prefix(encoder[0], "text_encoder", "dotted")
    module = name[len(row.text) :].removeprefix(_WRAPPER)
    if row.naming == "dotted":
        for pattern, current in _OLD_NAMES:
            module = pattern.sub(current, module)
    return Place(row.part, row.naming, module, row.text)


@dataclass(frozen=True, slots=True)
class NamingRow:
    """One naming in circulation: the first whose pattern is found in a key claims it."""

    slug: str
    title: str
    pattern: str


NAMINGS = (
    NamingRow("cloneofsimo", "modules by number (cloneofsimo/lora)", r"^[a-z_0-9]+:\d+:(up|down)$"),
    NamingRow("uso", "USO", r"single_blocks\.\d+\.processor\.(qkv|proj)_lora\."),
    NamingRow("xlabs", "XLabs", r"double_blocks\.\d+\.processor\.(qkv|proj)_lora[12]\."),
    NamingRow("wan_fun", "kohya with a double underscore (Wan-Fun)", r"^lora_unet__"),
    NamingRow("onetrainer", "OneTrainer", r"^lora_transformer_"),
    NamingRow("simpletuner", "lycoris_ (SimpleTuner)", r"^lycoris_"),
    NamingRow("kohya", "kohya", r"^lora_(unet|te\d?|prior_unet)_"),
    NamingRow(
        "fal_kontext",
        "PEFT around BFL names (fal)",
        r"^base_model\.model\.(double|single)_blocks\.",
    ),
    NamingRow("peft", "PEFT", r"^(\w+\.)?base_model\.model\."),
    NamingRow(
        "diffusers_old",
        "Diffusers before PEFT",
        r"\.processor\.|[._]lora(_linear_layer)?\.(down|up)\.weight$|\.lora\.alpha$",
    ),
    NamingRow(
        "comfy", "ComfyUI", r"^(model\.)?diffusion_model\.|^text_encoders\.\w+\.transformer\."
    ),
    NamingRow("diffusers", "Diffusers", r"^(unet|transformer|text_encoder(_[23])?)\."),
    NamingRow(
        "bfl_control", "BFL control", r"^(double|single)_blocks\.\d+\.(\w+\.)?norm\.\w+_norm\."
    ),
    NamingRow("bare", "bare module names", r""),
)
_COMPILED = tuple((row, re.compile(row.pattern)) for row in NAMINGS)
# A row that explains the whole file once a single key has it.
_DECISIVE = ("uso", "bfl_control", "cloneofsimo")


def naming_of(keys: Iterable[str]) -> NamingRow:
    """Whose naming a file has.

    Raises:
        ValueError: no keys.
    """
    counts: Counter[str] = Counter()
    for key in keys:
        counts[next(row.slug for row, pattern in _COMPILED if pattern.search(key))] += 1
    if not counts:
        raise ValueError("a naming needs keys")
    slug = next((one for one in _DECISIVE if counts[one]), "") or counts.most_common(1)[0][0]
    return next(one for one in NAMINGS if one.slug == slug)
