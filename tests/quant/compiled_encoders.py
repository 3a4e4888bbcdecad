"""Compile a Triton encoder for a card that is not here, as launching it would."""

import sys

import torch
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS

_ROOM = "diffquant.quant.codecs.triton."
_POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.float32: "*fp32",
}


def _recorded(monkeypatch, codec, weight, **weigh):
    """What an encoder launches: kernels by name, and with what."""
    calls = {}

    def record(kernel, programs, warps, *args, **constants):
        calls.setdefault(kernel.fn.__name__, (kernel, warps, args, constants))

    encode = backend(codec, "encode", "cuda")
    fmt = next(name for name, row in FORMATS.items() if row.codec == codec)
    if FORMATS[fmt].importance == "required":
        weigh = {"importance": weight[0], **weigh}
    with monkeypatch.context() as patch:  # what the test patched itself stays
        for name, module in list(sys.modules.items()):
            if name.startswith(_ROOM) and hasattr(module, "launch"):
                patch.setattr(module, "launch", record)
        encode(weight, fmt=fmt, **weigh)
    return calls


def compiled(monkeypatch, codec, weight, *, capability=90, enable_fp_fusion=False, **weigh):
    """The first kernel of a codec for float32 rows like `weight`, or "codec.kernel", compiled."""
    codec, _, name = codec.partition(".")
    calls = _recorded(monkeypatch, codec, weight, **weigh)
    kernel, warps, args, constants = calls[name or next(iter(calls))]
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
