"""A1111's `parameters` text: written as its tools read it back, and read as they write it.

::

    a red fox, <lora:style:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, ...

Values that hold a comma, a colon or a line break are JSON strings; the last line is parameters only
where it holds three pairs. Older versions write sampler and schedule as one ("DPM++ 2M Karras").
Source: AUTOMATIC1111/stable-diffusion-webui@0365002:modules/infotext_utils.py
(parse_generation_parameters, quote) and modules/processing.py (create_infotext).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from diffquant.core.errors import MalformedFile
from diffquant.runtime.recipe import Recipe, UsedLora
from diffquant.runtime.sampler_names import SAMPLER_NAMES, SCHEDULE_NAMES

__all__ = ["from_infotext", "to_infotext"]

# One linear pattern: a key, a colon, a JSON string or anything up to the next comma.
_PAIR = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<(?:lora|lyco):([^:<>]{1,200})(?::([^:<>]{0,40}))?(?::[^<>]{0,200})?>")
_NETWORK = re.compile(r"<(\w{1,20}):[^<>]{0,300}>")
_NEGATIVE = "Negative prompt:"
_MAX_CHARACTERS = 1 << 20
_TITLES = {
    spelling: row.title
    for row in (*SCHEDULE_NAMES, *SAMPLER_NAMES)  # "lcm" is both; "simple" and kin are one
    for spelling in (row.name, *row.spellings)
}


def to_infotext(facts: Mapping[str, Any]) -> str:
    """Write parameters as A1111 does; absent facts are left out.

    Args:
        facts: as parameters.py embeds them.
    """
    width, height = facts["size"]
    hires = facts.get("hires") or {}
    refiner = facts.get("refiner") or {}
    denoise = facts.get("strength") if facts.get("image") else hires.get("strength")
    pairs = {
        "Steps": facts["steps"],
        "Sampler": _TITLES.get(facts["sampler"], facts["sampler"]),
        "Schedule type": _TITLES.get(facts.get("schedule") or "", facts.get("schedule")),
        "CFG scale": facts.get("cfg"),
        "Distilled CFG Scale": facts.get("guidance"),
        "Shift": facts.get("shift"),
        "Eta": facts.get("eta"),
        "Seed": facts["seed"],
        "Size": f"{width}x{height}",
        "Model hash": (facts.get("fingerprint") or "")[:10] or None,
        "Model": facts["model"],
        "Denoising strength": denoise,
        "Clip skip": facts.get("clip_skip"),
        "RNG": "CPU" if facts.get("rng", "cpu") == "cpu" else None,  # absent: A1111's GPU noise
        "Hires upscale": hires.get("factor"),
        "Refiner": refiner.get("name"),
        "Refiner switch at": refiner.get("switch"),
        "Version": f"diffquant {facts['versions']['diffquant']}",
    }
    tags = "".join(f" <lora:{one['name']}:{one['weight']:g}>" for one in facts.get("loras", ()))
    lines = [facts["prompt"] + tags]
    if facts.get("negative"):
        lines.append(f"{_NEGATIVE} {facts['negative']}")
    lines.append(
        ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None)
    )
    return "\n".join(lines)


def from_infotext(text: str, where: object) -> Recipe:
    """Read parameters that A1111, Forge or one of their kin has written.

    Raises:
        MalformedFile: a number that is none, or a text of absurd size.
    """
    if len(text) > _MAX_CHARACTERS:
        raise MalformedFile(f"parameters of {len(text)} characters", path=where)
    *lines, last = text.replace("\r\n", "\n").strip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    at = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    prompt = "\n".join(line.strip() for line in lines[:at])
    negative = "\n".join(line.strip() for line in lines[at:]).removeprefix(_NEGATIVE).strip()
    fields: dict[str, Any] = {"prompt": prompt, "negative": negative or None}
    notes, loras = [], []
    for name, weight in _LORA.findall(prompt):
        try:
            loras.append(UsedLora(name, float(weight or 1)))
        except ValueError:
            notes.append(f"the weight of <lora:{name}:{weight}> is no number, 1 is taken")
            loras.append(UsedLora(name, 1.0))
    fields["prompt"] = _LORA.sub("", prompt).strip()
    fields["prompt"], others = _without_networks(fields["prompt"])
    notes += [f"<{one}: ...> is not understood, and left out of the prompt" for one in others]
    for key, value in pairs.items():
        if key in _READ:
            name, read = _READ[key]
            try:
                fields[name] = read(value)
            except ValueError:
                raise MalformedFile(f"parameters: {key}: {value!r:.60}", path=where) from None
        elif key not in _IGNORED:
            notes.append(f"{key}: {value} is not used")
    if pairs and "rng" not in fields:
        fields["rng"] = "philox"  # A1111's default draws noise as a graphics card does
    if "hires" in fields:
        fields["hires_strength"] = fields.pop("strength", None)
    elif "strength" in fields:
        notes.append("it was made from another picture: give it with --image")
    return Recipe("a1111", fields, tuple(loras), str(pairs.get("Model", "")), "", tuple(notes))


def _pairs(line: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in _PAIR.findall(line):
        found.setdefault(key.strip(), _unquoted(value.strip()))
    return found


def _without_networks(prompt: str) -> tuple[str, list[str]]:
    names = _NETWORK.findall(prompt)
    return _NETWORK.sub("", prompt).strip() if names else prompt, names


def _quoted(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(text: str) -> str:
    if not (len(text) >= 2 and text[0] == text[-1] == '"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])


def _rng(text: str) -> str:
    return {"CPU": "cpu", "GPU": "philox", "NV": "philox"}[text]


def _known(table: Callable[[str], str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        try:
            return table(text)
        except KeyError:
            raise ValueError(text) from None

    return read


def _schedule(text: str) -> str | None:
    return None if text == "Automatic" else text


# A1111's key -> option of `generate`, and how the value is read.
_READ: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "Schedule type": ("schedule", _schedule),
    "CFG scale": ("cfg", float),
    "Distilled CFG Scale": ("guidance", float),
    "Shift": ("shift", float),
    "Eta": ("eta", float),
    "Seed": ("seed", int),
    "Size": ("size", _size),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", int),
    "RNG": ("rng", _known(_rng)),
    "Hires upscale": ("hires", float),
    "Refiner switch at": ("refiner_switch", float),
}
# Of no effect on the picture, or said in another way.
_IGNORED = {
    "Model", "Model hash", "Version", "Lora hashes", "TI hashes", "Hashes", "User", "Module 1",
    "Module 2", "Module 3", "VAE hash",
}  # fmt: skip
