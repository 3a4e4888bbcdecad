"""One file per number format: its specification with a plain numpy reference.

Every file has `encode(weight, stats=None, *, fmt)` and `decode(parts, shape, *, fmt)`; a format
that needs a statistic of the whole tensor first also has `reduce`. `numba/` holds the fast twins:
the same names, the same bytes. quant/backends.py says which function the engine runs.
"""

__all__: list[str] = []
