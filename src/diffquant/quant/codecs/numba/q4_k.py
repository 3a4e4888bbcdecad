"""Fast twin of codecs/q4_k.py."""

from __future__ import annotations

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks, k_affine

__all__ = ["decode", "encode"]


def _encode(weight: Float32, packed: Bytes) -> None:
    k_affine.encode_super_blocks(weight, packed, top=15, first=-1.0, steps=20)


encode, decode = row_codec(
    blocks.encoder(_encode, 144), blocks.decoder(k_affine.decode_super_blocks, 256)
)
