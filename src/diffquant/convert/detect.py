"""What a checkpoint is, by header facts alone: names and shapes, configs, metadata.

Specs are logical: quantized companions are folded away before. Exactly one architecture matches,
or an error says what came nearest and what it lacks. What headers cannot tell is not guessed but
said in `evidence`. Every hyperparameter names its origin: the source's config.json, the
`diffquant.config` we write into headers, the shapes, or the architecture's default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.base import WRAPPERS, Architecture, Facts
from diffquant.convert.architectures.parts import PART_ORDER, PARTS, TITLES
from diffquant.convert.hyper import Configs, Hyper, configs_of, flat_config, merge
from diffquant.convert.kinds import kind_of
from diffquant.convert.match import Match, PartMatch, to_canonical, to_diffusers, to_layout
from diffquant.convert.matching import Below, Found, Near, find, unknown
from diffquant.convert.rules import Shape
from diffquant.core.errors import AmbiguousArchitecture
from diffquant.core.tensors import TensorSpec

__all__ = [
    "Hyper",
    "Match",
    "PartMatch",
    "detect",
    "detect_component",
    "detect_encoder",
    "detect_part",
    "flat_config",
    "kind_of",
    "to_canonical",
    "to_diffusers",
    "to_layout",
]

_LEFTOVERS = (
    (r"^model_ema\.", "EMA copy of the denoiser"),
    (
        r"^(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|denoiser\.sigmas|logvar)$",
        "noise schedule buffer, computed from the scheduler's numbers",
    ),
    (r"^(edm_mean|edm_std|v_pred|ztsnr|edm_vpred\.\w+)$", "marker read at detection"),
    (r"(^|[./])position_ids$", "0, 1, 2 ...: the model builds it itself"),
    (r"^transformer_2/", "second expert, a model of its own: convert its folder by itself"),
    (r"^safety_checker/", "safety checker, not part of the model"),
    (r"", "belongs to no part of this architecture"),
)


def detect(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
    *,
    only: str = "",
) -> Match:
    """Recognise a checkpoint.

    Args:
        specs: logical specs by key; in a folder "subfolder/key".
        metadata: the header's key-value pairs.
        configs: JSON files beside the tensors, by relative path.
        only: slug of the one architecture to try.

    Raises:
        UnknownArchitecture: nothing matches; carries the nearest candidates.
        AmbiguousArchitecture: more than one architecture matches.
    """
    shapes = {key: spec.shape for key, spec in specs.items()}
    folder = any("/" in key for key in shapes)
    below = Below(shapes)
    found = list(_denoisers(below, folder=folder, only=only))
    hits = [(slug, one) for slug, one in found if isinstance(one, Found)]
    slugs = list(dict.fromkeys(slug for slug, _ in hits))
    if not slugs:
        raise unknown(specs, [one for _, one in found if isinstance(one, Near)])
    if len(slugs) > 1:
        raise AmbiguousArchitecture(
            f"the tensors fit {' and '.join(slugs)}: expected one architecture; split the file"
        )
    architecture = ARCHITECTURES[slugs[0]]
    denoiser = max((one for _, one in hits), key=lambda one: len(one.shapes))
    files = configs_of(metadata or {}, configs or {})
    return _match(architecture, denoiser, shapes, below, files, folder=folder)


def detect_encoder(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
) -> Match | None:
    """Recognise a file that holds one text encoder, as a model of its own; None for others."""
    match = detect_part(specs, metadata, configs)
    return match if match is not None and match.architecture in TITLES else None


def detect_part(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
) -> Match | None:
    """Recognise a file that holds one part alone, a text encoder or a VAE; None for others."""
    found = _find_part(specs)
    if found is None:
        return None
    row = PARTS[found.component.kind]
    shapes = {key: spec.shape for key, spec in specs.items()}
    files = configs_of(metadata or {}, configs or {})
    warnings: list[str] = []
    part = _part(found, files, {}, warnings)
    names = "llama.cpp's" if found.layout == "gguf" else found.layout
    member = next((one for one in row.variants if one.matches(found.facts, found.shapes)), None)
    evidence = [f"{names} names: {row.title}", *([member.evidence] if member else [])]
    variant = member.name if member else ""
    left = _leftovers(shapes, [found])
    return Match(part.kind, variant, "single", (part,), tuple(evidence), left, tuple(warnings))


def detect_component(
    specs: Mapping[str, TensorSpec], configs: Mapping[str, object] | None = None
) -> PartMatch | None:
    """Recognise a file that holds a single part other than a denoiser: a VAE, a text encoder.

    Its hyperparameters hold what shapes and a config.json say, no architecture's defaults.
    """
    found = _find_part(specs)
    return None if found is None else _part(found, Configs(configs or {}, "config.json"), {}, [])


def _find_part(specs: Mapping[str, TensorSpec]) -> Found | None:
    shapes = {key: spec.shape for key, spec in specs.items()}
    below = Below(shapes)
    for kind in PART_ORDER:
        component = PARTS[kind].components[0]
        for prefix in ("", *component.prefixes, f"{component.folder}/"):
            if not below.has_all(prefix):
                continue
            found = find(component, below, prefix)
            if not isinstance(found, Found) or _is_clip_l(found):
                continue
            if 2 * (len(found.shapes) + len(found.ignored)) > len(shapes):  # not a part of another
                return found
    return None


def _is_clip_l(found: Found) -> bool:
    """CLIP-L with a projection passes for OpenCLIP by names; no OpenCLIP in use is as narrow."""
    return found.component.kind == "openclip_text" and found.facts.get("hidden_size") == 768


def _denoisers(below: Below, *, folder: bool, only: str = "") -> Iterator[tuple[str, Found | Near]]:
    for slug, architecture in ARCHITECTURES.items():
        if only not in ("", slug):
            continue
        for component in architecture.denoisers:
            prefixes = (f"{component.folder}/",) if folder else (*component.prefixes, "", *WRAPPERS)
            for prefix in prefixes:
                found = find(component, below, prefix)
                if found is not None:
                    yield slug, found._replace(slug=slug) if isinstance(found, Near) else found


def _match(
    architecture: Architecture,
    denoiser: Found,
    shapes: Mapping[str, Shape],
    below: Below,
    files: Configs,
    *,
    folder: bool,
) -> Match:
    found = [denoiser]
    for component in architecture.companions:
        prefixes = (f"{component.folder}/",) if folder else component.prefixes
        hits = (find(component, below, prefix) for prefix in prefixes)
        found += [one for one in hits if isinstance(one, Found)][:1]
    marks = {**shapes, **denoiser.shapes}
    variant, told = _variant(architecture, denoiser.facts, marks, files)
    evidence = [f"{denoiser.layout} names: denoiser of {architecture.title}", *told]
    warnings: list[str] = []
    slug = architecture.slug
    parts = tuple(
        _part(one, files, architecture.defaults(one.component.name, variant), warnings, slug)
        for one in found
    )
    given = files.files.get("scheduler/scheduler_config.json")
    scheduler = merge(
        {}, given, files.origin, architecture.defaults("scheduler", variant), "scheduler", warnings
    )
    return Match(
        slug,
        variant,
        "diffusers" if folder else "single",
        parts,
        tuple(evidence),
        _leftovers(shapes, found),
        tuple(warnings),
        scheduler,
    )


def _variant(
    architecture: Architecture, facts: Facts, keys: Mapping[str, Shape], files: Configs
) -> tuple[str, list[str]]:
    row = next(one for one in architecture.variants if one.matches(facts, keys))
    index = files.files.get("model_index.json")
    pipeline = str(index.get("_class_name", "")) if isinstance(index, Mapping) else ""
    named = architecture.pipelines.get(pipeline)
    if named is not None and named[0] == row.name:
        return named[1], [f"model_index.json names {pipeline}"]
    return row.name, [row.evidence]


def _part(
    found: Found,
    files: Configs,
    defaults: Mapping[str, object],
    warnings: list[str],
    architecture: str = "",
) -> PartMatch:
    component = found.component
    config = files.files.get(f"{component.folder}/config.json")
    if config is None and (component.name == "denoiser" or not defaults):
        config = files.files.get("config.json")  # a component folder, opened by itself
    hyper = merge(found.facts, config, files.origin, defaults, component.name, warnings)
    return PartMatch(
        component.name,
        component.kind,
        found.layout,
        found.prefix,
        found.shapes,
        hyper,
        architecture,
    )


def _leftovers(shapes: Mapping[str, Shape], found: Sequence[Found]) -> tuple[tuple[str, str], ...]:
    claimed = {one.prefix + key for one in found for key in one.shapes}
    reasons = {key: reason for one in found for key, reason in one.ignored}
    for key in shapes:
        if key not in claimed and key not in reasons:
            reasons[key] = next(why for pattern, why in _LEFTOVERS if re.search(pattern, key))
    return tuple((key, reasons[key]) for key in shapes if key in reasons)
