"""Fast twins of the codecs for the CPU: the reference's bytes, one thread, the GIL released.

Callers bring the threads (the engine encodes row chunks from a pool). Arithmetic is strict
float32: no fast-math, no fused multiply-add, sums in the reference's order, so the bytes do not
depend on the machine. Machine code is cached beside these files at first use; numba watches only
the file that a kernel stands in, so after an edit to a shared file delete `__pycache__/*.nb?`.
"""

__all__: list[str] = []
