"""What an output holds beside its tensors: header pairs, configs, tokenizer files.

A plan says nothing of these. They are put together from the source and from `--base`, before
anything is written. Configs that neither has are made of what was recognised, and said to be;
tokenizers that neither has are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.carried import carried
from diffquant.convert.encoders.header import EncoderHeader, encoder_header
from diffquant.convert.made_configs import INDEX, made_configs
from diffquant.convert.match import Match
from diffquant.convert.output import configs_of, file_metadata, folder_configs
from diffquant.convert.plan import Plan
from diffquant.core.errors import ResourceError, UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source

__all__ = ["Surroundings", "check_memory", "metadata_of", "refuse_own_source", "surroundings"]

_FOLDER_NEEDS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What goes with a plan's tensors.

    Attributes:
        configs: relative path -> JSON object; folders only.
        files: relative path -> bytes; folders only.
        missing: what a folder output lacks.
        made: configs that no file had.
        header: of a text encoder's GGUF file; empty for other outputs.
    """

    configs: Mapping[str, Any]
    files: Mapping[str, bytes]
    missing: tuple[str, ...]
    made: tuple[str, ...]
    header: EncoderHeader

    @property
    def notes(self) -> tuple[str, ...]:
        """What was made, in a line."""
        if not self.made:
            return ()
        why = "made from shapes and the architecture's defaults, as the source has none"
        return (f"{', '.join(self.made)}: {why}",)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of it."""
        return self.header.warnings + tuple(f"missing from the folder: {x}" for x in self.missing)


def surroundings(plan: Plan, match: Match, source: TensorSource, base: Path | None) -> Surroundings:
    """Find what goes with a plan's tensors, in the source and in the folder `base`."""
    header = _encoder_header(plan, source, base)
    return Surroundings(*_folder_files(plan, match, source, base), header)


def metadata_of(
    plan: Plan, match: Match, source: TensorSource, header: EncoderHeader
) -> dict[str, Any]:
    """Pairs of the output's header: the source's, ours, and those that were asked for."""
    ours = file_metadata(plan, match, source)
    if plan.request.container == "gguf":
        from diffquant.convert.gguf_metadata import gguf_metadata

        pairs = gguf_metadata(plan, match, source, ours, header.pairs)
    else:
        pairs = {**carried(source, plan.request.container).pairs, **ours}
    for key, value in plan.request.pairs.items():
        if value:
            pairs[key] = value
        else:
            pairs.pop(key, None)
    return pairs


def refuse_own_source(src: Path, out: Path, base: Path | None) -> None:
    """Never replace what is being read, whole or in part, whatever --force says.

    Raises:
        UsageError: `out` is, holds or lies in the source or `base`.
    """
    target, read = out.resolve(), src.resolve()
    if target == read:
        raise UsageError(f"{out} is the source itself; choose another output")
    if target in read.parents:
        raise UsageError(f"{out} contains the source {src}, and would replace it; choose another")
    if read in target.parents:
        raise UsageError(f"{out} is part of the source {src}; choose another output")
    if base is not None and (target == base.resolve() or target in base.resolve().parents):
        raise UsageError(f"{out} holds --base {base}, and would replace it; choose another output")


def check_memory(needed: int) -> None:
    """Refuse to start what does not fit.

    Raises:
        ResourceError: less memory is free than the plan needs.
    """
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"needs about {needed / 2**20:.0f} MiB of working memory, {free / 2**20:.0f} MiB are "
            "free; use fewer --threads"
        )


def _encoder_header(plan: Plan, source: TensorSource, base: Path | None) -> EncoderHeader:
    """Header of a text encoder's GGUF file; nothing for other outputs."""
    if plan.encoder is None:
        return EncoderHeader({})
    if base is None:
        return encoder_header(plan.encoder, source)
    with open_source(base) as other:
        return encoder_header(plan.encoder, source, other)


def _folder_files(
    plan: Plan, match: Match, source: TensorSource, base: Path | None
) -> tuple[dict[str, Any], dict[str, bytes], tuple[str, ...], tuple[str, ...]]:
    """Configs and side files of a folder output, what is missing from it, what was made."""
    if plan.request.container != "folder":
        return {}, {}, (), ()
    configs = configs_of(source)
    files = _side_files(source)
    if base is not None:
        with open_source(base) as other:
            configs = {**configs_of(other), **configs}
            files = {**_side_files(other), **files}
    folders = {step.target.partition("/")[0] for step in plan.steps}
    made = {path: one for path, one in made_configs(match).items() if path not in configs}
    if len(folders) < 2:  # a part alone is no pipeline
        made = {path: one for path, one in made.items() if path.partition("/")[0] in folders}
    wanted = folder_configs(plan, {**configs, **made})
    tokenizers = {_FOLDER_NEEDS[name] for name in folders if name in _FOLDER_NEEDS}
    kept = {path: data for path, data in files.items() if path.partition("/")[0] in tokenizers}
    missing = [
        f"{folder}/config.json" for folder in folders if f"{folder}/config.json" not in wanted
    ]
    missing += [
        f"{name}/" for name in tokenizers if not any(path.startswith(f"{name}/") for path in kept)
    ]
    if INDEX not in wanted:
        missing.append(INDEX)
    return wanted, kept, tuple(sorted(missing)), tuple(sorted(made.keys() & wanted.keys()))


def _side_files(source: TensorSource) -> dict[str, bytes]:
    names = getattr(source, "files", ())
    read = getattr(source, "read_file", None)
    return {name: read(name) for name in names} if read is not None else {}
