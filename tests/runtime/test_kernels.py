"""Reference decoders against gguf-py and bitsandbytes, bit for bit."""

import subprocess
import sys
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from packed_parts import HALVES, random_blocks, random_parts, same_numbers

from diffquant.core.errors import UnknownFormat
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS, ROWWISE, best, scratch, table
from diffquant.runtime.kernels import numba as fast

GGML = tuple(HALVES)


@pytest.mark.parametrize("name", GGML)
def test_block_formats_equal_gguf(name):
    gguf = pytest.importorskip("gguf")
    data = random_blocks(name, rows=6, columns=512)
    kind = gguf.GGMLQuantizationType[name.upper()]
    wanted = gguf.quants.dequantize(data, kind)
    found = KERNELS[name]({"weight": torch.from_numpy(data)}, (6, 512), torch.float32)
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("name", GGML)
def test_block_formats_take_convolution_shapes_and_cast_last(name):
    gguf = pytest.importorskip("gguf")
    data = random_blocks(name, rows=2, columns=256)
    kind = gguf.GGMLQuantizationType[name.upper()]
    wanted = torch.from_numpy(gguf.quants.dequantize(data, kind))
    found = KERNELS[name]({"weight": torch.from_numpy(data)}, (2, 16, 4, 4), torch.bfloat16)
    assert torch.equal(found, wanted.reshape(2, 16, 4, 4).bfloat16())


@pytest.mark.parametrize("shape", [(16, 64), (7, 40), (3, 5, 3, 3)])
def test_nf4_equals_bitsandbytes(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    wanted = functional.dequantize_4bit(packed, state)
    parts = {"weight": packed.flatten(), "absmax": state.absmax}
    assert torch.equal(KERNELS["nf4"](parts, shape, torch.float32), wanted)


def test_fp8_is_value_times_scale():
    qdata = torch.tensor([[1.0, -2.5], [448.0, 0.0]]).to(torch.float8_e4m3fn)
    plain = KERNELS["fp8_e4m3"]({"weight": qdata}, (2, 2), torch.float32)
    assert plain.tolist() == [[1.0, -2.5], [448.0, 0.0]]
    parts = {"weight": qdata, "scale": torch.tensor(0.5)}
    scaled = KERNELS["fp8_e4m3_scaled"](parts, (2, 2), torch.float32)
    assert scaled.tolist() == [[0.5, -1.25], [224.0, 0.0]]


def test_int8_has_a_scale_per_row():
    parts = {
        "weight": torch.tensor([[127, -127], [1, 2]], dtype=torch.int8),
        "scale": torch.tensor([[0.5], [3.0]]),
    }
    found = KERNELS["int8_rowwise"](parts, (2, 1, 2), torch.float32)
    assert found.tolist() == [[[63.5, -63.5]], [[3.0, 6.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_formats_are_not_copied(dtype):
    weight = torch.randn(3, 4).to(dtype)
    name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    found = KERNELS[name]({"weight": weight}, (3, 4), dtype)
    assert found.data_ptr() == weight.data_ptr()


def test_only_flat_blocks_and_tiles_cannot_be_cut_by_rows():
    codebooks = {f"asym_w4a8_int8{suffix}" for suffix in ("", "_64", "_16")}
    tiled = {"mxfp8", "nvfp4_comfy", "fp8_e4m3_blockwise", "int8_blockwise"}
    assert frozenset(KERNELS) - ROWWISE == {"nf4", "nf4_dq", "fp4", "fp4_dq", *tiled, *codebooks}


def test_every_number_format_has_a_kernel():
    assert FORMATS.keys() <= KERNELS.keys()


def shape_for(name):
    """Rows and columns that end inside a span and, where the format allows it, inside a block."""
    row = FORMATS[name]
    if row.is_tiled:
        return (256, 384) if row.codec == "blocks_128" else (200, 150)
    if row.rotation:
        return (131, 256)
    return (129, 256) if row.block_size and not row.flat_block else (131, 259)


@pytest.fixture
def threads(monkeypatch):
    """Small spans, so that small weights have several, and three threads to share them."""
    monkeypatch.setattr(fast, "SPAN", 5000)
    monkeypatch.setattr(fast, "SMALLEST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("odd", [False, True], ids=["ordinary", "odd scales"])
@pytest.mark.parametrize("name", FORMATS)
def test_numba_gives_the_references_numbers(name, odd, threads, monkeypatch):
    shape = shape_for(name)
    parts = random_parts(name, shape, odd=odd)
    wanted = KERNELS[name](parts, shape, torch.float32)
    monkeypatch.setattr(fast, "REFERENCE", {})  # nothing may be left to it
    for dtype in fast.DTYPES:
        found = fast.KERNELS[name](parts, shape, dtype)
        assert same_numbers(found, wanted.to(dtype)), dtype


@pytest.mark.parametrize("rows", [1, 2, 3, 130])
@pytest.mark.parametrize("name", ["q8_0", "q4_k", "int8_rowwise", "nf4", "fp8_e4m3_scaled"])
def test_numba_decodes_any_number_of_rows(name, rows, threads):
    parts = random_parts(name, (rows, 256))
    wanted = KERNELS[name](parts, (rows, 16, 4, 4), torch.bfloat16)
    found = fast.KERNELS[name](parts, (rows, 16, 4, 4), torch.bfloat16)
    assert same_numbers(found, wanted)


def test_parts_that_formats_does_not_describe_go_to_the_reference(threads):
    """fp8 with a scale per row, as some files have it; int8 rows with one scale for all."""
    parts = random_parts("fp8_e4m3_scaled", (64, 32))
    parts["scale"] = torch.rand(64, 1)
    found = fast.KERNELS["fp8_e4m3_scaled"](parts, (64, 32), torch.float32)
    assert same_numbers(found, parts["weight"].float() * parts["scale"])
    parts = {**random_parts("int8_rowwise", (64, 32)), "scale": torch.tensor(0.5)}
    found = fast.KERNELS["int8_rowwise"](parts, (64, 32), torch.float32)
    assert same_numbers(found, parts["weight"].float() * 0.5)


def test_small_weights_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(fast, "REFERENCE", {"q8_0": lambda *_: "the reference"})
    parts = random_parts("q8_0", (2, 32))
    assert fast.KERNELS["q8_0"](parts, (2, 32), torch.float32) == "the reference"


def test_an_error_in_a_thread_is_raised(threads, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("in a span")

    monkeypatch.setattr(fast, "backend", lambda *_: broken)
    with pytest.raises(ZeroDivisionError, match="in a span"):
        fast.KERNELS["q8_0"](random_parts("q8_0", (200, 256)), (200, 256), torch.float32)


def test_a_weight_that_is_kept_is_not_written_over(threads):
    first, second = (random_parts("int8_rowwise", shape) for shape in ((64, 32), (32, 64)))
    kept = fast.KERNELS["int8_rowwise"](first, (64, 32), torch.float32)[3:]  # a view is enough
    copy = kept.clone()
    other = fast.KERNELS["int8_rowwise"](second, (32, 64), torch.float32)
    assert other.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()
    assert torch.equal(kept, copy)


def test_scratch_is_lent_again_and_bounded(monkeypatch):
    monkeypatch.setattr(scratch, "_idle", deque(maxlen=1))
    monkeypatch.setattr(scratch, "KEPT_NBYTES", 5000)
    one = scratch.lend(1000, torch.float32)
    address = one.data_ptr()
    assert address % 64 == 0
    two = scratch.lend(10, torch.float32)
    del one
    del two  # of two buffers the larger is kept
    again = scratch.lend(2000, torch.bfloat16)
    assert again.data_ptr() == address
    del again
    large = scratch.lend(4000, torch.float32)
    assert not scratch._idle  # the old one went when a larger was asked for
    del large
    assert not scratch._idle


@pytest.mark.parametrize(
    ("name", "device", "dtype", "backend", "reason"),
    [
        ("q4_k", "cpu", torch.bfloat16, "numba", "span by span"),
        ("f16", "cpu", torch.bfloat16, "numba", "span by span"),
        ("f16", "cpu", torch.float16, "stored", "compute dtype"),
        ("fp8_e4m3", "cuda", torch.bfloat16, "torch", "triton"),
        ("q4_k", "xpu", torch.bfloat16, "torch", "for xpu"),
        ("q4_k", "mps", torch.float16, "torch", "for mps"),
        ("q4_k", "meta", torch.bfloat16, "torch", "for meta"),
        ("q4_k", "cpu", torch.float64, "torch", "do not know torch.float64"),
    ],
)
def test_table_says_what_serves_and_why(name, device, dtype, backend, reason):
    found = best(name, device, dtype)
    assert found.backend == backend
    assert reason in found.reason
    if found.backend != "numba":
        assert found.kernel is KERNELS[name]


def test_table_names_known_formats():
    with pytest.raises(UnknownFormat, match="did you mean 'q4_k'"):
        best("q4k", "cpu", torch.float32)


def test_without_numba_the_reference_serves(monkeypatch):
    for name in [one for one in sys.modules if one.split(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [one for one in sys.modules if one.startswith("diffquant.quant.codecs.numba")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "diffquant.runtime.kernels.numba")
    table.best.cache_clear()
    table._loaded.cache_clear()
    try:
        found = best("q8_0", "cpu", torch.bfloat16)
    finally:
        table.best.cache_clear()
        table._loaded.cache_clear()
    assert found.backend == "torch"
    assert "numba cannot be loaded" in found.reason
    assert found.kernel is KERNELS["q8_0"]


def test_numba_is_loaded_when_it_is_needed():
    code = (
        "import sys, torch, diffquant.runtime.layers as layers\n"
        "layers.PackedWeight.of(torch.ones(4, 4)).dequantize(torch.float32)\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
