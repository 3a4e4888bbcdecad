"""Which part of a source goes into a GGUF file, the image tower of Qwen2.5-VL among them.

Transformers keeps the tower in the same files as the language model; GGUF readers want a file of
its own. So the component is cut in two here, and only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffquant.convert.architectures.parts import PARTS
from diffquant.convert.architectures.qwen2_vl_vision import is_tower
from diffquant.convert.detect import Hyper, Match, PartMatch
from diffquant.convert.encoders.files import ENCODER_FILES
from diffquant.core.errors import UsageError, shorten

__all__ = ["MMPROJ", "gguf_part", "gguf_parts"]

MMPROJ = "mmproj"


def gguf_parts(match: Match) -> dict[str, PartMatch]:
    """Parts that a GGUF file can hold, by the name that --part takes."""
    found: dict[str, PartMatch] = {}
    for part in match.parts:
        if part.name == "denoiser":
            found[part.name] = part
        elif part.kind == "qwen2_vl_text" and part.layout != "gguf":
            found[part.name], tower = _cut(part)
            if tower is not None:
                found[tower.name] = tower
        elif part.kind in ENCODER_FILES:
            found[part.name] = part
    return found


def gguf_part(match: Match, asked: Sequence[str]) -> PartMatch:
    """The one part to write: the named one, else the denoiser, else the only one there is.

    Raises:
        UsageError: several, none, or one that GGUF has no form for.
    """
    have = gguf_parts(match)
    if len(asked) > 1:
        raise UsageError(f"a GGUF file holds one part: write {shorten(asked)} one by one")
    if not asked:
        if "denoiser" in have:
            return have["denoiser"]
        encoders = [name for name in have if name != MMPROJ] or list(have)
        if len(encoders) == 1:
            return have[encoders[0]]
        if not have:
            names = shorten([part.name for part in match.parts])
            raise UsageError(f"GGUF has no form for {names}: write it to a .safetensors file")
        raise UsageError(
            f"no denoiser in this source: name the part with --part ({', '.join(have)})"
        )
    name = asked[0]
    if name in have:
        return have[name]
    if name == MMPROJ:
        raise UsageError(
            "no image tower in this source: its language model came without `visual.` weights; "
            "image editing needs them, text to image does not"
        )
    raise UsageError(
        f"GGUF has no form for {name}: write it to a .safetensors file (parts it can hold: "
        f"{', '.join(have)})"
    )


def _cut(part: PartMatch) -> tuple[PartMatch, PartMatch | None]:
    """The language model, and the image tower where it is there."""
    tower = {key: shape for key, shape in part.shapes.items() if is_tower(key)}
    text = {key: shape for key, shape in part.shapes.items() if key not in tower}
    language = replace(part, shapes=text)
    if not tower:
        return language, None
    layout = part.layout if part.layout == "alternate" else "canonical"
    component = PARTS["qwen2_vl_vision"].components[0]
    hyper = _tower_hyper(part.hyper)
    for name, value in component.facts_of(tower, layout).items():
        if value is not None:
            hyper[name] = Hyper(value, "shape")
    return language, PartMatch(
        component.name, component.kind, layout, part.prefix, tower, hyper, ""
    )


def _tower_hyper(hyper: Mapping[str, Hyper]) -> dict[str, Hyper]:
    """What the model's config says of its image tower."""
    given = hyper.get("vision_config")
    if given is None or not isinstance(given.value, Mapping):
        return {}
    return {
        name: Hyper(tuple(value) if isinstance(value, list) else value, given.origin)
        for name, value in given.value.items()
    }
