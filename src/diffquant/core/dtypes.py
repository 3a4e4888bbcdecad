"""STORAGE: every dtype a tensor can have on disk, in safetensors and GGML spelling.

A row says how many elements share a block and how many bytes the block takes, so sizes follow from
shapes alone: `nbytes = prod(shape) / block_size * block_nbytes`. Blocks run along the last
dimension.

Sources: safetensors (huggingface/safetensors@24b0b28:safetensors/src/tensor.rs, `Dtype`); GGML ids
and block sizes (gguf-py 0.19.0 gguf/constants.py:4232-4267, GGML_QUANT_SIZES).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffquant.core.errors import UnsupportedDtype, UnsupportedShape

__all__ = ["GGML_IDS", "STORAGE", "Storage", "storage", "storage_nbytes"]


@dataclass(frozen=True, slots=True)
class Storage:
    """One on-disk dtype.

    Attributes:
        name: safetensors spelling for plain dtypes, GGML spelling for block types.
        block_size: elements per block (1 for plain dtypes).
        block_nbytes: bytes per block.
        ggml_id: GGML type id, None where GGUF has no such type.
        safetensors: whether a safetensors header may name it.
        is_float: whether elements are plain floating point numbers that need no scale.
    """

    name: str
    block_size: int
    block_nbytes: int
    ggml_id: int | None
    safetensors: bool
    is_float: bool = False

    @property
    def is_block(self) -> bool:
        """Whether several elements share bytes."""
        return self.block_size > 1


_ROWS = (
    Storage("F64", 1, 8, 28, True, True),
    Storage("F32", 1, 4, 0, True, True),
    Storage("F16", 1, 2, 1, True, True),
    Storage("BF16", 1, 2, 30, True, True),
    Storage("F8_E4M3", 1, 1, None, True, True),
    Storage("F8_E5M2", 1, 1, None, True, True),
    Storage("F8_E8M0", 1, 1, None, True),
    Storage("I64", 1, 8, 27, True),
    Storage("I32", 1, 4, 26, True),
    Storage("I16", 1, 2, 25, True),
    Storage("I8", 1, 1, 24, True),
    Storage("U64", 1, 8, None, True),
    Storage("U32", 1, 4, None, True),
    Storage("U16", 1, 2, None, True),
    Storage("U8", 1, 1, None, True),
    Storage("BOOL", 1, 1, None, True),
    Storage("Q4_0", 32, 2 + 16, 2, False),
    Storage("Q4_1", 32, 2 + 2 + 16, 3, False),
    Storage("Q5_0", 32, 2 + 4 + 16, 6, False),
    Storage("Q5_1", 32, 2 + 2 + 4 + 16, 7, False),
    Storage("Q8_0", 32, 2 + 32, 8, False),
    Storage("Q8_1", 32, 4 + 4 + 32, 9, False),
    Storage("Q2_K", 256, 2 + 2 + 16 + 64, 10, False),
    Storage("Q3_K", 256, 2 + 64 + 32 + 12, 11, False),
    Storage("Q4_K", 256, 2 + 2 + 128 + 12, 12, False),
    Storage("Q5_K", 256, 2 + 2 + 128 + 32 + 12, 13, False),
    Storage("Q6_K", 256, 2 + 128 + 64 + 16, 14, False),
    Storage("Q8_K", 256, 4 + 256 + 32, 15, False),
    Storage("IQ2_XXS", 256, 2 + 64, 16, False),
    Storage("IQ2_XS", 256, 2 + 64 + 8, 17, False),
    Storage("IQ3_XXS", 256, 2 + 64 + 32, 18, False),
    Storage("IQ1_S", 256, 2 + 32 + 16, 19, False),
    Storage("IQ4_NL", 32, 2 + 16, 20, False),
    Storage("IQ3_S", 256, 2 + 64 + 8 + 32 + 4, 21, False),
    Storage("IQ2_S", 256, 2 + 64 + 16, 22, False),
    Storage("IQ4_XS", 256, 2 + 2 + 4 + 128, 23, False),
    Storage("IQ1_M", 256, 32 + 16 + 8, 29, False),
    Storage("TQ1_0", 256, 2 + 4 * 13, 34, False),
    Storage("TQ2_0", 256, 2 + 64, 35, False),
    Storage("MXFP4", 32, 1 + 16, 39, False),
    Storage("NVFP4", 64, 4 + 32, 40, False),
    Storage("Q1_0", 128, 2 + 16, 41, False),
)

STORAGE: dict[str, Storage] = {row.name: row for row in _ROWS}
GGML_IDS: dict[int, Storage] = {row.ggml_id: row for row in _ROWS if row.ggml_id is not None}


def storage(name: str) -> Storage:
    """Look a dtype up.

    Raises:
        UnsupportedDtype: the table has no such name.
    """
    try:
        return STORAGE[name]
    except KeyError:
        raise UnsupportedDtype(f"unknown dtype {name!r}") from None


def storage_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` stored as `dtype`.

    Raises:
        UnsupportedShape: the last dimension is not a whole number of blocks.
    """
    row = STORAGE.get(dtype) or storage(dtype)
    if row.block_size == 1:
        return math.prod(shape) * row.block_nbytes
    if not shape or shape[-1] % row.block_size:
        last = shape[-1] if shape else 1
        raise UnsupportedShape(
            f"rows of {last} elements do not divide into {dtype} blocks of {row.block_size}"
        )
    return math.prod(shape) // row.block_size * row.block_nbytes
