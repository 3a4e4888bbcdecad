"""Compile a Triton encoder for a card that is not here, as launching it would."""

import sys

import torch
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffquant.quant.backends import backend
from diffquant.quant.codecs.triton.launch import launch
from diffquant.quant.formats import FORMATS

_POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.float32: "*fp32",
}
_ROOM = "diffquant.quant.codecs.triton."


def _recorded(monkeypatch, codec, weight):
    """What an encoder launches: its kernels, and with what."""
    calls = []

    def record(kernel, programs, warps, *args, **constants):
        calls.append((kernel, warps, args, constants))

    encode = backend(codec, "encode", "cuda")
    for name, module in list(sys.modules.items()):
        if name.startswith(_ROOM) and getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", record)
    required = FORMATS[codec].importance == "required"
    encode(weight, fmt=codec, **({"importance": weight[0]} if required else {}))
    monkeypatch.undo()
    return calls


def compiled(monkeypatch, codec, weight, kernel="", *, capability=90, enable_fp_fusion=False):
    """A compiled kernel of a codec for float32 rows like `weight`; the first one by default."""
    calls = _recorded(monkeypatch, codec, weight)
    kernel, warps, args, constants = next(
        call for call in calls if call[0].__name__ == (kernel or call[0].__name__)
    )
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
