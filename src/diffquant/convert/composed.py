"""ComposedSource: a checkpoint with parts of other files in it, as if it had been made so.

Plans read one source. A view of several keeps it at that: tensors of other files appear under the
names that the checkpoint would give them, tensors they replace are gone, EMA weights can stand
under the names of the weights they average. Nothing is read before the plan runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffquant.convert.architectures.base import Architecture, Component
from diffquant.convert.architectures.parts import architecture_named
from diffquant.convert.binding import bind
from diffquant.convert.match import Match, PartMatch
from diffquant.convert.matching import Below, Found, find
from diffquant.convert.recognise import recognise, recognise_part
from diffquant.convert.view import SourceView
from diffquant.core.errors import UsageError
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec
from diffquant.io import open_source
from diffquant.io.reading import find_spec

__all__ = ["AddedPart", "ComposedSource", "composed"]

_EMA = "model_ema."
_CLIPS = {"clip_text": frozenset({768}), "openclip_text": frozenset({1024, 1280})}


@dataclass(frozen=True, slots=True)
class AddedPart:
    """A part to take from another file: `vae`, `text_encoder` ... and where it is."""

    name: str
    path: Path


class ComposedSource(SourceView):
    """A TensorSource over several; `renamed` maps a key to its owner and its key there."""

    def __init__(
        self,
        base: TensorSource,
        renamed: Mapping[str, tuple[TensorSource, str]],
        *,
        configs: Mapping[str, Any],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(base)
        self.configs = configs
        self.notes = notes
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(key, owner.specs[own].dtype, owner.specs[own].shape)
            for key, (owner, own) in renamed.items()
        }
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        self._renamed = renamed

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat, read-only array."""
        find_spec(self.specs, key, self.path)
        owner, own = self._renamed[key]
        return owner.read(own, rows)


@contextlib.contextmanager
def composed(
    base: TensorSource, *, parts: Sequence[AddedPart] = (), ema: bool = False, arch: str = ""
) -> Iterator[TensorSource]:
    """The source with parts of other files in place of its own, or with its EMA weights.

    Args:
        base: the checkpoint.
        parts: at most one for each name.
        ema: whether the denoiser's weights are to be their moving averages.
        arch: the architecture to take the checkpoint for; see `recognise`.

    Raises:
        UsageError: a part the architecture does not have, or of another kind; no EMA weights.
        CheckpointError, ArchitectureError: a file cannot be read, or holds no such part.
    """
    if not parts and not ema:
        yield base
        return
    with contextlib.ExitStack() as stack:
        logical = bind(base)
        match = recognise(logical.specs(), base.metadata, base.configs, arch=arch)
        architecture = architecture_named(match.architecture)
        renamed: dict[str, tuple[TensorSource, str]] = {key: (base, key) for key in base.specs}
        configs = dict(base.configs)
        notes: list[str] = []
        if ema:
            notes.append(_take_ema(base, match, renamed))
        if parts:
            renamed = _with_prefix(renamed, match, architecture)
        for part in parts:
            other = stack.enter_context(open_source(part.path))
            found, config = _part_of(other, part, architecture)
            _replace_part(match, architecture, part, other, found, renamed)
            folder = architecture.component(part.name).folder
            if base.configs:
                if config is None:
                    configs.pop(f"{folder}/config.json", None)
                else:
                    configs[f"{folder}/config.json"] = config
            notes.append(f"{part.name} is that of {part.path.name}")
        yield ComposedSource(base, renamed, configs=configs, notes=tuple(notes))


def _with_prefix(
    renamed: dict[str, tuple[TensorSource, str]], match: Match, architecture: Architecture
) -> dict[str, tuple[TensorSource, str]]:
    """A bare denoiser's tensors below a prefix, now that it gets company.

    Without one, what stands beside it would be taken for tensors of the denoiser.
    """
    denoiser = match.part("denoiser")
    if denoiser is None or denoiser.prefix:
        return renamed
    prefix = architecture.component("denoiser", denoiser.kind).prefixes[0]
    aside = {key for key, _ in match.leftovers}
    return {(key if key in aside else prefix + key): own for key, own in renamed.items()}


def _take_ema(
    base: TensorSource, match: Match, renamed: dict[str, tuple[TensorSource, str]]
) -> str:
    """Put averages in the place of the weights; LDM writes their names without dots.

    Source: CompVis/stable-diffusion@21f890f:ldm/modules/ema.py (LitEma.__init__).
    """
    denoiser = next(part for part in match.parts if part.name == "denoiser")
    begin = denoiser.prefix.removeprefix("model.")
    averaged = {
        denoiser.prefix + key: _EMA + (begin + key).replace(".", "") for key in denoiser.shapes
    }
    found = {key: own for key, own in averaged.items() if own in base.specs}
    if not found:
        raise UsageError(
            f"{base.path}: no EMA weights in it (no tensor {_EMA}*): leave out --use-ema"
        )
    wrong = [key for key, own in found.items() if base.specs[own].shape != base.specs[key].shape]
    if wrong:
        raise UsageError(f"{base.path}: the average of {wrong[0]} has another shape")
    for key, own in found.items():
        renamed[key] = (base, own)
        renamed.pop(own, None)
    kept = len(averaged) - len(found)
    beside = f"; {kept} weights have no average and are kept as they are" if kept else ""
    return f"{len(found)} weights of the denoiser are their moving averages (EMA){beside}"


def _part_of(
    other: TensorSource, part: AddedPart, architecture: Architecture
) -> tuple[PartMatch, object]:
    """The part in another file that is asked for, and its config.json where it has one."""
    try:
        wanted = architecture.component(part.name)
    except KeyError:
        names = ", ".join(one.name for one in architecture.components)
        raise UsageError(f"{architecture.slug} has no part {part.name} (it has: {names})") from None
    logical = bind(other)
    specs = logical.specs()
    match = recognise_part(specs, other.metadata, other.configs)
    kinds = {one.kind for one in architecture.components if one.name == part.name}
    fits = [one for one in match.parts if one.kind in kinds]
    fits = fits or [one for one in map(partial(_as_clip, wanted=wanted), match.parts) if one]
    named = [one for one in fits if one.name == part.name] or fits
    if not named:
        has = ", ".join(f"{one.name} ({one.kind})" for one in match.parts)
        raise UsageError(
            f"{part.path}: no {part.name} for {architecture.slug} in it: expected {wanted.kind}, "
            f"found {has}"
        )
    found = named[0]
    wanted = architecture.component(part.name, found.kind)
    for field, allowed in wanted.where.items():
        value = found.hyper[field].value if field in found.hyper else None
        if not field.startswith("_") and value not in allowed:
            raise UsageError(
                f"{part.path}: its {part.name} has {field} {value}, {architecture.slug} needs "
                f"{' or '.join(map(str, allowed))}"
            )
    channels = found.hyper.get("latent_channels") or found.hyper.get("z_dim")
    latent = architecture.latent.channels
    if part.name == "vae" and channels is not None and channels.value != latent:
        raise UsageError(
            f"{part.path}: its VAE has {channels.value} latent channels, {architecture.slug} needs "
            f"{latent}"
        )
    folder = wanted.folder
    config = other.configs.get(f"{folder}/config.json", other.configs.get("config.json"))
    return found, config


def _as_clip(part: PartMatch, wanted: Component) -> PartMatch | None:
    """A text encoder that was taken for the other of CLIP and OpenCLIP, as the one that is wanted.

    In transformers' names they are alike; the widths of published models part them, and a model of
    another width is what it is asked to be.
    """
    width = part.hyper["hidden_size"].value if "hidden_size" in part.hyper else None
    if {part.kind, wanted.kind} != set(_CLIPS) or _CLIPS[part.kind] & {width}:
        return None
    found = find(wanted, Below(part.shapes), "")
    if not isinstance(found, Found):
        return None
    return replace(part, name=wanted.name, kind=wanted.kind, layout=found.layout)


def _replace_part(
    match: Match,
    architecture: Architecture,
    part: AddedPart,
    other: TensorSource,
    found: PartMatch,
    renamed: dict[str, tuple[TensorSource, str]],
) -> None:
    """Take the part's old tensors out and put the new ones in, packed companions included."""
    old = next((one for one in match.parts if one.name == part.name), None)
    component = architecture.component(part.name, found.kind)
    prefix = _place(match, old, component.folder, component.prefixes)
    if old is not None:
        inside = (old.prefix,) if old.prefix else tuple(old.shapes)
        for key in [key for key in renamed if key.startswith(inside)]:
            del renamed[key]
    for key in other.specs:
        if key.startswith(found.prefix):
            renamed[prefix + key[len(found.prefix) :]] = (other, key)


def _place(match: Match, old: PartMatch | None, folder: str, prefixes: tuple[str, ...]) -> str:
    """Where a part goes: where the old one was, else where this container has such parts."""
    if old is not None:
        return old.prefix
    if match.layout == "diffusers":
        return f"{folder}/"
    if not prefixes:
        raise UsageError(f"single files have no place for {folder}: write a folder")
    return prefixes[0]
