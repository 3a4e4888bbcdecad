"""Compile a Triton encoder for a card that is not here, as launching it would."""

import sys

import torch
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffquant.quant.backends import BACKENDS, backend

_POINTERS = {torch.uint8: "*u8", torch.int8: "*i8", torch.float32: "*fp32"}


def _recorded(monkeypatch, codec, weight):
    """What an encoder launches: its first kernel, and with what."""
    calls = []

    def record(kernel, programs, warps, *args, **constants):
        calls.append((kernel, warps, args, constants))

    encode = backend(codec, "encode", "cuda")
    module = sys.modules[BACKENDS[codec, "encode", "cuda"].partition(":")[0]]
    monkeypatch.setattr(module, "launch", record)
    encode(weight, fmt=codec)
    monkeypatch.undo()
    return calls[0]


def compiled(monkeypatch, codec, weight, *, capability=90, enable_fp_fusion=False):
    """The compiled kernel of a codec for float32 rows like `weight`."""
    kernel, warps, args, constants = _recorded(monkeypatch, codec, weight)
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[at].is_constexpr:
            signature[name], constexprs[name] = "constexpr", value
            continue
        assert isinstance(value, torch.Tensor) or kernel.params[at].do_not_specialize, name
        signature[name] = _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor):  # numbers are not specialized
            attributes[(at,)] = [["tt.divisibility", 16]]
    return compile_source(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": enable_fp_fusion},
    )
