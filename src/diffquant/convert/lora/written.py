"""How a LoRA is written so that whoever loads the model can add it: key names and header.

| beside | keys | read by |
|---|---|---|
| a single file, GGUF too | `lora_unet_<module, underscored>` `.lora_down.weight` `.lora_up.weight` `.alpha` | sd-scripts' own, ComfyUI, ComfyUI-GGUF, Forge, stable-diffusion.cpp, Diffusers |
| a Diffusers folder | `<folder>.<module>` `.lora_A.weight` `.lora_B.weight` | Diffusers, PEFT, ComfyUI |

Modules of a UNet go by Diffusers' names, which every reader of `lora_unet_` knows, other modules by
their canonical ones. Alpha is the rank: a reader that overlooks it adds the same.

Sources:

- Comfy-Org/ComfyUI@17358c8:comfy/lora.py, model_lora_keys_unet: all three spellings
- diffusers 0.42.1 (package), loaders/lora_conversion_utils.py: `_convert_non_diffusers_lora_to_
  diffusers`, `_convert_kohya_flux_lora_to_diffusers`, `_convert_non_diffusers_qwen_lora_to_
  diffusers` read `lora_unet_`
- kohya-ss/sd-scripts@450630c:networks/lora_flux.py: names and `ss_network_*`
- lllyasviel/stable-diffusion-webui-forge:extensions-builtin/sd_forge_lora/network.py:52-68: what
  tells the family
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffquant.convert.architectures.base import Component
from diffquant.convert.rules import Shapes

__all__ = ["LoraKeys", "kohya_modules", "lora_header", "lora_keys"]

_IMPLEMENTATION = {"flux1": "https://github.com/black-forest-labs/flux"}
# architecture (and variant) -> modelspec.architecture before "/lora", ss_base_model_version
_FAMILIES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("sd15", ""): ("stable-diffusion-v1", "sd_v1"),
    ("sd2", ""): ("stable-diffusion-v2-768-v", "sd_v2"),
    ("sdxl", ""): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ("sdxl_refiner", ""): ("stable-diffusion-xl-v1-refiner", "sdxl_refiner_v1-0"),
    ("flux1", "schnell"): ("flux-1-schnell", "flux1"),
    ("flux1", ""): ("flux-1-dev", "flux1"),
    ("qwen_image", ""): ("qwen-image", "qwen_image"),
}


@dataclass(frozen=True, slots=True)
class LoraKeys:
    """The names of one layer's tensors; `alpha` is "" where it is left out."""

    down: str
    up: str
    alpha: str


def lora_keys(target: str, *, folder: bool, modules: Mapping[str, str], key: str) -> LoraKeys:
    """Name the tensors of one layer.

    Args:
        target: the weight's key in the output.
        folder: whether the output is a Diffusers folder.
        modules: as kohya_modules returns them; for single files.
        key: the weight's canonical key.
    """
    if folder:
        name = target.replace("/", ".", 1).removesuffix(".weight")
        return LoraKeys(f"{name}.lora_A.weight", f"{name}.lora_B.weight", "")
    name = f"lora_unet_{modules.get(key, key.removesuffix('.weight')).replace('.', '_')}"
    return LoraKeys(f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")


def kohya_modules(component: Component, shapes: Shapes) -> dict[str, str]:
    """Canonical key of a weight -> the module's name in `lora_unet_` files, where it is another."""
    if not component.kind.startswith("unet"):
        return {}
    found = {}
    for rule in component.rules(shapes, "canonical", "diffusers"):
        for one in rule.assignments(shapes):
            if len(one.pieces) == 1 and one.target.endswith(".weight"):
                found[one.pieces[0].key] = one.target.removesuffix(".weight")
    return found


def lora_header(architecture: str, variant: str, title: str, rank: int) -> dict[str, str]:
    """What readers look for in a LoRA's header: `ss_*` of sd-scripts and ModelSpec's fields."""
    family = _FAMILIES.get((architecture, variant), _FAMILIES.get((architecture, "")))
    spec, base = family or (architecture, architecture)
    return {
        "ss_network_module": "networks.lora_flux" if architecture == "flux1" else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": base,
        "ss_v2": str(architecture == "sd2"),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{spec}/lora",
        "modelspec.implementation": _IMPLEMENTATION.get(architecture, "diffusers"),
        "modelspec.title": title,
    }
