"""Bytes and decoded values against the programs that define the formats: equal, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from diffquant.core.dtypes import STORAGE
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS

pytestmark = pytest.mark.oracle

DEVICES = ("reference", "cpu")
# Rows of every kind of weight: in CI 1,664 super-blocks of 256 by the plain references, which are
# slow, and 4,992 by the fast twins (test_ggml_bytes.py has 24,000 more); all 9,984 are marked slow.
SIZES = (
    pytest.param("reference", 16, id="reference"),
    pytest.param("cpu", 48, id="cpu"),
    pytest.param("reference", None, id="reference-whole", marks=pytest.mark.slow),
    pytest.param("cpu", None, id="cpu-whole", marks=pytest.mark.slow),
)
GGML = tuple(name for name in FORMATS if name.upper() in STORAGE and STORAGE[name.upper()].is_block)
PLAIN = tuple(n for n in GGML if FORMATS[n].encodes and FORMATS[n].importance != "required")
WEIGHED = tuple(name for name in GGML if FORMATS[name].importance != "unused")


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def stacked(awkward: Mapping[str, np.ndarray], rows: int | None) -> np.ndarray:
    """The first rows of every kind of weight, one kind below the other: one call for all."""
    return np.concatenate([weight[:rows] for weight in awkward.values()])


def assert_same_rows(
    found: np.ndarray, expected: np.ndarray, awkward: Mapping[str, np.ndarray], told: str = ""
) -> None:
    """Hold packed rows of `stacked` weights against ggml's, kind by kind."""
    assert found.shape == expected.shape
    count = len(found) // len(awkward)
    for index, what in enumerate(awkward):
        part = slice(index * count, (index + 1) * count)
        different = int((found[part] != expected[part]).sum())
        assert not different, f"{what}{told}: {different} bytes differ"


def packed_by(name: str, weight: np.ndarray) -> np.ndarray:
    """Bytes to decode: encoded where the format can be, else random."""
    row = FORMATS[name]
    if not row.encodes:
        storage = STORAGE[name.upper()]
        rows, columns = weight.shape
        nbytes = columns // storage.block_size * storage.block_nbytes
        return np.random.default_rng(7).integers(0, 256, (rows, nbytes), dtype=np.uint8)
    extra = {}
    if row.importance == "required":
        extra["importance"] = np.ones(weight.shape[1], np.float32)
    packed: np.ndarray = backend(row.codec, "encode")(weight, fmt=name, **extra)["weight"]
    return packed


def imported(name: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize(("device", "rows"), SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_blocks_equal_ggmls(
    name: str,
    device: str,
    rows: int | None,
    awkward: Mapping[str, np.ndarray],
    ggml_encode: Callable[..., np.ndarray],
) -> None:
    encode = backend(name, "encode", device)
    weight = stacked(awkward, rows)
    found = encode(weight, fmt=name)["weight"]
    assert_same_rows(found, ggml_encode(name, weight), awkward)


@pytest.mark.parametrize(("device", "rows"), SIZES)
@pytest.mark.parametrize("name", WEIGHED)
def test_blocks_with_importance_equal_ggmls(
    name: str,
    device: str,
    rows: int | None,
    awkward: Mapping[str, np.ndarray],
    importances: Mapping[str, np.ndarray],
    ggml_encode: Callable[..., np.ndarray],
) -> None:
    encode = backend(name, "encode", device)
    for kind, importance in importances.items():
        kinds = awkward
        if device == "reference" and kind in ("ones", "of all sizes"):
            kinds = {"gaussian": awkward["gaussian"]}  # the plain reference is slow
        weight = stacked(kinds, rows)
        found = encode(weight, fmt=name, importance=importance)["weight"]
        assert_same_rows(found, ggml_encode(name, weight, importance), kinds, f", {kind}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e8, 1e12, 1e19, 3e37])
@pytest.mark.parametrize("name", ["q3_k", "q6_k"])
def test_sums_that_overflow_leave_ggmls_scales(
    name: str,
    scale: float,
    device: str,
    awkward: Mapping[str, np.ndarray],
    importances: Mapping[str, np.ndarray],
    ggml_encode: Callable[..., np.ndarray],
) -> None:
    # Squares and cubes become infinite, scales not a number: ggml takes the largest of the others.
    weight = awkward["gaussian"] * np.float32(50) * np.float32(scale)
    assert np.isfinite(weight).all()
    for importance in (None, importances["mean squares"]):
        extra = {} if importance is None else {"importance": importance}
        found = backend(name, "encode", device)(weight, fmt=name, **extra)["weight"]
        assert bits(found) == bits(ggml_encode(name, weight, importance))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GGML)
def test_decoded_blocks_equal_ggufs(
    name: str, device: str, awkward: Mapping[str, np.ndarray]
) -> None:
    gguf = imported("gguf")
    kind = gguf.GGMLQuantizationType(STORAGE[name.upper()].ggml_id)
    decode = backend(name, "decode", device)
    for what in ("gaussian", "outlier columns", "blocks of all sizes", "1e-7"):
        weight = awkward[what]
        packed = packed_by(name, weight)
        with np.errstate(all="ignore"):  # some scales overflow
            expected = gguf.quants.dequantize(packed, kind)
        found = decode({"weight": packed}, weight.shape, fmt=name)
        finite = np.isfinite(expected)
        assert bits(found[finite]) == bits(expected[finite]), what
        np.testing.assert_array_equal(found, expected, err_msg=what)


@pytest.mark.parametrize("device", DEVICES)
def test_decoded_blocks_equal_ggufs_for_any_bytes(device: str) -> None:
    gguf = imported("gguf")
    rng = np.random.default_rng(5)
    for name in GGML:
        storage = STORAGE[name.upper()]
        packed = rng.integers(0, 256, (4, 16 * storage.block_nbytes), dtype=np.uint8)
        shape = (4, 16 * storage.block_size)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(storage.ggml_id))
        found = backend(name, "decode", device)({"weight": packed}, shape, fmt=name)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GGML)
def test_decoded_blocks_equal_ggmls_for_any_bytes(
    name: str, device: str, ggml_decode: Callable[..., np.ndarray]
) -> None:
    storage = STORAGE[name.upper()]
    nbytes = 64 * storage.block_nbytes
    packed = np.random.default_rng(6).integers(0, 256, (16, nbytes), dtype=np.uint8)
    shape = (16, 64 * storage.block_size)
    found = backend(name, "decode", device)({"weight": packed}, shape, fmt=name)
    np.testing.assert_array_equal(found, ggml_decode(name, packed, shape[1]))


@pytest.mark.parametrize("device", DEVICES)
def test_mxfp4_exponents_just_below_powers_of_two_equal_ggmls(
    device: str, ggml_encode: Callable[..., np.ndarray]
) -> None:
    # The logarithms of the 44 floats below 2**127 round up to 127, of those below 2 none to 1.
    below = 1 - np.arange(64) * 2.0**-24
    peaks = np.ldexp(below, np.arange(-149, 128)[:, None]).astype(np.float32).reshape(-1, 1)
    rng = np.random.default_rng(8)
    shares = rng.uniform(-1, 1, (len(peaks), 32)).astype(np.float32)
    weight = peaks * shares
    weight[:, :1] = peaks
    weight[:, 1:8] = peaks * (np.array([10, 7, 5, 3.5, 2.5, 1.5, 0.5], np.float32) / -16)  # ties
    found = backend("mxfp4", "encode", device)(weight, fmt="mxfp4")["weight"]
    np.testing.assert_array_equal(found, ggml_encode("mxfp4", weight))


@pytest.mark.parametrize("device", DEVICES)
def test_nf4_equals_bitsandbytes(device: str, awkward: Mapping[str, np.ndarray]) -> None:
    bnb = imported("bitsandbytes.functional")
    encode, decode = (backend("nf4", operation, device) for operation in ("encode", "decode"))
    for what, whole in awkward.items():
        for shape in ((96, 1024), (7, 37), (4, 8), (5, 101)):  # the last three end partially
            weight = np.ascontiguousarray(whole[: shape[0], : shape[1]])
            packed, state = bnb.quantize_4bit(
                torch.from_numpy(weight), blocksize=64, compress_statistics=False, quant_type="nf4"
            )
            parts = encode(weight, fmt="nf4")
            assert bits(parts["weight"]) == bits(packed.numpy()), (what, shape)
            assert bits(parts["absmax"]) == bits(state.absmax.numpy()), (what, shape)
            expected = bnb.dequantize_4bit(packed, state).numpy()
            assert bits(decode(parts, shape, fmt="nf4")) == bits(expected), (what, shape)


@pytest.mark.parametrize("device", DEVICES)
def test_int8_equals_comfy_kitchen(device: str, awkward: Mapping[str, np.ndarray]) -> None:
    eager = imported("comfy_kitchen.backends.eager.quantization")
    encode, decode = (
        backend("int8_rowwise", operation, device) for operation in ("encode", "decode")
    )
    for what, weight in awkward.items():
        level, scale = eager.quantize_int8_rowwise(torch.from_numpy(weight.copy()))
        parts = encode(weight, fmt="int8_rowwise")
        assert bits(parts["weight"]) == bits(level.numpy()), what
        assert bits(parts["scale"]) == bits(scale.numpy()), what
        expected = eager.dequantize_int8_simple(level, scale).numpy()
        assert bits(decode(parts, weight.shape, fmt="int8_rowwise")) == bits(expected), what


@pytest.mark.parametrize("device", DEVICES)
def test_int8_of_one_scale_equals_comfy_kitchen(
    device: str, awkward: Mapping[str, np.ndarray]
) -> None:
    eager = imported("comfy_kitchen.backends.eager.quantization")
    name = "int8_tensor"
    for what, weight in awkward.items():
        level, scale = eager.quantize_int8_tensorwise(torch.from_numpy(weight.copy()))
        amax = backend(name, "reduce", device)(weight, None, fmt=name)
        parts = backend(name, "encode", device)(weight, amax, fmt=name)
        assert bits(parts["weight"]) == bits(level.numpy()), what
        assert bits(parts["scale"]) == bits(scale.numpy()), what
        expected = eager.dequantize_int8_simple(level, scale).numpy()
        found = backend(name, "decode", device)(parts, weight.shape, fmt=name)
        assert bits(found) == bits(expected), what


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8_e4m3_scaled", torch.float8_e4m3fn), ("fp8_e5m2_scaled", torch.float8_e5m2)],
)
def test_scaled_fp8_equals_comfy_kitchen(
    name: str, dtype: torch.dtype, device: str, awkward: Mapping[str, np.ndarray]
) -> None:
    eager = imported("comfy_kitchen.backends.eager.quantization")
    compared = 0
    for what, weight in awkward.items():
        tensor = torch.from_numpy(weight)
        scale = tensor.abs().amax() / torch.finfo(dtype).max
        if torch.isinf(1 / scale):
            continue  # NaN there: ours is tested in test_codecs.py
        compared += 1
        expected = eager.quantize_per_tensor_fp8(tensor, scale, dtype)
        amax = backend(name, "reduce", device)(weight, None, fmt=name)
        parts = backend(name, "encode", device)(weight, amax, fmt=name)
        assert bits(parts["weight"]) == bits(expected.view(torch.uint8).numpy()), what
        assert parts["scale"] == scale.numpy()
        decoded = backend(name, "decode", device)(parts, weight.shape, fmt=name)
        plain = eager.dequantize_per_tensor_fp8(expected, scale, torch.float32)
        assert bits(decoded) == bits(plain.numpy()), what
    assert compared >= len(awkward) - 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("f16", torch.float16),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
    ],
)
def test_casts_equal_torch(name: str, dtype: torch.dtype, device: str) -> None:
    every = np.arange(0, 2**32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
    # NaN payloads are ours to choose; beyond 464 torch's fp8 saturates or not by version.
    limit = {"fp8_e4m3": 464, "fp8_e5m2": 61439}.get(name, np.inf)
    weight = every[np.abs(every) <= limit][None]
    codec = FORMATS[name].codec
    found = backend(codec, "encode", device)(weight, fmt=name)["weight"]
    kind = torch.uint8 if name.startswith("fp8") else torch.int16
    expected = torch.from_numpy(weight).to(dtype)
    assert bits(found) == bits(expected.view(kind).numpy())
    decoded = backend(codec, "decode", device)({"weight": found}, weight.shape, fmt=name)
    assert bits(decoded) == bits(expected.float().numpy())
