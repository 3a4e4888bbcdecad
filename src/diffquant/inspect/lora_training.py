"""What an adapter file's header says of its training: sd-scripts' `ss_*`, ModelSpec, short.

The header is the maker's text, or anyone's: every value is bounded before it is read, and what is
not of the expected form is left out.

Sources: kohya-ss/sd-scripts@450630c:train_network.py (`ss_*`); Stability-AI/ModelSpec README.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Training", "training_of"]

_TEXT_LIMIT = 120  # characters of a value worth keeping
_JSON_LIMIT = 8 << 20  # characters; a data set of 100,000 captions has about 4 million
_TAG_LIMIT = 20
_TAGS_READ = 200_000  # different tags that are counted at all
_FOLDER = re.compile(r"^\d+_(?P<name>.+)$")  # sd-scripts: repeats_words


@dataclass(frozen=True, slots=True)
class Training:
    """What the header says; empty where it does not.

    Attributes:
        title: modelspec.title.
        output_name: ss_output_name.
        network: ss_network_module, with ss_network_args.
        base_model: name of the checkpoint it was trained on.
        resolution, steps, epochs, images, optimizer, learning_rate: as written.
        clip_skip: as written.
        triggers: modelspec.trigger_phrase first, then folder names of the data set.
        tags: tag -> times it occurs in the captions, the most frequent first.
        note: why tags that are there were not read.
    """

    title: str = ""
    output_name: str = ""
    network: str = ""
    base_model: str = ""
    resolution: str = ""
    steps: str = ""
    epochs: str = ""
    images: str = ""
    optimizer: str = ""
    learning_rate: str = ""
    clip_skip: str = ""
    triggers: tuple[str, ...] = ()
    tags: Mapping[str, int] | None = None
    note: str = ""


_FIELDS = {
    "title": ("modelspec.title",),
    "output_name": ("ss_output_name",),
    "base_model": ("ss_sd_model_name", "ss_base_model_name"),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "images": ("ss_num_train_images",),
    "optimizer": ("ss_optimizer",),
    "learning_rate": ("ss_unet_lr", "ss_learning_rate"),
    "clip_skip": ("ss_clip_skip",),
}


def training_of(metadata: Mapping[str, Any]) -> Training:
    """Read a header."""
    fields = {name: _first(metadata, keys) for name, keys in _FIELDS.items()}
    tags, folders, note = _tags(metadata.get("ss_tag_frequency"))
    phrase = _short(metadata.get("modelspec.trigger_phrase"))
    return Training(
        **fields,
        network=_network(metadata),
        triggers=tuple(dict.fromkeys(one for one in (phrase, *folders) if one)),
        tags=tags,
        note=note,
    )


def _first(metadata: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((text for key in keys if (text := _short(metadata.get(key)))), "")


def _short(value: object) -> str:
    """A value as one short line; sd-scripts writes None for what was not given."""
    if not isinstance(value, str | int | float) or value in ("None", ""):
        return ""
    text = " ".join(str(value)[: 4 * _TEXT_LIMIT].split())
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 3] + "..."


def _network(metadata: Mapping[str, Any]) -> str:
    module = _short(metadata.get("ss_network_module"))
    arguments = _object(metadata.get("ss_network_args"))
    listed = ", ".join(
        f"{_short(key)}={_short(value)}" for key, value in list(arguments.items())[:8]
    )
    return _short(" ".join(filter(None, (module, f"({listed})" if listed else ""))))


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, str) or len(value) > _JSON_LIMIT:
        return {}
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tags(value: object) -> tuple[dict[str, int] | None, list[str], str]:
    """The commonest tags of ss_tag_frequency, names of its folders, and why it was not read."""
    if value is None:
        return None, [], ""
    if isinstance(value, str) and len(value) > _JSON_LIMIT:
        return None, [], f"ss_tag_frequency has {len(value)} characters: not read"
    counts: Counter[str] = Counter()
    folders: list[str] = []
    for folder, tags in _object(value).items():
        named = _FOLDER.match(folder)
        if named and len(folders) < _TAG_LIMIT:
            folders.append(_short(named["name"].replace("_", " ")))
        for tag, times in tags.items() if isinstance(tags, dict) else ():
            if isinstance(times, int) and not isinstance(times, bool) and len(counts) < _TAGS_READ:
                counts[_short(tag)] += times
    if not counts:
        return None, folders, ""
    return dict(counts.most_common(_TAG_LIMIT)), folders, ""
