"""What a tensor of an adapter file is, by how its key ends: a module's name and a role.

    lora_unet_..._to_q . lora_down . weight      kohya, ComfyUI, lycoris
    ...to_q . lora_A [. adapter] [. weight]      PEFT; an adapter's name may stand between
    ...to_q_lora . down . weight                 Diffusers before PEFT: the module ends with `_lora`
    double_blocks.0.processor.qkv_lora1 . down   XLabs: the stream is part of the module's name
    unet:0 : down                                cloneofsimo/lora: modules are counted

Sources: those of kinds.py; the older endings: diffusers 0.42.1 (package),
utils/state_dict_utils.py, and loaders/lora_conversion_utils.py for XLabs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Part", "adapter_share", "part_of", "parts_of"]

_PLAIN, _WEIGHT, _EITHER = ("",), ("weight",), ("", "weight")
# Last segment of a key, a trailing `weight` aside -> (role, whether `.weight` follows).
_WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora_down": ("down", _WEIGHT),
    "lora_up": ("up", _WEIGHT),
    "lora_mid": ("mid", _WEIGHT),
    "lora_A": ("down", _EITHER),
    "lora_B": ("up", _EITHER),
    "lora_embedding_A": ("embedding_a", _PLAIN),
    "lora_embedding_B": ("embedding_b", _PLAIN),
    "lora_magnitude_vector": ("magnitude", _EITHER),
    "dora_scale": ("magnitude", _PLAIN),
    **{f"hada_{name}": (f"hada_{name}", _PLAIN) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"hada_{name}": (f"hada_{name}", _PLAIN) for name in ("t1", "t2")},
    **{f"lokr_{name}": (f"lokr_{name}", _PLAIN) for name in ("w1", "w1_a", "w1_b", "t1")},
    **{f"lokr_{name}": (f"lokr_{name}", _PLAIN) for name in ("w2", "w2_a", "w2_b", "t2")},
    **{name: (f"glora_{name}", _WEIGHT) for name in ("a1", "a2", "b1", "b2", "bm")},
    "q_layer": ("q_layer", _WEIGHT),
    "p_layer": ("p_layer", _WEIGHT),
    "lambda_layer": ("lambda", _PLAIN),
    "oft_blocks": ("oft_blocks", _PLAIN),
    "oft_diag": ("oft_blocks", _PLAIN),
    "oft_R": ("oft_r", _EITHER),
    "oft_r": ("oft_r", _EITHER),
    "rescale": ("rescale", _PLAIN),
    "boft_R": ("boft_r", _PLAIN),
    "boft_s": ("boft_s", _PLAIN),
    "ia3_l": ("ia3", _PLAIN),
    "on_input": ("on_input", _PLAIN),
    "diff": ("diff", _PLAIN),
    "diff_b": ("diff_b", _PLAIN),
    "set_weight": ("set_weight", _PLAIN),
    "reshape_weight": ("reshape_weight", _PLAIN),
    "w_norm": ("w_norm", _PLAIN),
    "b_norm": ("b_norm", _PLAIN),
    "alpha": ("alpha", _PLAIN),
}
# Words after which PEFT may write an adapter's name.
_NAMED = tuple(word for word in _WORDS if re.match(r"(lora|hada|lokr|oft|boft|ia3)_", word))
_STREAM = re.compile(r"_lora[12]$")
_COUNTED = re.compile(r"^(?P<module>[a-z_0-9]+:\d+):(?P<role>up|down)$")
# Roles that say nothing by themselves: other models have tensors of these names.
_WEAK = frozenset({"alpha", "rescale", "q_layer", "p_layer"})
_GLORA = frozenset({"glora_a1", "glora_a2", "glora_b1", "glora_b2"})
_WEAK_IF_ALONE = (_GLORA, frozenset({"q_layer", "p_layer", "lambda"}))


class Part(NamedTuple):
    """What a key says.

    Attributes:
        module: the module's name as written, prefix included.
        adapter: the adapter's name where PEFT wrote one, else "".
        role: as kinds.py names it, or alpha, magnitude, up_bias.
    """

    module: str
    adapter: str
    role: str


def part_of(key: str) -> Part | None:
    """Read one key by itself; None where it ends like no adapter's."""
    if counted := _COUNTED.match(key):
        return Part(counted["module"], "", counted["role"])
    names = key.split(".")
    last = names.pop() if names[-1] in ("weight", "bias") else ""
    if len(names) < 2:
        return None
    word = names[-1]
    if word in _WORDS:
        return _named(names[:-1], "", word, last)
    if names[-2] in _NAMED and len(names) > 2:
        return _named(names[:-2], word, names[-2], last)
    if word in ("down", "up") and last == "weight":
        return _older(names[:-1], word)
    return None


def _named(module: list[str], adapter: str, word: str, last: str) -> Part | None:
    role, endings = _WORDS[word]
    if last == "bias" and role == "up":
        return Part(".".join(module), adapter, "up_bias")
    if last not in endings:
        return None
    if role == "alpha" and module[-1] == "lora":  # Diffusers before PEFT: X.lora.alpha
        module = module[:-1]
    return Part(".".join(module), adapter, role) if module else None


def _older(module: list[str], role: str) -> Part | None:
    holder = module[-1]
    if holder in ("lora", "lora_linear_layer"):
        module = module[:-1]
    elif holder.endswith("_lora"):
        module = [*module[:-1], holder.removesuffix("_lora")]
    elif not _STREAM.search(holder):
        return None
    return Part(".".join(module), "", role) if module else None


def parts_of(keys: Iterable[str]) -> dict[str, Part]:
    """Read the keys of a file, in order; `X.weight` beside `X.on_input` is IA3's."""
    found: dict[str, Part] = {}
    listed = list(keys)
    for key in listed:
        part = part_of(key)
        if part is not None:
            found[key] = part
    vectors = {
        f"{part.module}.weight": Part(part.module, part.adapter, "ia3")
        for part in found.values()
        if part.role == "on_input"
    }
    return {key: part for key in listed if (part := found.get(key) or vectors.get(key)) is not None}


def adapter_share(keys: Iterable[str]) -> float:
    """How many of the keys, alphas and scales aside, are an adapter's: 0 to 1.

    Endings that other models have too count beside their fellows only.
    """
    counted = [key for key in keys if not key.endswith((".alpha", ".scale"))]
    parts = parts_of(counted)
    roles: dict[str, set[str]] = {}
    for part in parts.values():
        roles.setdefault(part.module, set()).add(part.role)
    sure = sum(_sure(part.role, roles[part.module]) for part in parts.values())
    return sure / max(len(counted), 1)


def _sure(role: str, beside: set[str]) -> bool:
    for group in _WEAK_IF_ALONE:
        if role in group or (role == "glora_bm" and group is _GLORA):
            return group <= beside
    return role not in _WEAK or bool(beside - _WEAK)
