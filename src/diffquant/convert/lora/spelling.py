"""How LoRA files are spelled, one row for each naming that is written.

| to | a denoiser's module | a text encoder's | factors | scale | read by |
|---|---|---|---|---|---|
| kohya | `lora_unet_double_blocks_0_img_attn_qkv` | `lora_te1_text_model_...` | `lora_down` `lora_up` | `.alpha` | everybody |
| comfy | `diffusion_model.double_blocks.0.img_attn.qkv` | `text_encoders.clip_l.transformer...` | `lora_down` `lora_up` | `.alpha` | ComfyUI |
| diffusers | `transformer.transformer_blocks.0.attn.to_q` | `text_encoder.text_model...` | `lora_A` `lora_B` | in the factors | Diffusers; ComfyUI but for UNets |
| peft | `base_model.model.transformer_blocks.0.attn.to_q` | the same | `lora_A` `lora_B` | in the factors | PEFT |
| bfl | `base_model.model.double_blocks.0.img_attn.qkv` | none | `lora_A` `lora_B` | in the factors | Diffusers, of every layer |

PEFT's configuration states one alpha for all layers, and readers of such files that do not look at
the configuration add `up @ down` as it is: so the scale goes into the up factors there, and alpha
is the rank. Kohya files name a UNet's modules as Diffusers does, which every reader knows, other
modules as the architecture does; `unet_names="original"` gives those of sd-scripts for SDXL.

Sources:

- kohya-ss/sd-scripts@450630c:networks/lora.py, lora_flux.py: prefixes
- Comfy-Org/ComfyUI@17358c8:comfy/lora.py, model_lora_keys_unet, model_lora_keys_clip: what ComfyUI
  reads; `unet.` names of attention layers only with `.processor.`
- diffusers 0.42.1 (package), utils/peft_utils.py, get_peft_kwargs: alpha is the rank without
  alphas; loaders/lora_conversion_utils.py, _convert_fal_kontext_lora_to_diffusers: takes every
  layer out of the file, whether it is there or not
- lycoris-lora 4.1.3 (package), modules/*.py, weight_list: other parts' names
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.modules import Model, Part
from diffquant.convert.lora.places import Module
from diffquant.core.errors import UsageError

__all__ = ["SPELLINGS", "Spelling", "keys_of", "module_prefix", "modules_for", "unspeakable"]

_LYCORIS: Mapping[str, str] = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "alpha": ".alpha",
    "magnitude": ".dora_scale",
    **{f"hada_{one}": f".hada_{one}" for one in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{one}": f".lokr_{one}" for one in ("w1", "w1_a", "w1_b", "t1")},
    **{f"lokr_{one}": f".lokr_{one}" for one in ("w2", "w2_a", "w2_b", "t2")},
    **{f"glora_{one}": f".{one}.weight" for one in ("a1", "a2", "b1", "b2", "bm")},
    "q_layer": ".q_layer.weight",
    "p_layer": ".p_layer.weight",
    "lambda": ".lambda_layer",
    "oft_blocks": ".oft_blocks",
    "rescale": ".rescale",
    "ia3": ".weight",
    "on_input": ".on_input",
    "diff": ".diff",
    "diff_b": ".diff_b",
    "set_weight": ".set_weight",
    "reshape_weight": ".reshape_weight",
    "w_norm": ".w_norm",
    "b_norm": ".b_norm",
}
_PEFT: Mapping[str, str] = {"down": ".lora_A.weight", "up": ".lora_B.weight"}


@dataclass(frozen=True, slots=True)
class Spelling:
    """One row.

    Attributes:
        slug: what `--to` says.
        title: for people.
        names: whose module names: "kohya" is Diffusers' for UNets, else the architecture's own.
        parts: role -> what follows the module's name.
        alpha: whether the scale stands in the file as alpha; else it goes into the up factor.
        only: architectures it exists for; empty for all.
    """

    slug: str
    title: str
    names: Literal["kohya", "own", "diffusers"]
    parts: Mapping[str, str]
    alpha: bool
    only: tuple[str, ...] = ()


SPELLINGS: Mapping[str, Spelling] = {
    row.slug: row
    for row in (
        Spelling("kohya", "kohya", "kohya", _LYCORIS, alpha=True),
        Spelling("comfy", "ComfyUI", "own", _LYCORIS, alpha=True),
        Spelling("diffusers", "Diffusers", "diffusers", _PEFT, alpha=False),
        Spelling("peft", "PEFT", "diffusers", _PEFT, alpha=False),
        Spelling("bfl", "PEFT around BFL names", "own", _PEFT, alpha=False, only=("flux1",)),
    )
}
# What sd-scripts counts: T5 is the third encoder of Flux though it has two.
_KOHYA_ENCODERS: Mapping[str, Mapping[str, str]] = {
    "": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"},
    "sd15": {"text_encoder": "lora_te_"},
    "sd2": {"text_encoder": "lora_te_"},
    "flux1": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
}
_COMFY_ENCODERS = {
    "clip_text": "text_encoders.clip_l.transformer.",
    "openclip_text": "text_encoders.clip_g.transformer.",
    "t5_encoder": "text_encoders.t5xxl.transformer.",
}


def modules_for(spelling: Spelling, part: Part, *, original: bool = False) -> Mapping[str, Module]:
    """The modules of a part as a spelling names them.

    Text encoders go by transformers' names everywhere.

    Args:
        spelling: the row.
        part: of the model.
        original: whether kohya files name a UNet's modules as its makers do.
    """
    unet = part.kind.startswith("unet")
    diffusers = (
        spelling.names == "diffusers"
        or part.name != "denoiser"
        or (spelling.names == "kohya" and unet and not original)
    )
    return part.diffusers if diffusers else part.own


def module_prefix(spelling: Spelling, model: Model, part: Part, *, alone: bool) -> str:
    """What stands before a module's name.

    Args:
        spelling: the row.
        model: what the file is for.
        part: of the model.
        alone: whether the file adapts this part only.

    Raises:
        UsageError: the spelling has no names for this part, or this architecture.
    """
    if spelling.only and model.architecture not in spelling.only:
        known = ", ".join(spelling.only)
        raise UsageError(
            f"--to {spelling.slug}: only for {known}, this LoRA is for {model.architecture}; "
            "use --to comfy"
        )
    denoiser = part.name == "denoiser"
    if spelling.slug == "kohya":
        encoders = _KOHYA_ENCODERS.get(model.architecture, _KOHYA_ENCODERS[""])
        found = "lora_unet_" if denoiser else encoders.get(part.name)
    elif spelling.slug == "comfy":
        found = "diffusion_model." if denoiser else _COMFY_ENCODERS.get(part.kind)
    elif spelling.slug == "bfl":
        found = "base_model.model." if denoiser else None
    elif spelling.slug == "peft":
        found = "base_model.model." if alone else f"{part.folder}.base_model.model."
    else:
        found = f"{part.folder}."
    if found is None:
        raise UsageError(
            f"--to {spelling.slug}: it has no names for {part.name} ({part.kind}) of "
            f"{model.architecture}; use --to diffusers"
        )
    return found


def keys_of(spelling: Spelling, prefix: str, module: str, *, adapter: str = "") -> dict[str, str]:
    """Role -> key of one layer.

    Args:
        spelling: the row.
        prefix: as module_prefix gives it.
        module: dotted name.
        adapter: PEFT's name of the adapter, "" for none.
    """
    name = prefix + (module.replace(".", "_") if spelling.slug == "kohya" else module)
    found = {role: name + rest for role, rest in spelling.parts.items()}
    if adapter and not spelling.alpha:
        found = {
            role: key.removesuffix("weight") + f"{adapter}.weight" for role, key in found.items()
        }
    return found


def unspeakable(spelling: Spelling, adapter: Adapter) -> str:
    """Why a spelling has no names for an adapter; empty where it has."""
    roles = set(adapter.parts)
    if not spelling.alpha:
        if adapter.kind != "lora" or roles - {"down", "up", "alpha"}:
            extra = " with a bias" if "up_bias" in roles or "diff_b" in roles else ""
            core = " with a core" if "mid" in roles else ""
            return f"{adapter.label}{core}{extra} has no names in {spelling.title} files"
        return ""
    if "ia3" in roles and "on_input" not in roles:
        return "IA3 of PEFT multiplies by its numbers, that of lycoris by one more: not the same"
    if missing := sorted(roles - spelling.parts.keys()):
        return f"{adapter.label}: {spelling.title} files have no name for its {missing[0]}"
    return ""
