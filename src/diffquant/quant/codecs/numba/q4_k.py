"""Fast twin of codecs/q4_k.py."""

from __future__ import annotations

from diffquant.quant.codecs import q4_k
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks, k_affine

__all__ = ["decode", "encode"]

_NBYTES = 144

encode, decode = row_codec(
    k_affine.encoder(_NBYTES, q4_k.TOP, q4_k.CANDIDATES),
    blocks.decoder(k_affine.decode_super_blocks, 256),
    k_affine.weighted_encoder(_NBYTES, q4_k.TOP, q4_k.CLAMP),
)
