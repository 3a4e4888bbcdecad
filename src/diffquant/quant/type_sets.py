"""TYPE_SETS: names for several types at once, as publishers offer them together."""

from __future__ import annotations

from diffquant.core.errors import UnknownFormat
from diffquant.quant.types import QuantType, type_named

__all__ = ["TYPE_SETS", "types_of_set"]

# The files that QuantStack's repositories hold, largest first (QuantStack/<model>-GGUF on the Hub,
# e.g. Qwen-Image-Edit-2509-GGUF, as listed in November 2026).
TYPE_SETS = {
    "q2-q8": (
        "q8_0",
        "q6_k",
        "q5_k_m",
        "q5_k_s",
        "q5_1",
        "q5_0",
        "q4_k_m",
        "q4_k_s",
        "q4_1",
        "q4_0",
        "q3_k_m",
        "q3_k_s",
        "q2_k",
    ),
}


def types_of_set(name: str) -> tuple[QuantType, ...]:
    """Look a set up; case does not matter.

    Raises:
        UnknownFormat: with the known names.
    """
    try:
        return tuple(map(type_named, TYPE_SETS[name.lower()]))
    except KeyError:
        raise UnknownFormat(name, TYPE_SETS, what="set of types") from None
