"""What the Hub calls what a model does (pipeline_tag), and the words a repository is found by.

`text-generation` is what the Hub takes a GGUF for when nothing is said: never let it guess.
Tags: huggingface/huggingface.js packages/tasks (text-to-image, image-to-image, text-to-video,
image-to-video, feature-extraction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffquant.publish.facts import FileFacts
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES

__all__ = ["library_name", "pipeline_tag", "tags_of"]

_TEXT, _IMAGE = "text-to-image", "image-to-image"
# Architecture -> tag; what is not here makes pictures from text.
_TASKS: Mapping[str, str] = {
    "sdxl_refiner": _IMAGE,
    "wan": "text-to-video",
    "ltx": "text-to-video",
    "hunyuan": "text-to-video",
}
# Variants that do something else than their family, by how their name begins.
_VARIANTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "sd15": (("inpainting", _IMAGE), ("ip2p", _IMAGE), ("zero123", _IMAGE)),
    "sd2": (("inpainting", _IMAGE), ("depth", _IMAGE), ("marigold", "depth-estimation")),
    "sdxl": (("inpainting", _IMAGE), ("ip2p", _IMAGE)),
    "kolors": (("inpainting", _IMAGE),),
    "flux1": (("fill", _IMAGE), ("control", _IMAGE), ("kontext", _IMAGE)),
    "qwen_image": (("edit", _IMAGE), ("layered", _IMAGE)),
    "hunyuan": (
        ("dit", _TEXT),
        ("image", _TEXT),
        ("video_i2v", "image-to-video"),
        ("framepack", "image-to-video"),
    ),
    "wan": (
        ("i2v", "image-to-video"),
        ("flf2v", "image-to-video"),
        ("s2v", "image-to-video"),
        ("animate", "image-to-video"),
        ("ti2v", "image-to-video"),
    ),
}
_READERS = {
    "comfyui": "comfyui",
    "comfyui-gguf": "comfyui",
    "sdcpp": "stable-diffusion.cpp",
    "diffusers": "diffusers",
    "forge": "forge",
}


def pipeline_tag(file: FileFacts) -> str:
    """The tag of a file, "" for parts and for what is not recognised."""
    report = file.report
    if report.kind not in ("checkpoint", "diffusion_model") or report.architecture in (
        "unknown",
        "generic",
    ):
        return ""
    for begins, tag in _VARIANTS.get(report.architecture, ()):
        if report.variant.startswith(begins):
            return tag
    return _TASKS.get(report.architecture, _TEXT)


def library_name(files: Sequence[FileFacts]) -> str:
    """`gguf` where a file is one, `diffusers` for folders, else none: single files have a tag."""
    containers = {one.report.container for one in files}
    if "gguf" in containers:
        return "gguf"
    return "diffusers" if containers == {"diffusers_folder"} else ""


def tags_of(files: Sequence[FileFacts]) -> tuple[str, ...]:
    """Containers, programs that read every file, architectures, bits."""
    tags = []
    containers = {one.report.container for one in files}
    if "gguf" in containers:
        tags.append("gguf")
    if containers - {"diffusers_folder"}:
        tags.append("diffusion-single-file")
    for loader, tag in _READERS.items():
        if any(
            v.loader == loader and v.verdict in ("accepts", "caveat")
            for one in files
            for v in one.loaders
        ):
            tags.append(tag)
    tags += [one.report.architecture for one in files if one.report.architecture != "unknown"]
    bits = sorted({_bits(one) for one in files if one.is_quantized} - {0})
    tags += [f"{count}-bit" for count in bits]
    tags.append("diffquant")
    return tuple(dict.fromkeys(tags))


def _bits(file: FileFacts) -> int:
    """Whole bits of the type's base format, without scales, as the Hub's filters have them."""
    if file.type:
        return int(TYPES[file.type].bits)
    return int(FORMATS[file.largest].bits) if file.largest in FORMATS else 0
