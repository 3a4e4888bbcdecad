"""Fast twin of codecs/q5_k.py."""

from __future__ import annotations

from diffquant.quant.codecs import q5_k
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks, k_affine

__all__ = ["decode", "encode"]

_NBYTES = 176

encode, decode = row_codec(
    k_affine.encoder(_NBYTES, q5_k.TOP, q5_k.CANDIDATES),
    blocks.decoder(k_affine.decode_super_blocks, 256),
    k_affine.weighted_encoder(_NBYTES, q5_k.TOP, q5_k.CLAMP),
)
