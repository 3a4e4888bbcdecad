"""Compile a Triton decoder for a card that is not here, as launching it would."""

import torch
from packed_parts import random_parts
from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from diffquant.runtime.kernels.triton import KERNELS, blocks, flat, rotated, scaled, tiled

_POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class _Recorder:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, programs):
        def call(*args, **constants):
            self.calls.append((self.kernel, args, constants))

        return call


def _compiled(kernel, args, constants, capability, **changed):
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants} | changed
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        fixed = kernel.params[at].do_not_specialize
        if kernel.params[at].is_constexpr or (isinstance(value, int) and value == 1 and not fixed):
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if isinstance(value, TensorDescriptor):
            kind = _POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{list(value.block_shape)}>"
            continue
        signature[name] = _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not fixed):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return compile_source(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled(monkeypatch, name, shape, dtype, *, capability=90, **changed):
    """The compiled kernel of a format; `changed` are launch options."""
    calls = []
    with monkeypatch.context() as changes:  # an undo() would take the caller's changes back too
        for module in (blocks, flat, rotated, scaled, tiled):
            launch = module.launch

            def recording(kernel, *args, _launch=launch, **constants):
                _launch(_Recorder(kernel, calls), *args, **constants)

            changes.setattr(module, "launch", recording)
        KERNELS[name](random_parts(name, shape), shape, dtype)
    kernel, args, constants = calls[0]
    return _compiled(kernel, args, constants, capability, **changed)


def compiled_call(monkeypatch, module, call, *, capability, direct=(), of=1, which=0):
    """The kernel that `call` would launch: by `module.launch`, or one of the names `direct`.

    Where it launches several (`of`), the one that is asked for.
    """
    calls = []

    def recording(kernel, programs, warps, *args, **constants):
        constants |= {"num_warps": warps, "enable_fp_fusion": False}
        calls.append((kernel, args, constants))

    with monkeypatch.context() as changes:
        if direct:
            for name in direct:
                changes.setattr(module, name, _Recorder(getattr(module, name), calls))
        else:
            changes.setattr(module, "launch", recording)
        call()
    assert len(calls) == of
    kernel, args, constants = calls[which]
    return _compiled(kernel, args, constants, capability)
