"""From paths to a Pipeline: find every part, keep weights packed, read configs and tokenizers.

Who has a part says providers.py; what is still missing is listed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diffquant.convert.architectures.base import Layout
from diffquant.convert.detect import PartMatch
from diffquant.convert.encoders.stated import stated_fields
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import to_layout
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.families import FAMILIES, PipelineParts
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import MODELS, Weights, build, model_for
from diffquant.runtime.memory.placement import Placement
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.packing import stored_weights
from diffquant.runtime.pipeline import Pipeline
from diffquant.runtime.provided_configs import hyper_of, index_says, native_size, scheduler_of
from diffquant.runtime.providers import Provider, choose, providers_for
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.synthetic import synthetic_pipeline
from diffquant.runtime.titles import titles_of
from diffquant.runtime.tokenizer_sources import Place, find_tokenizer
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["Opened", "PartOrigin", "open_pipeline"]


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
        sources: part -> where its weights are read from; readable while the files are open.
        modules: part -> its model.
        placement: brings the weights, where they were left in their files; None: all are here.
        titles: what the model's header or index calls it.
    """

    pipeline: Pipeline
    architecture: str
    variant: str
    origins: tuple[PartOrigin, ...]
    size: tuple[int, int]
    warnings: tuple[str, ...]
    sources: Mapping[str, tuple[LogicalSource, PartMatch]] = field(default_factory=dict)
    modules: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    placement: Placement | None = None
    titles: tuple[str, ...] = ()


def open_pipeline(
    model: Path,
    *,
    base: Path | None = None,
    vae: Path | None = None,
    added: Mapping[str, Path] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    denoiser_dtype: torch.dtype | None = None,
    files: contextlib.ExitStack | None = None,
    swapped: Mapping[str, Path] | None = None,
    synthetic: bool = False,
) -> Opened:
    """Open a model and everything it needs to make pictures.

    Args:
        model: Diffusers folder, single file of any written format, or a GGUF denoiser.
        base: folder or file that missing parts, configs and tokenizers come from.
        vae: VAE file that replaces the model's own; short for `added["vae"]`.
        added: part name -> file that holds this part, and replaces the model's own; or
            "tokenizer", "tokenizer_2" ... -> folder of that tokenizer.
        dtype: compute dtype.
        device: torch device.
        denoiser_dtype: compute dtype of the denoiser alone, where it differs.
        files: keeps the files open, and large weights stay in them until `Opened.placement` brings
            them; None: everything is read now, to the device.
        swapped: part name -> checkpoint that this part alone is taken from, the denoiser too.
        synthetic: open the denoiser alone, and let synthetic.py stand for the other parts.

    Raises:
        UsageError: parts that are nowhere to be found, all of them listed.
        ArchitectureError: no runtime for this architecture yet.
    """
    wanted = {**(added or {}), **({"vae": vae} if vae is not None else {})}
    given = {name: wanted.pop(name) for name in list(wanted) if name.startswith("tokenizer")}
    with contextlib.ExitStack() as opened_here:
        providers, extra = providers_for(files or opened_here, model, base, wanted, swapped or {})
        first = providers[0]
        architecture, match = first.architecture, first.match
        assert match is not None
        family = FAMILIES[architecture]
        needs = ("denoiser",) if synthetic else family.needs
        chosen = choose(providers, extra, needs)
        modules: dict[str, torch.nn.Module] = {}
        origins, warnings = [], []
        for name, provider in chosen.items():
            part = provider.parts[name]
            kind = model_for(part.kind)
            if kind is None:
                raise ArchitectureError(
                    f"{provider.path}: the runtime has no {part.kind}, which the {name} is"
                )
            row = MODELS[kind]
            stored = stored_weights(provider.logical, part, row.layout, row.reads)
            weights: Weights = stored
            if files is None:
                weights = {key: weight.load() for key, weight in stored.items()}
            own = provider.source.metadata
            hyper = {
                **hyper_of([provider, *extra.values(), *providers], architecture, name, part),
                **stated_fields(own, part.kind),
            }
            compute = denoiser_dtype if name == "denoiser" and denoiser_dtype else dtype
            modules[name] = build(kind, weights, hyper, dtype=compute, device=device)
            outlines = {key: weight.outline for key, weight in stored.items()}
            origins.append(_origin(name, provider, outlines))
            warnings.extend(_decoded(name, outlines, provider, part, row.layout))
        scheduler = SchedulerFacts.from_config(scheduler_of(providers))
        placement = None if files is None else Placement(modules, torch.device(device))
        if synthetic:
            pipeline = synthetic_pipeline(architecture, modules["denoiser"], scheduler)
        else:
            parts = _parts(architecture, modules, chosen, providers, extra, given, scheduler)
            pipeline = Pipeline(parts, placement)
        return Opened(
            pipeline=pipeline,
            architecture=architecture,
            variant=match.variant,
            origins=tuple(origins),
            size=native_size(providers, architecture, pipeline.parts.vae),
            warnings=tuple(warnings),
            sources={name: (one.logical, one.parts[name]) for name, one in chosen.items()},
            modules=modules,
            placement=placement,
            titles=titles_of(first.source.metadata, first.source.configs),
        )


def _parts(
    architecture: str,
    modules: Mapping[str, torch.nn.Module],
    chosen: Mapping[str, Provider],
    providers: list[Provider],
    extra: Mapping[str, Provider],
    given: Mapping[str, Path],
    scheduler: SchedulerFacts,
) -> PipelineParts:
    """Put built modules and their tokenizers together."""
    vae = modules["vae"]
    assert isinstance(vae, Autoencoder)
    encoders = [name for name in FAMILIES[architecture].needs if name.startswith("text_encoder")]
    _check_given(given, encoders, architecture)
    sources = [*providers, *extra.values()]
    return PipelineParts(
        architecture=architecture,
        denoiser=modules["denoiser"],
        vae=vae,
        text_encoders=tuple(modules[name] for name in encoders),
        tokenizers=tuple(
            _tokenizer(sources, chosen[name], name, given, modules[name]) for name in encoders
        ),
        scheduler=scheduler,
        zeros_for_empty=index_says(providers, "force_zeros_for_empty_prompt", default=True),
        distilled=index_says(providers, "is_distilled", default=False),
    )


def _decoded(
    name: str,
    weights: Mapping[str, PackedWeight],
    provider: Provider,
    part: PartMatch,
    layout: Layout,
) -> list[str]:
    """Say which weights were not kept packed."""
    keys = [
        a.target
        for a in to_layout(part, layout)
        if a.target in weights
        and any(provider.logical.tensors[p.key].is_quantized for p in a.pieces)
        and "f32" in weights[a.target].formats
    ]
    return [f"{name}: {len(keys)} packed weights had to be decoded: {keys[0]}"] if keys else []


def _origin(name: str, provider: Provider, weights: Mapping[str, PackedWeight]) -> PartOrigin:
    formats: dict[str, int] = {}
    for weight in weights.values():
        for segment in weight.segments:
            size = int(np.prod(segment.shape, dtype=np.int64))
            formats[segment.format] = formats.get(segment.format, 0) + size
    nbytes = sum(weight.nbytes for weight in weights.values())
    return PartOrigin(name, str(provider.path), nbytes, formats)


def _check_given(given: Mapping[str, Path], encoders: list[str], architecture: str) -> None:
    known = [name.replace("text_encoder", "tokenizer") for name in encoders]
    strange = [name for name in given if name not in known]
    if strange:
        raise UsageError(f"{architecture} takes no {strange[0]} (it has {', '.join(known)})")


def _tokenizer(
    providers: list[Provider],
    chosen: Provider,
    encoder: str,
    given: Mapping[str, Path],
    module: torch.nn.Module,
) -> Tokenizer:
    """The tokenizer of an encoder; a GGUF header counts where the encoder comes from it."""
    places = [Place(one.path, one.source.metadata, one is chosen) for one in providers]
    kind = chosen.parts[encoder].kind
    return find_tokenizer(encoder, kind, places, given=given, table=module)
