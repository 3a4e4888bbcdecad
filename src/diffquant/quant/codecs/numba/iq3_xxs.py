"""Fast twin of codecs/iq3_xxs.py."""

from __future__ import annotations

from diffquant.quant.codecs.iq3_xxs import pack, unpack
from diffquant.quant.codecs.iq_blocks import grid_codec
from diffquant.quant.codecs.numba.iq_expand import expand
from diffquant.quant.codecs.numba.iq_search import search

__all__ = ["decode", "encode"]

encode, decode = grid_codec("iq3_xxs", pack, unpack, find=search, expand=expand)
