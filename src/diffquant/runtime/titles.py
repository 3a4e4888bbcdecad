"""What a model's or LoRA's own header calls it: hints for presets, where file names tell nothing.

Source: Stability-AI/ModelSpec README.md; kohya-ss/sd-scripts library/sai_model_spec.py and
train_network.py (ss_output_name); ggml-org/ggml docs/gguf.md, general metadata; Diffusers writes
the repository a model was loaded from as `_name_or_path`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from diffquant.convert.lora.merge import MERGED_KEY
from diffquant.io import open_source

__all__ = ["titles_of", "titles_of_file"]

_HEADER = (
    "modelspec.title",
    "ss_output_name",
    "general.name",
    "general.basename",
    "general.finetune",
    MERGED_KEY,  # a model takes after the LoRA that was merged into it
)
_INDEX = "model_index.json"
_FOLDERS = ("unet", "transformer")
_LONGEST = 200


def titles_of(
    metadata: Mapping[str, object], configs: Mapping[str, object] | None = None
) -> tuple[str, ...]:
    """Names in a header, and of the repositories a folder says it came from; none twice.

    Args:
        metadata: the header's pairs.
        configs: JSON files of a folder, by relative path.
    """
    return tuple(dict.fromkeys(one[:_LONGEST] for one in _found(metadata, configs or {}) if one))


def titles_of_file(path: Path) -> tuple[str, ...]:
    """`titles_of` the header of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    with open_source(path) as source:
        return titles_of(source.metadata)


def _found(metadata: Mapping[str, object], configs: Mapping[str, object]) -> Iterator[str]:
    for key in _HEADER:
        if isinstance(name := metadata.get(key), str):
            yield name
    for file in (_INDEX, *(f"{folder}/config.json" for folder in _FOLDERS)):
        config = configs.get(file)
        name = config.get("_name_or_path") if isinstance(config, Mapping) else None
        if isinstance(name, str):
            yield Path(name).name  # a folder above it belongs to other models, too
