"""Configs of a Diffusers folder for a source that brings none: made of what was recognised.

Single files of other programs have no config.json. Shapes say depths and widths, the architecture's
defaults say the rest (heads, epsilons, scale and shift, scheduler); together they are the published
configs, field for field, but for fields that only repeat a class's own default (a test compares
them). Tokenizers cannot be made: `--base` brings them, or the report says that they are missing.

Pipeline classes: huggingface/diffusers@58eb52c:src/diffusers/pipelines/__init__.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import find_architecture
from diffquant.convert.hyper import Hyper
from diffquant.convert.match import Match

__all__ = ["INDEX", "made_configs"]

INDEX = "model_index.json"
_PIPELINES: Mapping[str, str] = {
    "sd15": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux1": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "chroma": "ChromaPipeline",
    "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline",
    "lumina2": "Lumina2Pipeline",
    "hidream": "HiDreamImagePipeline",
    "pixart": "PixArtSigmaPipeline",
    "auraflow": "AuraFlowPipeline",
    "kolors": "KolorsPipeline",
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "hunyuan": "HunyuanVideoPipeline",
}
_OF_VARIANTS: Mapping[tuple[str, str], str] = {
    ("sd15", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd2", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sdxl", "inpainting"): "StableDiffusionXLInpaintPipeline",
    ("flux1", "fill"): "FluxFillPipeline",
    ("flux1", "control"): "FluxControlPipeline",
    ("flux2", "klein_4b"): "Flux2KleinPipeline",
    ("flux2", "klein_9b"): "Flux2KleinPipeline",
}
_TOKENIZERS: Mapping[str, str] = {
    "clip_text": "CLIPTokenizer",
    "openclip_text": "CLIPTokenizer",
    "t5_encoder": "T5TokenizerFast",
    "qwen2_vl_text": "Qwen2Tokenizer",
    "qwen3_text": "Qwen2Tokenizer",
    "gemma2_text": "GemmaTokenizerFast",
}


def made_configs(match: Match) -> dict[str, Any]:
    """Relative path -> JSON object: every part's config.json, the scheduler's, model_index.json.

    Parts whose class nobody has stated here get none; the index is made of a whole pipeline only,
    since a part that it did not name would be taken for none.
    """
    architecture = find_architecture(match.architecture)
    if architecture is None:
        return {}
    index: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    folders = [architecture.component(one.name, one.kind).folder for one in match.parts]
    for folder, part in zip(folders, match.parts, strict=True):
        config = _config(part.hyper)
        name = _class_of(config)
        if not name:
            continue
        configs[f"{folder}/config.json"] = config
        index[folder] = ["diffusers" if "_class_name" in config else "transformers", name]
        if part.kind in _TOKENIZERS:
            index[_tokenizer(folder)] = ["transformers", _TOKENIZERS[part.kind]]
    pipeline = _pipeline(match)
    if match.architecture not in ARCHITECTURES or len(match.parts) < 2:
        return configs
    scheduler = _config(match.scheduler)
    if "_class_name" in scheduler:
        configs["scheduler/scheduler_config.json"] = scheduler
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if pipeline and all(folder in index for folder in folders):
        configs[INDEX] = {"_class_name": pipeline, **dict(sorted(index.items()))}
    return configs


def _config(hyper: Mapping[str, Hyper]) -> dict[str, Any]:
    """Fields as config.json has them; names with an underscore are recognition's own."""
    return {
        name: list(one.value) if isinstance(one.value, tuple) else one.value
        for name, one in hyper.items()
        if name == "_class_name" or not name.startswith("_")
    }


def _class_of(config: Mapping[str, Any]) -> str:
    named = config.get("_class_name") or (config.get("architectures") or [""])[0]
    return str(named)


def _tokenizer(folder: str) -> str:
    return folder.replace("text_encoder", "tokenizer")


def _pipeline(match: Match) -> str:
    own = _OF_VARIANTS.get((match.architecture, match.variant))
    return own or _PIPELINES.get(match.architecture, "")
