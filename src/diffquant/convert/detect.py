"""What a checkpoint is, by header facts alone: names and shapes, configs, metadata.

Specs are logical: quantized companions are folded away before. Exactly one architecture matches,
or an error says what came nearest and what it lacks. What headers cannot tell is not guessed but
said in `evidence`. Every hyperparameter names its origin: the source's config.json, the
`diffquant.config` we write into headers, the shapes, or the architecture's default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.base import Architecture, Component, Facts, Layout
from diffquant.convert.architectures.parts import PARTS, TITLES
from diffquant.convert.kinds import is_lora, kind_of
from diffquant.convert.rules import Assignment, Piece, Shape, apply_rules
from diffquant.core.errors import AmbiguousArchitecture, UnknownArchitecture, shorten
from diffquant.core.tensors import TensorSpec

__all__ = [
    "Hyper",
    "Match",
    "PartMatch",
    "detect",
    "detect_component",
    "detect_encoder",
    "flat_config",
    "kind_of",
    "to_canonical",
    "to_diffusers",
    "to_layout",
]

Origin = Literal["config.json", "diffquant.config", "default", "shape"]

_LEFTOVERS = (
    (r"^model_ema\.", "EMA copy of the denoiser"),
    (
        r"^(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|denoiser\.sigmas|logvar)$",
        "noise schedule buffer, computed from the scheduler's numbers",
    ),
    (r"^(edm_mean|edm_std|v_pred|ztsnr|edm_vpred\.\w+)$", "marker read at detection"),
    (r"(^|[./])position_ids$", "0, 1, 2 ...: the model builds it itself"),
    (r"^safety_checker/", "safety checker, not part of the model"),
    (r"", "belongs to no part of this architecture"),
)
# Parts that circulate as files of their own; OpenCLIP before CLIP, whose names it may have.
_PARTS = (
    "vae_kl",
    "vae_qwen",
    "openclip_text",
    "clip_text",
    "t5_encoder",
    "qwen2_vl_text",
    "qwen2_vl_vision",
    "qwen3_text",
)
# Config fields whose way of writing varies more than what they mean; the config's own is kept.
_CONFIG_WINS = ("transformer_layers_per_block",)


@dataclass(frozen=True, slots=True)
class Hyper:
    """One hyperparameter, named as in config.json, and where it was found."""

    value: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class PartMatch:
    """One part of a model inside a source.

    Attributes:
        name: denoiser, vae, text_encoder or text_encoder_2.
        kind: which model it is, as in `Component.kind`.
        layout: naming of the local keys; "alternate" is a naming that is read, never written.
        prefix: source key = prefix + local key ("unet/" in a folder).
        shapes: local key -> shape.
        hyper: config.json field -> value and origin.
        architecture: slug of the architecture it was found in, "" for a part in a file of its own.
    """

    name: str
    kind: str
    layout: Layout
    prefix: str
    shapes: Mapping[str, Shape]
    hyper: Mapping[str, Hyper]
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """What a source is.

    Attributes:
        architecture: slug, a key of ARCHITECTURES.
        variant: member of the family, "" when there is nothing to tell.
        layout: "diffusers" for a folder of parts, else "single".
        parts: those found, the denoiser first.
        evidence: what was concluded from what, and what cannot be told.
        leftovers: (key, reason) of keys no part claims.
        warnings: contradictions between the source's own statements.
        scheduler: scheduler_config.json field -> value and origin.
    """

    architecture: str
    variant: str
    layout: Literal["single", "diffusers"]
    parts: tuple[PartMatch, ...]
    evidence: tuple[str, ...]
    leftovers: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    scheduler: Mapping[str, Hyper] = field(default_factory=dict)

    def part(self, name: str) -> PartMatch | None:
        """The part of that name, if the source has it."""
        return next((one for one in self.parts if one.name == name), None)


class _Found(NamedTuple):
    """A component recognised under a prefix."""

    component: Component
    layout: Layout
    prefix: str
    shapes: dict[str, Shape]
    ignored: tuple[tuple[str, str], ...]
    facts: Facts


class _Near(NamedTuple):
    """A denoiser that was not quite recognised."""

    slug: str
    share: float
    missing: tuple[str, ...]
    why: str


class _Configs(NamedTuple):
    files: Mapping[str, Any]
    origin: Origin


def detect(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
) -> Match:
    """Recognise a checkpoint.

    Args:
        specs: logical specs by key; in a folder "subfolder/key".
        metadata: the header's key-value pairs.
        configs: JSON files beside the tensors, by relative path.

    Raises:
        UnknownArchitecture: nothing matches; carries the nearest candidates.
        AmbiguousArchitecture: more than one architecture matches.
    """
    shapes = {key: spec.shape for key, spec in specs.items()}
    folder = any("/" in key for key in shapes)
    found = list(_denoisers(shapes, folder=folder))
    hits = [(slug, one) for slug, one in found if isinstance(one, _Found)]
    slugs = list(dict.fromkeys(slug for slug, _ in hits))
    if not slugs:
        raise _unknown(specs, [one for _, one in found if isinstance(one, _Near)])
    if len(slugs) > 1:
        raise AmbiguousArchitecture(
            f"the tensors fit {' and '.join(slugs)}: expected one architecture; split the file"
        )
    architecture = ARCHITECTURES[slugs[0]]
    denoiser = max((one for _, one in hits), key=lambda one: len(one.shapes))
    files = _configs(metadata or {}, configs or {})
    return _match(architecture, denoiser, shapes, files, folder=folder)


def detect_encoder(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
) -> Match | None:
    """Recognise a file that holds one text encoder, as a model of its own; None for others."""
    found = _find_part(specs)
    if found is None or found.component.kind not in TITLES:
        return None
    shapes = {key: spec.shape for key, spec in specs.items()}
    files = _configs(metadata or {}, configs or {})
    warnings: list[str] = []
    part = _part(found, files, {}, warnings)
    names = "llama.cpp's" if found.layout == "gguf" else found.layout
    evidence = (f"{names} names of a {TITLES[part.kind]}",)
    left = _leftovers(shapes, [found])
    return Match(part.kind, "", "single", (part,), evidence, left, tuple(warnings))


def detect_component(
    specs: Mapping[str, TensorSpec], configs: Mapping[str, object] | None = None
) -> PartMatch | None:
    """Recognise a file that holds a single part other than a denoiser: a VAE, a text encoder.

    Its hyperparameters hold what shapes and a config.json say, no architecture's defaults.
    """
    found = _find_part(specs)
    return None if found is None else _part(found, _Configs(configs or {}, "config.json"), {}, [])


def _find_part(specs: Mapping[str, TensorSpec]) -> _Found | None:
    shapes = {key: spec.shape for key, spec in specs.items()}
    for kind in _PARTS:
        component = PARTS[kind].components[0]
        for prefix in ("", *component.prefixes, f"{component.folder}/"):
            if not all(key.startswith(prefix) for key in shapes):
                continue
            found = _find(component, shapes, prefix)
            if isinstance(found, _Found) and not _is_clip_l(found):
                return found
    return None


def _is_clip_l(found: _Found) -> bool:
    """CLIP-L with a projection passes for OpenCLIP by names; no OpenCLIP in use is as narrow."""
    return found.component.kind == "openclip_text" and found.facts.get("hidden_size") == 768


def to_canonical(part: PartMatch) -> tuple[Assignment, ...]:
    """Assignments from source keys to canonical part-local keys; identity when already there."""
    return _assign(part, "canonical")


def to_layout(part: PartMatch, layout: Layout) -> tuple[Assignment, ...]:
    """Assignments from source keys to part-local keys in any layout that can be written."""
    return _assign(part, layout)


def to_diffusers(part: PartMatch) -> tuple[Assignment, ...]:
    """Assignments from source keys to Diffusers part-local keys; identity when already there."""
    return _assign(part, "diffusers")


def _assign(part: PartMatch, target: Layout) -> tuple[Assignment, ...]:
    component = (
        ARCHITECTURES[part.architecture].component(part.name)
        if part.architecture
        else PARTS[part.kind].components[0]
    )
    rules = component.rules(part.shapes, part.layout, target)
    return tuple(
        replace(
            one,
            pieces=tuple(
                Piece(part.prefix + piece.key, piece.start, piece.stop) for piece in one.pieces
            ),
        )
        for one in apply_rules(rules, part.shapes)
    )


def _denoisers(
    shapes: Mapping[str, Shape], *, folder: bool
) -> Iterator[tuple[str, _Found | _Near]]:
    for slug, architecture in ARCHITECTURES.items():
        component = architecture.components[0]
        prefixes = (f"{component.folder}/",) if folder else (*component.prefixes, "")
        for prefix in prefixes:
            found = _find(component, shapes, prefix)
            if found is not None:
                yield slug, found._replace(slug=slug) if isinstance(found, _Near) else found


def _find(component: Component, shapes: Mapping[str, Shape], prefix: str) -> _Found | _Near | None:
    """Look for a component below a prefix: found, nearly found, or nothing there."""
    local = {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
    near: _Near | None = None
    for layout, signature in component.signatures.items():
        missing = signature.missing(local)
        share = 1 - len(missing) / len(signature.required)
        why = f"lacks {shorten(missing, 3)}"
        if not missing:
            if foreign := signature.foreign(local):
                why = f"has {foreign[0]}"
            else:
                found = _accept(component, layout, prefix, local)
                if isinstance(found, _Found):
                    return found
                why = found
        if share and (near is None or share > near.share):
            near = _Near("", share, missing, why)
    return near


def _accept(
    component: Component, layout: Layout, prefix: str, local: dict[str, Shape]
) -> _Found | str:
    """Check the facts; a signature's own keys are never ignored."""
    required = component.signatures[layout].required
    ignored = {
        key: reason
        for pattern, reason in component.ignored
        for key in local
        if re.search(pattern, key) and key not in required
    }
    kept = {key: shape for key, shape in local.items() if key not in ignored}
    facts = component.facts_of(kept, layout)
    for name, allowed in component.where.items():
        if facts.get(name) not in allowed:
            listed = " or ".join(map(str, allowed))
            return f"has {name.lstrip('_')} {facts.get(name)}, expected {listed}"
    if component.same_names and layout == "canonical" and prefix.endswith("/"):
        layout = "diffusers"
    full = tuple((prefix + key, reason) for key, reason in ignored.items())
    return _Found(component, layout, prefix, kept, full, facts)


def _unknown(specs: Mapping[str, TensorSpec], near: Sequence[_Near]) -> UnknownArchitecture:
    best: dict[str, _Near] = {}
    for one in near:
        if one.slug not in best or one.share > best[one.slug].share:
            best[one.slug] = one
    ranked = sorted(best.values(), key=lambda one: -one.share)[:3]
    if is_lora(specs):
        head = "this is an adapter (LoRA), not a model: give it with --lora"
    elif not specs:
        head = "there are no tensors in it"
    else:
        head = f"no known architecture has these {len(specs)} tensors"
    nearest = "; ".join(f"{one.slug} has {one.share:.0%} of its marks, {one.why}" for one in ranked)
    message = f"{head}; nearest: {nearest}" if nearest else head
    return UnknownArchitecture(
        f"{message} (known: {', '.join(ARCHITECTURES)})",
        candidates=tuple((one.slug, one.missing) for one in ranked),
    )


def _match(
    architecture: Architecture,
    denoiser: _Found,
    shapes: Mapping[str, Shape],
    files: _Configs,
    *,
    folder: bool,
) -> Match:
    found = [denoiser]
    for component in architecture.components[1:]:
        prefixes = (f"{component.folder}/",) if folder else component.prefixes
        hits = (_find(component, shapes, prefix) for prefix in prefixes)
        found += [one for one in hits if isinstance(one, _Found)][:1]
    marks = {**shapes, **denoiser.shapes}
    variant, told = _variant(architecture, denoiser.facts, marks, files)
    evidence = [f"{denoiser.layout} names of a {architecture.title} denoiser", *told]
    warnings: list[str] = []
    slug = architecture.slug
    parts = tuple(
        _part(one, files, architecture.defaults(one.component.name, variant), warnings, slug)
        for one in found
    )
    given = files.files.get("scheduler/scheduler_config.json")
    scheduler = _hyper(
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
    architecture: Architecture, facts: Facts, keys: Mapping[str, Shape], files: _Configs
) -> tuple[str, list[str]]:
    row = next(one for one in architecture.variants if one.matches(facts, keys))
    index = files.files.get("model_index.json")
    pipeline = str(index.get("_class_name", "")) if isinstance(index, Mapping) else ""
    named = architecture.pipelines.get(pipeline)
    if named is not None and named[0] == row.name:
        return named[1], [f"model_index.json names {pipeline}"]
    return row.name, [row.evidence]


def _part(
    found: _Found,
    files: _Configs,
    defaults: Mapping[str, object],
    warnings: list[str],
    architecture: str = "",
) -> PartMatch:
    component = found.component
    config = files.files.get(f"{component.folder}/config.json")
    if config is None and (component.name == "denoiser" or not defaults):
        config = files.files.get("config.json")  # a component folder, opened by itself
    hyper = _hyper(found.facts, config, files.origin, defaults, component.name, warnings)
    return PartMatch(
        component.name,
        component.kind,
        found.layout,
        found.prefix,
        found.shapes,
        hyper,
        architecture,
    )


def _hyper(
    facts: Facts,
    config: object,
    origin: Origin,
    defaults: Mapping[str, object],
    what: str,
    warnings: list[str],
) -> dict[str, Hyper]:
    """Merge: shapes are right about what they say, then the config, then the default."""
    out = {name: Hyper(value, "default") for name, value in defaults.items()}
    known = {k: v for k, v in facts.items() if not k.startswith("_") and v is not None}
    out.update((name, Hyper(value, "shape")) for name, value in known.items())
    for name, raw in flat_config(config).items():
        value = tuple(raw) if isinstance(raw, list) else raw
        shape = known.get(name)
        if shape is None or _agree(value, shape) or name in _CONFIG_WINS:
            out[str(name)] = Hyper(value, origin)
        elif value is not None:
            warnings.append(
                f"{what}: {origin} says {name} is {value}, the tensors say {shape}: the tensors "
                "are followed"
            )
    return out


def flat_config(config: object) -> dict[str, Any]:
    """A config with its nested text_config and rope_parameters (newer transformers) spread out."""
    if not isinstance(config, Mapping):
        return {}
    flat = dict(config)
    text = flat.get("text_config")
    if isinstance(text, Mapping):
        flat.update((k, v) for k, v in text.items() if k not in {"architectures", "model_type"})
    rope = flat.get("rope_parameters")
    if isinstance(rope, Mapping):
        flat["rope_theta"] = rope.get("rope_theta")
        flat["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return flat


def _agree(value: object, shape: object) -> bool:
    """Whether a config's value says what the shapes say; one number may stand for a level each."""
    if isinstance(value, tuple) and not isinstance(shape, tuple):
        return all(one == shape for one in value)
    if isinstance(shape, tuple) and not isinstance(value, tuple):
        return all(one == value for one in shape)
    return value == shape or isinstance(value, str)


def _configs(metadata: Mapping[str, object], configs: Mapping[str, object]) -> _Configs:
    """Configs beside the tensors, else those in the header."""
    if configs:
        return _Configs(configs, "config.json")
    text = metadata.get("diffquant.config")
    try:
        found = json.loads(text).get("configs", {}) if isinstance(text, str) else {}
    except (ValueError, AttributeError, RecursionError):
        found = {}
    return _Configs(found if isinstance(found, dict) else {}, "diffquant.config")


def _leftovers(shapes: Mapping[str, Shape], found: Sequence[_Found]) -> tuple[tuple[str, str], ...]:
    claimed = {one.prefix + key for one in found for key in one.shapes}
    reasons = {key: reason for one in found for key, reason in one.ignored}
    for key in shapes:
        if key not in claimed and key not in reasons:
            reasons[key] = next(why for pattern, why in _LEFTOVERS if re.search(pattern, key))
    return tuple((key, reasons[key]) for key in shapes if key in reasons)
