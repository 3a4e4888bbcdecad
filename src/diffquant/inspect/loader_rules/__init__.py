"""LOADER_RULES: what programs do with files, one file of rows per program, each with its source."""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.comfyui import ROWS as COMFYUI
from diffquant.inspect.loader_rules.comfyui_gguf import ROWS as COMFYUI_GGUF
from diffquant.inspect.loader_rules.diffusers import ROWS as DIFFUSERS
from diffquant.inspect.loader_rules.forge import ROWS as FORGE
from diffquant.inspect.loader_rules.ours import ROWS as OURS
from diffquant.inspect.loader_rules.rule import VERDICTS, LoaderRule, Verdict
from diffquant.inspect.loader_rules.sdcpp import ROWS as SDCPP

__all__ = ["LOADERS", "LOADER_RULES", "VERDICTS", "Case", "LoaderRule", "Verdict"]

# Loader -> one line for people; names are those of `--target` where there is one.
LOADERS: Mapping[str, str] = {
    "comfyui": "ComfyUI's own loaders",
    "comfyui-gguf": "ComfyUI with ComfyUI-GGUF",
    "forge": "stable-diffusion-webui-forge",
    "diffusers": "diffusers: from_single_file, from_pretrained, load_lora_weights",
    "sdcpp": "stable-diffusion.cpp",
    "diffquant": "diffquant generate",
}

_MATRIX = tuple(
    LoaderRule(
        f"{name}.imatrix",
        "refuses",
        "an importance matrix is no model: it goes to `diffquant quantize --imatrix`",
        "ggml-org/llama.cpp:tools/imatrix/README.md",
        kinds=frozenset({"imatrix"}),
    )
    for name in LOADERS
)

LOADER_RULES: tuple[LoaderRule, ...] = (
    *COMFYUI,
    *COMFYUI_GGUF,
    *FORGE,
    *DIFFUSERS,
    *SDCPP,
    *OURS,
    *_MATRIX,
)
