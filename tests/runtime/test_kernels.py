"""Reference decoders against gguf-py and bitsandbytes, bit for bit."""

import warnings

import numpy as np
import pytest
import torch

from diffquant.runtime.kernels import KERNELS, ROWWISE

# Where each format keeps float16 numbers; iq1_m spreads its one over the top nibbles of four words.
HALVES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    **dict.fromkeys(("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), (0,)),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "mxfp4": (),
    "nvfp4": (),
    "iq1_s": (0,),
    "iq1_m": (),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
# Bytes of other scales that could overflow, and the bits they may have.
FINITE = {"iq1_m": ((55, 0xBF),), "mxfp4": ((0, 0x7F),)}
GGML = tuple(HALVES)


def random_blocks(gguf, name, rows, columns, seed=0):
    """Random bytes with finite, ordinary scales: every field of a block takes every value."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // elements, nbytes), dtype=np.uint8)
    for start in HALVES[name]:
        scale = generator.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8).reshape(-1, 2)
    for start, mask in FINITE.get(name, ()):
        blocks[:, start] &= mask
    return kind, blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", GGML)
def test_block_formats_equal_gguf(name):
    gguf = pytest.importorskip("gguf")
    kind, data = random_blocks(gguf, name, rows=6, columns=512)
    wanted = gguf.quants.dequantize(data, kind)
    found = KERNELS[name]({"weight": torch.from_numpy(data)}, (6, 512), torch.float32)
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("name", GGML)
def test_block_formats_take_convolution_shapes_and_cast_last(name):
    gguf = pytest.importorskip("gguf")
    kind, data = random_blocks(gguf, name, rows=2, columns=256)
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
    from diffquant.quant.formats import FORMATS
    from diffquant.runtime.kernels import KERNELS

    assert FORMATS.keys() <= KERNELS.keys()
