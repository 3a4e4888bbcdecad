"""How every kernel here is compiled: cached, no GIL, strict float32, C's division by zero.

Compile time is paid by the user at the first use of a format. Numba turns every function it meets
into machine code of its own before LLVM folds it into its caller, so depth costs: a loop in a
function in a function is compiled three times. Hence `merged`, and constants that would let LLVM
write loops out are passed as variables.
"""

from __future__ import annotations

import numba

__all__ = ["inlined", "kernel", "merged"]

# A kernel is called from Python.
kernel = numba.njit(nogil=True, cache=True, error_model="numpy", no_cfunc_wrapper=True)
# An inlined function is called only from kernels: it needs no way in from Python.
inlined = numba.njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
# A merged function becomes part of its caller's text before anything is compiled: for long
# functions with one call each.
merged = numba.njit(nogil=True, error_model="numpy", inline="always")
