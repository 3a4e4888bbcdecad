"""Who has the parts of a model: the files that are opened for it, in order of precedence.

A part is taken from the file `--add` names for it, else from the model itself, else from `--base`,
else from where the user's cache remembers the source of a file we wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import Match, PartMatch, detect, detect_component
from diffquant.convert.logical import LogicalSource
from diffquant.convert.remember import recall
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source
from diffquant.runtime.families import FAMILIES, Family

__all__ = ["Provider", "choose", "missing_parts", "providers_for", "stand_ins_warning"]


@dataclass(frozen=True, slots=True)
class Provider:
    """One opened source that parts may come from."""

    path: Path
    source: TensorSource
    logical: LogicalSource
    parts: Mapping[str, PartMatch]
    architecture: str
    match: Match | None


def providers_for(
    stack: contextlib.ExitStack,
    model: Path,
    base: Path | None,
    added: Mapping[str, Path],
    swapped: Mapping[str, Path],
) -> tuple[list[Provider], dict[str, Provider]]:
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


def _family(first: Provider) -> Family:
    if first.architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ArchitectureError(
            f"{first.path}: {first.architecture} has no runtime yet (there is one for {known}); "
            "--engine diffusers draws with it where diffusers is installed; without, it can be "
            "inspected, converted and verified at tensor level"
        )
    return FAMILIES[first.architecture]


def _provide(stack: contextlib.ExitStack, path: Path) -> Provider:
    source = stack.enter_context(open_source(path))
    logical = bind(source)
    match = detect(logical.specs(), source.metadata, source.configs)
    parts = {part.name: part for part in match.parts}
    return Provider(path, source, logical, parts, match.architecture, match)


def _provide_component(
    stack: contextlib.ExitStack, path: Path, name: str, architecture: str, family: Family
) -> Provider:
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
    return Provider(path, source, logical, {name: part}, architecture, None)


def _provide_part(
    stack: contextlib.ExitStack, path: Path, name: str, architecture: str, family: Family
) -> Provider:
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
    return Provider(path, source, logical, {name: part}, architecture, match)


def missing_parts(
    model: Path, *, base: Path | None = None, vae: Path | None = None
) -> tuple[str, ...]:
    """Names of parts that a picture takes and that neither the files nor the user's cache have.

    Raises:
        ArchitectureError: no runtime for this architecture yet.
    """
    added = {"vae": vae} if vae is not None else {}
    with contextlib.ExitStack() as stack:
        providers, extra = providers_for(stack, model, base, added, {})
        if base is not None and providers[1].architecture != providers[0].architecture:
            found, wanted = providers[1].architecture, providers[0].architecture
            raise ArchitectureError(f"--base {base}: expected {wanted}, found {found}")
        needs = FAMILIES[providers[0].architecture].needs
        return tuple(name for name in needs if not _usable(providers, extra, name))


def stand_ins_warning(sides: Iterable[tuple[Path, Path | None]], vae: Path | None) -> str:
    """Say which side, of (model, base) each, lacks parts, so that all go without; "" for none."""
    for model, base in sides:
        missing = missing_parts(model, base=base, vae=vae)
        if missing and "denoiser" not in missing:
            return (
                f"{model.name} has no {', '.join(missing)}: denoisers are compared alone, on "
                "synthetic text, by colours of their latents; with --base MODEL they are judged by "
                "pictures"
            )
    return ""


def _usable(providers: list[Provider], extra: Mapping[str, Provider], name: str) -> list[Provider]:
    """Who has a part, in order of precedence; the denoiser is the model's own or nobody's."""
    architecture = providers[0].architecture
    if name in extra:
        return [extra[name]]
    if name == "denoiser":
        return providers[:1] if name in providers[0].parts else []
    return [one for one in providers if name in one.parts and one.architecture == architecture]


def choose(
    providers: list[Provider], extra: Mapping[str, Provider], needs: tuple[str, ...]
) -> dict[str, Provider]:
    """Pick the provider of every needed part; an added file outranks the model's own part."""
    usable = {name: _usable(providers, extra, name) for name in needs}
    missing = [name for name, found in usable.items() if not found]
    if missing:
        raise UsageError(
            f"{providers[0].path} has no {', '.join(missing)}: give a folder or checkpoint of the "
            f"same family with --base, or each part's file with --add {missing[0]}=FILE"
        )
    return {name: found[0] for name, found in usable.items()}
