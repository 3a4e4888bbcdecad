"""From paths to a Pipeline: find every part, keep weights packed, read configs and tokenizers.

A part is taken from the file `--add` names for it, else from the model itself, else from `--base`,
else from where the user's
cache remembers the source of a file we wrote; what is still missing is listed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.base import Layout
from diffquant.convert.binding import bind
from diffquant.convert.detect import Match, PartMatch, detect, detect_component
from diffquant.convert.encoders.stated import stated_fields
from diffquant.convert.hyper import flat_config
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import to_layout
from diffquant.convert.output import configs_of
from diffquant.convert.remember import recall
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source
from diffquant.runtime.families import FAMILIES, Family, PipelineParts
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import MODELS, Weights, build, model_for
from diffquant.runtime.memory.placement import Placement
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.packing import stored_weights
from diffquant.runtime.pipeline import Pipeline
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.synthetic import synthetic_pipeline
from diffquant.runtime.titles import titles_of
from diffquant.runtime.tokenizer_sources import Place, find_tokenizer
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["Opened", "PartOrigin", "missing_parts", "open_pipeline", "stand_ins_warning"]

_LARGEST = 4096  # pixels; a config that says more is not followed


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


@dataclass(frozen=True, slots=True)
class _Provider:
    """One opened source that parts may come from."""

    path: Path
    source: TensorSource
    logical: LogicalSource
    parts: Mapping[str, PartMatch]
    architecture: str
    match: Match | None


def _providers(
    stack: contextlib.ExitStack,
    model: Path,
    base: Path | None,
    added: Mapping[str, Path],
    swapped: Mapping[str, Path],
) -> tuple[list[_Provider], dict[str, _Provider]]:
    """Open the model and whatever may fill its gaps, in order of precedence; and added parts."""
    first = _provide(stack, model)
    if first.match is None:
        raise ArchitectureError(f"{model}: a single part, not a model")
    found = [first]
    family = _family(first)
    extra = {
        name: _provide_component(stack, path, name, first.architecture, family)
        for name, path in added.items()
    }
    extra |= {
        name: _provide_part(stack, path, name, first.architecture, family)
        for name, path in swapped.items()
    }
    if base is not None:
        found.append(_provide(stack, base))
    else:
        mark = first.source.metadata.get("diffquant.source.fingerprint")
        remembered = recall(mark) if isinstance(mark, str) else None
        if remembered is not None:
            found.append(_provide(stack, remembered))
    return found, extra


def _family(first: _Provider) -> Family:
    if first.architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ArchitectureError(
            f"{first.path}: {first.architecture} has no runtime yet (there is one for {known}); "
            "--engine diffusers draws with it where diffusers is installed; without, it can be "
            "inspected, converted and verified at tensor level"
        )
    return FAMILIES[first.architecture]


def _provide(stack: contextlib.ExitStack, path: Path) -> _Provider:
    source = stack.enter_context(open_source(path))
    logical = bind(source)
    match = detect(logical.specs(), source.metadata, source.configs)
    parts = {part.name: part for part in match.parts}
    return _Provider(path, source, logical, parts, match.architecture, match)


def _provide_component(
    stack: contextlib.ExitStack, path: Path, name: str, architecture: str, family: Family
) -> _Provider:
    """Open a file that holds one part, which must be of the model that the family runs there."""
    if name not in family.needs or name == "denoiser":
        known = ", ".join(one for one in family.needs if one != "denoiser")
        raise UsageError(f"{architecture} takes no part {name!r} (parts: {known})")
    source = stack.enter_context(open_source(path))
    logical = bind(source)
    part = detect_component(logical.specs())
    rows = ARCHITECTURES[architecture].components
    wanted = [row.kind for row in rows if row.name == name]
    if part is None or (part.kind not in wanted and (name != "vae" or part.name != "vae")):
        found = "an unknown file" if part is None else f"a {part.name} ({part.kind})"
        raise UsageError(f"{path}: expected a {name} ({' or '.join(wanted)}), found {found}")
    return _Provider(path, source, logical, {name: part}, architecture, None)


def _provide_part(
    stack: contextlib.ExitStack, path: Path, name: str, architecture: str, family: Family
) -> _Provider:
    """Open a checkpoint of which one part counts; it may hold others, or that part alone."""
    if name not in family.needs:
        known = ", ".join(family.needs)
        raise UsageError(f"{architecture} has no part {name!r} (parts: {known})")
    source = stack.enter_context(open_source(path))
    logical = bind(source)
    alone = None if name == "denoiser" else detect_component(logical.specs())
    if alone is not None:
        source.close()
        return _provide_component(stack, path, name, architecture, family)
    match = detect(logical.specs(), source.metadata, source.configs)
    if match.architecture != architecture:
        raise ArchitectureError(f"{path}: expected {architecture}, found {match.architecture}")
    part = match.part(name)
    if part is None:
        have = ", ".join(one.name for one in match.parts)
        raise UsageError(f"{path} has no {name} (it has {have})")
    return _Provider(path, source, logical, {name: part}, architecture, match)


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
        providers, extra = _providers(files or opened_here, model, base, wanted, swapped or {})
        first = providers[0]
        architecture, match = first.architecture, first.match
        assert match is not None
        family = FAMILIES[architecture]
        needs = ("denoiser",) if synthetic else family.needs
        chosen = _choose(providers, extra, needs)
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
                **_hyper([provider, *extra.values(), *providers], architecture, name, part),
                **stated_fields(own, part.kind),
            }
            compute = denoiser_dtype if name == "denoiser" and denoiser_dtype else dtype
            modules[name] = build(kind, weights, hyper, dtype=compute, device=device)
            outlines = {key: weight.outline for key, weight in stored.items()}
            origins.append(_origin(name, provider, outlines))
            warnings.extend(_decoded(name, outlines, provider, part, row.layout))
        scheduler = SchedulerFacts.from_config(_scheduler(providers))
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
            size=_native_size(providers, architecture, pipeline.parts.vae),
            warnings=tuple(warnings),
            sources={name: (one.logical, one.parts[name]) for name, one in chosen.items()},
            modules=modules,
            placement=placement,
            titles=titles_of(first.source.metadata, first.source.configs),
        )


def _parts(
    architecture: str,
    modules: Mapping[str, torch.nn.Module],
    chosen: Mapping[str, _Provider],
    providers: list[_Provider],
    extra: Mapping[str, _Provider],
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
        zeros_for_empty=_index_says(providers, "force_zeros_for_empty_prompt", default=True),
        distilled=_index_says(providers, "is_distilled", default=False),
    )


def missing_parts(
    model: Path, *, base: Path | None = None, vae: Path | None = None
) -> tuple[str, ...]:
    """Names of parts that a picture takes and that neither the files nor the user's cache have.

    Raises:
        ArchitectureError: no runtime for this architecture yet.
    """
    added = {"vae": vae} if vae is not None else {}
    with contextlib.ExitStack() as stack:
        providers, extra = _providers(stack, model, base, added, {})
        needs = FAMILIES[providers[0].architecture].needs
        return tuple(name for name in needs if not _usable(providers, extra, name))


def stand_ins_warning(sides: Iterable[tuple[Path, Path | None]], vae: Path | None) -> str:
    """Say which side, of (model, base) each, lacks parts, so that all go without; "" for none."""
    for model, base in sides:
        missing = missing_parts(model, base=base, vae=vae)
        if missing and "denoiser" not in missing:
            return (
                f"{model} has no {', '.join(missing)}: denoisers are compared alone, on synthetic "
                "text, by colours of their latents; with --base MODEL they are judged by pictures"
            )
    return ""


def _usable(
    providers: list[_Provider], extra: Mapping[str, _Provider], name: str
) -> list[_Provider]:
    """Who has a part, in order of precedence; the denoiser is the model's own or nobody's."""
    architecture = providers[0].architecture
    if name in extra:
        return [extra[name]]
    if name == "denoiser":
        return providers[:1] if name in providers[0].parts else []
    return [one for one in providers if name in one.parts and one.architecture == architecture]


def _choose(
    providers: list[_Provider], extra: Mapping[str, _Provider], needs: tuple[str, ...]
) -> dict[str, _Provider]:
    """Pick the provider of every needed part; an added file outranks the model's own part."""
    usable = {name: _usable(providers, extra, name) for name in needs}
    missing = [name for name, found in usable.items() if not found]
    if missing:
        raise UsageError(
            f"{providers[0].path} has no {', '.join(missing)}: give a folder or checkpoint of the "
            f"same family with --base, or each part's file with --add {missing[0]}=FILE"
        )
    return {name: found[0] for name, found in usable.items()}


def _decoded(
    name: str,
    weights: Mapping[str, PackedWeight],
    provider: _Provider,
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
    row = ARCHITECTURES[architecture]
    known = {
        **row.hyper_defaults.get(name, {}),  # a part alone in its file knows no family
        **{key: hyper.value for key, hyper in part.hyper.items()},
    }
    if any(hyper.origin in ("config.json", "diffquant.config") for hyper in part.hyper.values()):
        return known
    folder = row.component(name).folder
    for provider in providers:
        config = configs_of(provider.source).get(f"{folder}/config.json")
        if isinstance(config, dict):
            return {**known, **flat_config(config)}
    return known


def _scheduler(providers: list[_Provider]) -> Mapping[str, Any]:
    for provider in providers:
        config = configs_of(provider.source).get("scheduler/scheduler_config.json")
        if isinstance(config, dict):
            return config
    match = providers[0].match
    assert match is not None
    return {name: hyper.value for name, hyper in match.scheduler.items()}


def _index_says(providers: list[_Provider], field: str, *, default: bool) -> bool:
    """A yes or no of a folder's model_index.json."""
    for provider in providers:
        index = configs_of(provider.source).get("model_index.json")
        if isinstance(index, dict) and isinstance(index.get(field), bool):
            return bool(index[field])
    return default


def _check_given(given: Mapping[str, Path], encoders: list[str], architecture: str) -> None:
    known = [name.replace("text_encoder", "tokenizer") for name in encoders]
    strange = [name for name in given if name not in known]
    if strange:
        raise UsageError(f"{architecture} takes no {strange[0]} (it has {', '.join(known)})")


def _tokenizer(
    providers: list[_Provider],
    chosen: _Provider,
    encoder: str,
    given: Mapping[str, Path],
    module: torch.nn.Module,
) -> Tokenizer:
    """The tokenizer of an encoder; a GGUF header counts where the encoder comes from it."""
    places = [Place(one.path, one.source.metadata, one is chosen) for one in providers]
    kind = chosen.parts[encoder].kind
    return find_tokenizer(encoder, kind, places, given=given, table=module)


def _native_size(
    providers: list[_Provider], architecture: str, vae: Autoencoder
) -> tuple[int, int]:
    """Picture size by the configs: the denoiser's in latents, else the VAE's, else the default.

    Flux transformers state no size; their VAE's config does (1024 in the published ones). Classes
    without such a field may have it with an underscore, which diffusers passes over.
    """
    for part, factor in (("denoiser", vae.config.factor), ("vae", 1)):
        folder = ARCHITECTURES[architecture].component(part).folder
        for provider in providers:
            config = configs_of(provider.source).get(f"{folder}/config.json")
            known = config if isinstance(config, dict) else {}
            size = known.get("sample_size", known.get("_sample_size"))
            if isinstance(size, int) and 0 < size * factor <= _LARGEST:
                return size * factor, size * factor
    match = providers[0].match
    assert match is not None
    sampling = ARCHITECTURES[architecture].sampling_for(match.variant)
    return sampling.width, sampling.height
