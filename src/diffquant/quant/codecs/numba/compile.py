"""How every kernel here is compiled: cached, no GIL, strict float32, C's division by zero."""

from __future__ import annotations

import numba

__all__ = ["inlined", "kernel"]

# A kernel is called from Python; an inlined function only from kernels, LLVM folds it in.
kernel = numba.njit(nogil=True, cache=True, error_model="numpy", no_cfunc_wrapper=True)
inlined = numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
