"""Parameters inside a picture: A1111's text, which tools read back, and the same as JSON.

Two text chunks: `parameters` (see infotext.py) and `diffquant`, JSON with everything that decides
the picture under the names of `generate`'s options, and no path of the machine it was made on:
files are named by their last part and told by their hash.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import MalformedFile
from diffquant.io.atomic import partial_path
from diffquant.runtime.infotext import to_infotext
from diffquant.runtime.recipe import Recipe, UsedLora

__all__ = ["VERSION", "from_parameters", "save_png", "save_preview"]

VERSION = 1  # of the JSON; a reader refuses a later one
_FINITE = 1e9  # numbers beyond it are no option's


def save_png(path: Path, picture: NDArray[np.float32], facts: Mapping[str, Any]) -> None:
    """Write (H, W, 3) in [0, 1] as an 8-bit PNG with its parameters, all or nothing."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    # tEXt, which every tool reads, where the text is Latin-1; PIL writes iTXt where it is not.
    chunks.add_text("parameters", to_infotext(facts))
    chunks.add_text("diffquant", json.dumps(dict(facts), sort_keys=True, allow_nan=False))
    _write(path, picture, chunks)


def save_preview(path: Path, picture: NDArray[np.float32]) -> None:
    """Write (H, W, 3) in [0, 1] as a PNG without parameters, all or nothing."""
    _write(path, picture, None)


def _write(path: Path, picture: NDArray[np.float32], chunks: Any) -> None:  # noqa: ANN401
    from PIL import Image

    rounded = np.clip(np.rint(picture * 255.0), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rounded).save(buffer, "PNG", pnginfo=chunks)
    beside = partial_path(path)
    try:
        beside.write_bytes(buffer.getvalue())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# Option -> the types its value may have in JSON; what is null was not asked for.
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative": (str,),
    "seed": (int,),
    "steps": (int,),
    "cfg": (int, float),
    "cfg_cutoff": (int, float),
    "cfg_rescale": (int, float),
    "guidance": (int, float),
    "size": (list,),
    "sampler": (str,),
    "schedule": (str,),
    "shift": (int, float),
    "eta": (int, float),
    "text_tokens": (int,),
    "clip_skip": (int,),
    "prompt_style": (str,),
    "rng": (str,),
    "strength": (int, float),
    "preset": (str,),
    "dtype": (str,),
    "compute": (str,),
}
# Object in JSON -> its fields that are options, and the option that names its file.
_PARTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "image": ("image", {}),
    "mask": ("mask", {}),
    "refiner": ("refiner", {"switch": "refiner_switch"}),
    "hires": ("hires_model", {"factor": "hires", "strength": "hires_strength"}),
}


def from_parameters(text: str, where: object) -> Recipe:
    """Read the `diffquant` chunk; the picture may be anybody's.

    Raises:
        MalformedFile: not what `save_png` writes, or of a later version.
    """
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"diffquant: not JSON: {error}", path=where) from None
    if not isinstance(facts, dict):
        raise MalformedFile("diffquant: expected a JSON object", path=where)
    version = facts.get("version", VERSION)
    if type(version) is not int or version > VERSION:
        raise MalformedFile(
            f"diffquant: parameters of version {version!r:.20}, up to {VERSION} are read: update "
            "diffquant",
            path=where,
        )
    fields: dict[str, Any] = {}
    for key, types in _FIELDS.items():
        if (value := facts.get(key)) is not None:
            fields[key] = _checked(key, value, types, where)
    if "size" in fields:
        sides = fields["size"]
        if len(sides) != 2 or not all(type(one) is int for one in sides):
            raise MalformedFile(f"diffquant: size is {sides!r:.60}", path=where)
        fields["size"] = (sides[0], sides[1])
    files = {}
    for key, (option, inside) in _PARTS.items():
        part = facts.get(key)
        if part is None:
            continue
        part = _checked(key, part, (dict,), where)
        for name, other in inside.items():
            if part.get(name) is not None:
                fields[other] = _checked(f"{key}.{name}", part[name], (int, float), where)
        if part.get("name"):
            files[option] = (_text(part, "name", where), _text(part, "hash", where))
    loras = _checked("loras", facts.get("loras", []), (list,), where)
    return Recipe(
        "diffquant",
        fields,
        tuple(_lora(one, where) for one in loras),
        _text(facts, "model", where),
        _text(facts, "fingerprint", where),
        files=files,
    )


def _checked(key: str, value: Any, types: tuple[type, ...], where: object) -> Any:  # noqa: ANN401
    good = isinstance(value, types) and not isinstance(value, bool)
    if not good or (type(value) is float and not -_FINITE < value < _FINITE):
        raise MalformedFile(f"diffquant: {key} is {value!r:.60}", path=where)
    return value


def _text(facts: Mapping[str, Any], key: str, where: object) -> str:
    return str(_checked(key, facts.get(key) or "", (str,), where))


def _lora(one: object, where: object) -> UsedLora:
    if not isinstance(one, dict):
        raise MalformedFile(f"diffquant: a LoRA is {one!r:.60}", path=where)
    weight = _checked("a LoRA's weight", one.get("weight"), (int, float), where)
    return UsedLora(_text(one, "name", where), float(weight), _text(one, "hash", where))
