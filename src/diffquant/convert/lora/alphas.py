"""What a file says about its adapters' scale: alpha tensors, and PEFT's configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource

__all__ = ["Stated", "peft_config", "scalar", "stated_alpha"]

_SCALARS = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "u1",
    "I8": "i1",
    "BOOL": "u1",
    "BF16": "<u2",
}
_QUANTIFIED = re.compile(r"(\\[dw]|\[[^\]]*\]|\\?\.)[*+]")
_QUANTIFIER_LIMIT, _PATTERN_LIMIT = 3, 1000
_CONFIG_LIMIT = 16 << 20  # bytes of JSON; a LoraConfig with a pattern per layer has 200 KB


class Stated(NamedTuple):
    """Alpha as a configuration gives it; None where it does not. `rooted`: over sqrt(r)."""

    alpha: float | None
    rooted: bool


def scalar(source: TensorSource, key: str) -> float:
    """Read a one-element tensor of any plain dtype; may be NaN or infinite.

    Raises:
        MalformedFile: more than one element, or another dtype.
    """
    spec = source.specs[key]
    if spec.size != 1 or spec.dtype not in _SCALARS:
        raise MalformedFile(
            f"{key}: expected one number, found {spec.dtype} {spec.shape}", path=source.path
        )
    raw = source.read(key).view(_SCALARS[spec.dtype])
    if spec.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return float(raw[0])


def peft_config(source: TensorSource) -> Mapping[str, Any]:
    """PEFT's LoraConfig, flat, as field or "transformer.field" -> value; empty without one.

    Diffusers writes it into the header, PEFT itself into a file beside adapter_model.safetensors.

    Raises:
        MalformedFile: it is not JSON, or absurdly long.
    """
    beside = source.path.parent / "adapter_config.json"
    text = source.metadata.get("lora_adapter_metadata")
    where = "lora_adapter_metadata in the header"
    if text is None and source.path.stem == "adapter_model" and beside.is_file():
        if beside.stat().st_size > _CONFIG_LIMIT:
            raise MalformedFile(
                f"{beside.name} is too long to be a configuration", path=source.path
            )
        text, where = beside.read_text(encoding="utf-8", errors="replace"), beside.name
    if not isinstance(text, str):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{where} is not JSON", path=source.path) from error
    return found if isinstance(found, dict) else {}


def stated_alpha(config: Mapping[str, Any], prefix: str, module: str) -> Stated:
    """Alpha by a LoraConfig: the module's own by alpha_pattern, else lora_alpha."""
    if not config:
        return Stated(None, rooted=False)

    def field(name: str) -> object:
        return config.get(prefix + name, config.get(name))

    # LoHa's and LoKr's configurations call it alpha (peft 0.21.2, tuners/lokr/config.py).
    alpha, pattern = field("lora_alpha"), field("alpha_pattern")
    alpha = field("alpha") if alpha is None else alpha
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if _matches(key, module):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return Stated(None, rooted=False)
    return Stated(float(alpha), rooted=bool(field("use_rslora")))


def _matches(key: str, module: str) -> bool:
    """Whether PEFT's pattern means the module: peft 0.21.2, utils/other.py, get_pattern_key.

    A pattern comes from the file, so one that could take for ever to match means nothing here:
    quantifiers are taken of single characters only, and of few.
    """
    simple, count = _QUANTIFIED.subn("", key)
    if len(key) > _PATTERN_LIMIT or count > _QUANTIFIER_LIMIT or re.search(r"[*+{]", simple):
        return False
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error:
        return False
