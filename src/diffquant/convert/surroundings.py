"""What stands beside the tensors of a folder output: configs, tokenizer files, and what is missing.

Configs are the source's own, else those of `--base`, else made of what was recognised; a report
says which. Tokenizers are the source's or the base's, or they are missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffquant.convert.made_configs import INDEX, made_configs
from diffquant.convert.match import Match
from diffquant.convert.output import configs_of, folder_configs
from diffquant.convert.plan import Plan
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source

__all__ = ["Surroundings", "surroundings"]

_FOLDER_NEEDS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Side files of a folder; empty for other outputs.

    Attributes:
        configs: relative path -> JSON object.
        files: relative path -> bytes.
        missing: what a loader will ask for and nobody has.
        made: configs that no file had.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    made: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was made, in a line."""
        if not self.made:
            return ()
        why = "made from shapes and the architecture's defaults, as the source has none"
        return (f"{', '.join(self.made)}: {why}",)


def surroundings(plan: Plan, match: Match, source: TensorSource, base: Path | None) -> Surroundings:
    """Collect what belongs beside a plan's tensors."""
    if plan.request.container != "folder":
        return Surroundings()
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
    told = sorted(path for path in made if path in wanted)
    return Surroundings(wanted, kept, tuple(sorted(missing)), tuple(told))


def _side_files(source: TensorSource) -> dict[str, bytes]:
    names = getattr(source, "files", ())
    read = getattr(source, "read_file", None)
    return {name: read(name) for name in names} if read is not None else {}
