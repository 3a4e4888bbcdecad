"""From paths to a Pipeline: find every part, keep weights packed, read configs and tokenizers.

A part is taken from the model itself, else from `--vae` / `--base`, else from where the user's
cache remembers the source of a file we wrote; what is still missing is listed. Weights go from the
mapped file into torch tensors of their stored type, one at a time; nothing is unpacked here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import Match, PartMatch, detect, detect_component, to_canonical
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.output import configs_of
from diffquant.convert.remember import recall
from diffquant.convert.rules import Assignment
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.core.heap import give_back_freed_blocks
from diffquant.core.tensors import ByteArray, TensorSource
from diffquant.io import open_source
from diffquant.quant.formats import FORMATS
from diffquant.runtime.families import FAMILIES, PipelineParts
from diffquant.runtime.layers import PackedWeight, Segment
from diffquant.runtime.loading import build
from diffquant.runtime.models.vae_kl import AutoencoderKL
from diffquant.runtime.pipeline import Pipeline
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.tokenizers import Tokenizer, load_tokenizer

__all__ = ["Opened", "PartOrigin", "open_pipeline", "packed_weights"]

# What a picture needs, in the order PipelineParts wants text encoders.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "sd15": ("denoiser", "vae", "text_encoder"),
    "flux1": ("denoiser", "vae", "text_encoder", "text_encoder_2"),
}
_KINDS = {
    "unet_ldm": "unet",
    "flux": "flux",
    "vae_kl": "vae_kl",
    "clip_text": "clip",
    "t5_encoder": "t5",
}
_LARGEST = 4096  # pixels; a config that says more is not followed
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # an exponent, which the kernels look up
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class PartOrigin:
    """Where a part came from and what it holds."""

    name: str
    path: str
    nbytes: int
    formats: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Opened:
    """A pipeline ready to run.

    Attributes:
        pipeline: holds the modules.
        architecture, variant: of the denoiser.
        origins: one row per part.
        size: native (width, height) by the configs, for callers that were given none.
        warnings: what was decoded, guessed or odd.
    """

    pipeline: Pipeline
    architecture: str
    variant: str
    origins: tuple[PartOrigin, ...]
    size: tuple[int, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Provider:
    """One opened source that parts may come from."""

    path: Path
    source: TensorSource
    logical: LogicalSource
    parts: Mapping[str, PartMatch]
    architecture: str
    match: Match | None


@contextlib.contextmanager
def _providers(
    model: Path, base: Path | None, vae: Path | None
) -> Iterator[tuple[list[_Provider], list[str]]]:
    """Open the model, then whatever may fill its gaps, in order of precedence."""
    warnings: list[str] = []
    with contextlib.ExitStack() as stack:
        first = _provide(stack, model)
        if first.match is None:
            raise ArchitectureError(f"{model}: a single part, not a model")
        found = [first]
        if vae is not None:
            found.append(_provide_component(stack, vae, "vae"))
        if base is not None:
            found.append(_provide(stack, base))
        else:
            mark = first.source.metadata.get("diffquant.source.fingerprint")
            remembered = recall(mark) if isinstance(mark, str) else None
            if remembered is not None:
                found.append(_provide(stack, remembered))
        yield found, warnings


def _provide(stack: contextlib.ExitStack, path: Path) -> _Provider:
    source = stack.enter_context(open_source(path))
    logical = bind(source)
    match = detect(logical.specs(), source.metadata, source.configs)
    parts = {part.name: part for part in match.parts}
    return _Provider(path, source, logical, parts, match.architecture, match)


def _provide_component(stack: contextlib.ExitStack, path: Path, name: str) -> _Provider:
    source = stack.enter_context(open_source(path))
    logical = bind(source)
    part = detect_component(logical.specs())
    if part is None or part.name != name:
        found = "an unknown file" if part is None else f"a {part.name}"
        raise UsageError(f"{path}: expected a {name}, found {found}")
    return _Provider(path, source, logical, {name: part}, "", None)


def open_pipeline(
    model: Path,
    *,
    base: Path | None = None,
    vae: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    denoiser_dtype: torch.dtype | None = None,
) -> Opened:
    """Open a model and everything it needs to make pictures.

    Args:
        model: Diffusers folder, single file of any written format, or a GGUF denoiser.
        base: folder or file that missing parts, configs and tokenizers come from.
        vae: VAE file that replaces the model's own.
        dtype: compute dtype.
        device: torch device.
        denoiser_dtype: compute dtype of the denoiser alone, where it differs.

    Raises:
        UsageError: parts that are nowhere to be found, all of them listed.
        ArchitectureError: no runtime for this architecture yet.
    """
    with _providers(model, base, vae) as (providers, warnings):
        first = providers[0]
        architecture = first.architecture
        if architecture not in _NEEDS or architecture not in FAMILIES:
            known = ", ".join(sorted(_NEEDS))
            raise ArchitectureError(
                f"{model}: {architecture} has no runtime yet (there is one for {known}); the file "
                "can be inspected, converted and verified at tensor level"
            )
        chosen = _choose(providers, architecture, vae is not None)
        modules: dict[str, torch.nn.Module] = {}
        origins = []
        for name, provider in chosen.items():
            part = provider.parts[name]
            weights = packed_weights(provider.logical, part)
            hyper = _hyper(providers, architecture, name, part)
            compute = denoiser_dtype if name == "denoiser" and denoiser_dtype else dtype
            modules[name] = build(_KINDS[part.kind], weights, hyper, dtype=compute, device=device)
            origins.append(_origin(name, provider, weights))
            warnings.extend(_decoded(name, weights, provider, part))
        vae_module = modules["vae"]
        assert isinstance(vae_module, AutoencoderKL)
        encoders = [n for n in _NEEDS[architecture] if n.startswith("text_encoder")]
        parts = PipelineParts(
            architecture=architecture,
            denoiser=modules["denoiser"],
            vae=vae_module,
            text_encoders=tuple(modules[name] for name in encoders),
            tokenizers=tuple(_tokenizer(providers, name, model) for name in encoders),
            scheduler=SchedulerFacts.from_config(_scheduler(providers)),
        )
        match = first.match
        assert match is not None
        return Opened(
            pipeline=Pipeline(parts),
            architecture=architecture,
            variant=match.variant,
            origins=tuple(origins),
            size=_native_size(providers, architecture, vae_module),
            warnings=tuple(warnings),
        )


def _choose(providers: list[_Provider], architecture: str, own_vae: bool) -> dict[str, _Provider]:
    """Pick the provider of every needed part; `--vae` outranks the model's own."""
    chosen: dict[str, _Provider] = {}
    missing = []
    for name in _NEEDS[architecture]:
        order = providers
        if name == "vae" and own_vae:
            order = [providers[1], *providers]
        usable = [p for p in order if name in p.parts and p.architecture in ("", architecture)]
        if name == "denoiser":
            usable = providers[:1] if name in providers[0].parts else []
        if usable:
            chosen[name] = usable[0]
        else:
            missing.append(name)
    if missing:
        raise UsageError(
            f"{providers[0].path} has no {', '.join(missing)}: give a folder or checkpoint of the "
            f"same family with --base{' or a file with --vae' if 'vae' in missing else ''}"
        )
    return chosen


def packed_weights(logical: LogicalSource, part: PartMatch) -> dict[str, PackedWeight]:
    """Load a part's weights by canonical key, packed as they are stored.

    On Linux this also tells the C library, for the whole process, to give large freed blocks back.
    """
    give_back_freed_blocks()  # a decoded layer must not stay part of the process
    return {
        assignment.target: PackedWeight(_segments(logical, assignment))
        for assignment in to_canonical(part)
    }


def _segments(logical: LogicalSource, assignment: Assignment) -> tuple[Segment, ...]:
    """One segment per piece, so that fused weights need no common format.

    A piece that is only some rows of a packed weight, or a type the kernels lack, is decoded.
    """
    tail = assignment.shape[1:]
    segments = []
    for piece in assignment.pieces:
        tensor = logical.tensors[piece.key]
        rows = tensor.shape[0] if tensor.shape else 1
        whole = (piece.start, piece.stop) == (0, rows)
        shape = (piece.stop - piece.start, *tail) if assignment.shape else ()
        known = bool(tensor.format) and not assignment.transpose
        if tensor.reshaped and known:  # rows of 256 that are no whole rows of the weight
            known = not FORMATS[tensor.format].check(tensor.shape)
        if known and (whole or FORMATS[tensor.format].is_cast):
            segments.append(_packed(logical, tensor, shape, (piece.start, piece.stop)))
        else:
            values = logical.read(piece.key)
            flat = values.reshape(rows, -1)[piece.start : piece.stop]
            flat = flat.T if assignment.transpose else flat
            plain = torch.from_numpy(np.array(flat, dtype=np.float32)).reshape(
                assignment.shape if assignment.transpose else shape
            )
            segments.append(Segment("f32", tuple(plain.shape), {"weight": plain}))
    return tuple(segments)


def _packed(
    logical: LogicalSource, tensor: LogicalTensor, shape: tuple[int, ...], rows: tuple[int, int]
) -> Segment:
    parts = {}
    for name, key in tensor.parts.items():
        spec = logical.source.specs[key]
        data = logical.source.read(key)
        if FORMATS[tensor.format].is_cast and spec.size:
            per = spec.nbytes // (tensor.shape[0] if tensor.shape else 1)
            data = data[rows[0] * per : rows[1] * per]
        parts[name] = _as_torch(data, spec.dtype, name, tensor, shape)
    for name, value in tensor.constants.items():
        parts[name] = torch.tensor(value, dtype=torch.float32)
    return Segment(tensor.format, shape, parts)


def _as_torch(
    data: ByteArray, dtype: str, name: str, tensor: LogicalTensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Copy bytes off the map into a tensor of the stored dtype, in the part's own shape."""
    owned = torch.from_numpy(np.array(data, dtype=np.uint8))
    if dtype not in _TORCH:  # ggml blocks stay bytes: (N, bytes per row)
        return owned.reshape(shape[0], -1)
    typed = owned.view(_TORCH[dtype])
    row = FORMATS[tensor.format]
    if row.is_tiled:
        part = next(one for one in row.parts if one.name == name)
        typed = typed.float() if part.dtype == "F32" else typed  # 16 bits in some files
        return typed.reshape(part.shape(shape))
    if name == "weight":
        return typed.reshape(-1) if row.flat_block else typed.reshape(_matrix(tensor, shape))
    if name == "scale":
        typed = typed.float()  # some files hold scales of 16 bits
        return typed.reshape(()) if typed.numel() == 1 else typed.reshape(-1, 1)
    return typed.reshape(-1)


def _matrix(tensor: LogicalTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if FORMATS[tensor.format].is_cast or len(shape) < 2:
        return shape
    return shape[0], -1


def _decoded(
    name: str, weights: Mapping[str, PackedWeight], provider: _Provider, part: PartMatch
) -> list[str]:
    """Say which weights were not kept packed."""
    keys = [
        a.target
        for a in to_canonical(part)
        if any(provider.logical.tensors[p.key].is_quantized for p in a.pieces)
        and "f32" in weights[a.target].formats
    ]
    return [f"{name}: {len(keys)} packed weights had to be decoded: {keys[0]}"] if keys else []


def _origin(name: str, provider: _Provider, weights: Mapping[str, PackedWeight]) -> PartOrigin:
    formats: dict[str, int] = {}
    for weight in weights.values():
        for segment in weight.segments:
            size = int(np.prod(segment.shape, dtype=np.int64))
            formats[segment.format] = formats.get(segment.format, 0) + size
    nbytes = sum(weight.nbytes for weight in weights.values())
    return PartOrigin(name, str(provider.path), nbytes, formats)


def _hyper(
    providers: list[_Provider], architecture: str, name: str, part: PartMatch
) -> dict[str, Any]:
    """Facts that shapes cannot say: the part's own, else a provider's config of the same part."""
    known = {key: hyper.value for key, hyper in part.hyper.items()}
    if any(hyper.origin in ("config.json", "diffquant.config") for hyper in part.hyper.values()):
        return known
    folder = ARCHITECTURES[architecture].component(name).folder
    for provider in providers:
        config = configs_of(provider.source).get(f"{folder}/config.json")
        if isinstance(config, dict):
            return {**known, **config}
    return known


def _scheduler(providers: list[_Provider]) -> Mapping[str, Any]:
    for provider in providers:
        config = configs_of(provider.source).get("scheduler/scheduler_config.json")
        if isinstance(config, dict):
            return config
    match = providers[0].match
    assert match is not None
    return {name: hyper.value for name, hyper in match.scheduler.items()}


def _tokenizer(providers: list[_Provider], encoder: str, model: Path) -> Tokenizer:
    folder = encoder.replace("text_encoder", "tokenizer")
    for provider in providers:
        candidate = provider.path / folder
        if candidate.is_dir():
            return load_tokenizer(candidate)
    raise UsageError(
        f"{model} brings no tokenizer: give a Diffusers folder that has {folder}/ with --base"
    )


def _native_size(
    providers: list[_Provider], architecture: str, vae: AutoencoderKL
) -> tuple[int, int]:
    """Picture size by the configs: the denoiser's in latents, else the VAE's, else the default.

    Flux transformers state no size; their VAE's config does (1024 in the published ones).
    """
    for part, factor in (("denoiser", vae.config.factor), ("vae", 1)):
        folder = ARCHITECTURES[architecture].component(part).folder
        for provider in providers:
            config = configs_of(provider.source).get(f"{folder}/config.json")
            size = config.get("sample_size") if isinstance(config, dict) else None
            if isinstance(size, int) and 0 < size * factor <= _LARGEST:
                return size * factor, size * factor
    match = providers[0].match
    assert match is not None
    sampling = ARCHITECTURES[architecture].sampling_for(match.variant)
    return sampling.width, sampling.height
