"""Which files diffusers reads itself, and how it is asked to; the others are decoded for it.

Facts of huggingface/diffusers@58eb52c: src/diffusers/loaders/single_file_model.py lists the classes
that load single files; single_file_utils.py cuts Flux's and Chroma's fused rows at fixed widths;
quantizers/gguf/utils.py lists GGUF types; quantizers/bitsandbytes/bnb_quantizer.py wants a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match, PartMatch
from diffquant.core.errors import MalformedFile
from diffquant.quant.formats import FORMATS

__all__ = ["Route", "folder_of", "read_denoiser", "read_folder", "read_whole", "route_of"]

Way: TypeAlias = Literal["folder", "denoiser", "whole", "decoded"]

_FIXED_WIDTHS = {"flux1": 3072, "chroma": 3072}
# Whole checkpoints its pipelines load, text encoder and autoencoder included.
_WHOLE = ("sd15", "sd2", "sdxl", "sdxl_refiner")


@dataclass(frozen=True, slots=True)
class Route:
    """How a file reaches the library.

    Attributes:
        way: folder: `from_pretrained`; denoiser, whole: `from_single_file`; decoded: by diffquant.
        reason: why the library cannot read it, for `decoded`.
    """

    way: Way
    reason: str = ""


def folder_of(part: PartMatch) -> str:
    """The attribute of a pipeline that holds this part."""
    if part.architecture in ARCHITECTURES:
        return ARCHITECTURES[part.architecture].component(part.name).folder
    return part.name


def route_of(model: Path, host: Path, logical: LogicalSource, match: Match) -> Route:
    """Choose, from what the file holds.

    Args:
        model: the file or folder.
        host: Diffusers folder that says which pipeline it is.
        logical: its tensors.
        match: what they are.
    """
    formats = {tensor.format or tensor.dtype for tensor in logical.tensors.values()}
    packed = sorted(one for one in formats if one in FORMATS and not FORMATS[one].is_cast)
    if model.suffix.lower() == ".gguf":
        return _single(host, match, _unknown_gguf(packed))
    if model.is_dir():
        if not packed:
            return Route("folder")
        dialects = {tensor.dialect for tensor in logical.tensors.values()} - {"plain"}
        if dialects == {"bnb"} and torch.cuda.is_available():
            return Route("folder")
        why = "its bitsandbytes loader wants a GPU" if dialects == {"bnb"} else "it has no loader"
        return Route("decoded", f"{', '.join(packed)} weights, and {why}")
    if packed:
        return Route("decoded", f"it has no loader for {', '.join(packed)} in a single file")
    return _single(host, match, "")


def _single(host: Path, match: Match, problem: str) -> Route:
    """A single file: the denoiser alone, or a checkpoint of a family whose pipelines load one."""
    if problem:
        return Route("decoded", problem)
    names = [part.name for part in match.parts]
    if names != ["denoiser"]:
        if match.architecture in _WHOLE and {"vae", "text_encoder"} & set(names):
            return Route("whole")
        return Route("decoded", f"its pipelines load no {match.architecture} checkpoint whole")
    (denoiser,) = match.parts
    name = _class_name(host, folder_of(denoiser))
    if name not in _loadable():
        return Route("decoded", f"{name} loads no single files")
    wanted = _FIXED_WIDTHS.get(match.architecture)
    width = _width(denoiser)
    if wanted is not None and width != wanted:
        return Route(
            "decoded", f"its converter cuts fused rows for a width of {wanted}, this has {width}"
        )
    return Route("denoiser")


def _unknown_gguf(packed: list[str]) -> str:
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    known = {gguf.GGMLQuantizationType(one).name.lower() for one in SUPPORTED_GGUF_QUANT_TYPES}
    unknown = [one for one in packed if one not in known]
    return f"it cannot decode {', '.join(unknown)}" if unknown else ""


def _loadable() -> Mapping[str, object]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    found: Mapping[str, object] = SINGLE_FILE_LOADABLE_CLASSES
    return found


def _width(denoiser: PartMatch) -> int:
    """Width of a transformer: rows of the projection of its picture tokens."""
    for key in ("img_in.weight", "x_embedder.weight"):
        if key in denoiser.shapes:
            return denoiser.shapes[key][0]
    return 0


def _class_name(host: Path, folder: str) -> str:
    """The class a pipeline's folder names for a part.

    Raises:
        MalformedFile: no such entry.
    """
    path = host / "model_index.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[folder]
        return str(entry[1])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise MalformedFile(f"names no class for {folder}", path=path) from error


def read_folder(library: Any, folder: Path, dtype: torch.dtype, **given: Any) -> Any:  # noqa: ANN401
    """Let the library read a whole folder; parts its index says are absent are absent."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    return library.DiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, **absent, **given
    )


def read_denoiser(library: Any, model: Path, host: Path, folder: str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Let the library read a denoiser from a single file; packed GGUF weights stay packed."""
    extra: dict[str, Any] = {}
    if model.suffix.lower() == ".gguf":
        extra["quantization_config"] = library.GGUFQuantizationConfig(compute_dtype=dtype)
    kind = getattr(library, _class_name(host, folder))
    return kind.from_single_file(
        str(model),
        config=str(host),
        subfolder=folder,
        torch_dtype=dtype,
        local_files_only=True,
        **extra,
    )


def read_whole(library: Any, model: Path, host: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Let the library read a whole checkpoint; configs and tokenizers come from `host`."""
    name = json.loads((host / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    kind = getattr(library, name)
    return kind.from_single_file(
        str(model), config=str(host), torch_dtype=dtype, local_files_only=True
    )
