"""Encoders for a GPU, in Triton: the same bytes as codecs/numba, on float32 rows on a card.

Which codecs have one says quant/backends.py; numbers.py says how the bytes come out equal. Modules
import torch and triton, and are loaded when a weight is first encoded on a card.
"""

__all__: list[str] = []
