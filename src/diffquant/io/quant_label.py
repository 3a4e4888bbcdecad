"""What a file's name says of its numbers: the label under which the hub lists it.

The hub's rule for GGUF: of the labels found in the upper-cased name the last one counts, and where
a name is a recipe in percent ("-55IQ2_XXS-34Q2_K") the largest share. Safetensors have no such
rule; their words are those that publishers write.

Source: huggingface/huggingface.js@3a463ba packages/tasks/src/gguf.ts (parseGGUFQuantLabel,
parseGGUFQuantMix).
"""

from __future__ import annotations

import re

__all__ = ["quant_label"]

# In the hub's order: of two that fit at a place the first is taken, and `_[A-Z]+` may follow.
_LABEL = re.compile(
    r"(?:UD-)?(?:F32|F16|Q4_0|Q4_1|Q4_1_SOME_F16|Q4_2|Q4_3|Q8_0|Q5_0|Q5_1|Q2_K|Q3_K_S|Q3_K_M|Q3_K_L"
    r"|Q4_K_S|Q4_K_M|Q5_K_S|Q5_K_M|Q6_K|IQ2_XXS|IQ2_XS|Q2_K_S|IQ3_XS|IQ3_XXS|IQ1_S|IQ4_NL|IQ3_S"
    r"|IQ3_M|IQ2_S|IQ2_M|IQ4_XS|IQ1_M|BF16|Q4_0_4_4|Q4_0_4_8|Q4_0_8_8|TQ1_0|TQ2_0|MXFP4_MOE|NVFP4"
    r"|Q1_0|Q2_0|Q2_K_XL|Q3_K_XL|Q4_K_XL|Q5_K_XL|Q6_K_XL|Q8_K_XL)(?:_[A-Z]+)?"
)
_SHARE = re.compile(
    r"(?:(?<=^)|(?<=-))(\d{1,3})(F32|F16|BF16|Q4_0|Q4_1|Q5_0|Q5_1|Q8_0|Q8_1|Q2_K|Q3_K|Q4_K|Q5_K|Q6_K"
    r"|Q8_K|IQ2_XXS|IQ2_XS|IQ3_XXS|IQ1_S|IQ4_NL|IQ3_S|IQ2_S|IQ4_XS|IQ1_M|TQ1_0|TQ2_0|MXFP4|NVFP4"
    r"|Q1_0|Q2_0)(?=$|[-.])"
)
_WORDS = (
    "fp8_e4m3fn", "fp8_e5m2", "fp8_scaled", "fp8mixed", "fp8", "int8_convrot", "int8", "int4",
    "nvfp4", "mxfp8", "mxfp4", "nf4", "fp4", "bf16", "fp16", "fp32",
)  # fmt: skip
_WORD = re.compile(rf"(?<![a-z0-9])(?:{'|'.join(_WORDS)})(?![a-z0-9])")


def quant_label(name: str) -> str:
    """The label in a file's name, in capitals; "" where it has none."""
    base = name.rpartition("/")[2]
    if not base.lower().endswith(".gguf"):
        found = [one[0] for one in _WORD.finditer(base.lower().replace("-", "_"))]
        return found[-1].upper() if found else ""
    shares = [(int(one[1]), one[2]) for one in _SHARE.finditer(base.upper().removesuffix(".GGUF"))]
    if len(shares) > 1:
        return max(shares, key=lambda share: share[0])[1]
    labels = [one[0] for one in _LABEL.finditer(base.upper())]
    return labels[-1] if labels else ""
