"""Padded formats with scales in tiles: every trap has a test, and comfy_kitchen judges."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from diffquant.quant.backends import backend
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.swizzle import swizzle, unswizzle
from diffquant.quant.formats import FORMATS

DEVICES = ("reference", "cpu")
SHAPES = ((200, 512), (1, 16), (33, 47), (130, 96), (256, 4096))


def eager() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("comfy_kitchen.backends.eager.quantization")


def gaussian(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape, np.float32) * np.float32(0.02)


def encode(name: str, device: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    row = FORMATS[name]
    stats = backend(name, "reduce", device)(weight, fmt=name) if row.passes == 2 else None
    parts: dict[str, np.ndarray] = backend(name, "encode", device)(weight, stats, fmt=name)
    return parts


def decode(
    name: str, device: str, parts: Mapping[str, np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    weight: np.ndarray = backend(name, "decode", device)(parts, shape, fmt=name)
    return weight


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 4), (33, 5), (128, 4), (300, 13)])
def test_a_scale_is_where_the_formula_says(rows: int, columns: int) -> None:
    scales = np.random.default_rng(1).integers(1, 256, (rows, columns), dtype=np.uint8)
    stored = swizzle(scales)
    wide = stored.shape[1]
    assert stored.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
    flat = stored.reshape(-1)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * (wide // 4) + c // 4
            at = tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            assert flat[at] == scales[r, c]
    assert np.count_nonzero(stored) == scales.size  # the padding is zero
    assert np.array_equal(unswizzle(stored, rows, columns), scales)
    if rows > 1 and columns > 4:
        assert not np.array_equal(stored[:rows, :columns], scales)


def test_tiles_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        unswizzle(np.zeros((128, 8), np.uint8), 129, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_the_even_column_is_in_the_high_nibble(device: str) -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :4] = 6, 0.5, -1, 4
    parts = encode("nvfp4_comfy", device, weight)
    assert parts["weight"][0, :2].tolist() == [0x71, 0xA6]
    assert parts["tensor_scale"] == np.float32(6) / np.float32(448 * 6)


@pytest.mark.parametrize("device", DEVICES)
def test_nvfp4_ties_go_to_the_even_code(device: str) -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :8] = 6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5
    weight[0, 8:] = -weight[0, :8]
    packed = encode("nvfp4_comfy", device, weight * np.float32(448))["weight"][0]
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    assert codes.tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 15, 8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4_comfy"])
def test_padding_is_stored_as_zeros_and_never_decoded(name: str, device: str) -> None:
    row, weight = FORMATS[name], gaussian((33, 47)) + np.float32(1)
    parts = encode(name, device, weight)
    for part in row.parts:
        assert parts[part.name].shape == part.shape(weight.shape)
    stored = parts["weight"]
    used = 47 if name == "mxfp8" else 24
    assert not stored[33:].any()
    assert not stored[:, used:].any()
    assert stored[:33, :used].all()
    assert decode(name, device, parts, weight.shape).shape == weight.shape


@pytest.mark.parametrize("device", DEVICES)
def test_mxfp8_blocks_below_the_smallest_scale_are_zeros(device: str) -> None:
    weight = gaussian((2, 64))
    weight[0, :32] = 1e-37
    parts = encode("mxfp8", device, weight)
    decoded = decode("mxfp8", device, parts, weight.shape)
    assert not decoded[0, :32].any()
    assert decoded[0, 32:].all()


@pytest.mark.parametrize("device", DEVICES)
def test_mxfp8_scales_are_powers_of_two_that_hold_the_largest(device: str) -> None:
    weight = np.zeros((3, 32), np.float32)
    weight[:, 0] = 448, 449, 447
    parts = encode("mxfp8", device, weight)
    assert unswizzle(parts["block_scale"], 3, 1)[:, 0].tolist() == [127, 128, 127]
    assert e4m3_table()[parts["weight"][:3, 0]].tolist() == [448, 224, 448]


@pytest.mark.oracle
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp8_equals_comfy_kitchen(shape: tuple[int, int], device: str) -> None:
    weight = gaussian(shape)
    check_mxfp8("shape", weight, device)


@pytest.mark.oracle
@pytest.mark.parametrize("device", DEVICES)
def test_mxfp8_of_awkward_weights_equals_comfy_kitchen(
    awkward: Mapping[str, np.ndarray], device: str
) -> None:
    for what, weight in awkward.items():
        if "subnormal" not in what:  # ours are zeros, comfy_kitchen's NaN
            # Magnitudes of blocks below the smallest scale differ for the same reason.
            check_mxfp8(what, np.where(np.abs(weight) < 1e-33, np.float32(0), weight), device)


@pytest.mark.oracle
@pytest.mark.parametrize("device", DEVICES)
def test_mxfp8_exponents_around_powers_of_two_equal_comfy_kitchens(device: str) -> None:
    powers = np.float32(448) * np.exp2(np.arange(-120, 119, dtype=np.float32))
    steps = np.arange(-16, 17, dtype=np.int32)
    near = (powers.view(np.int32)[:, None] + steps).view(np.float32)  # (239, 33)
    weight = np.zeros((*near.shape, 32), np.float32)
    weight[:, :, 0] = near
    check_mxfp8("powers", weight.reshape(len(near), -1), device)


def check_mxfp8(what: str, weight: np.ndarray, device: str) -> None:
    quantize, dequantize = eager().quantize_mxfp8, eager().dequantize_mxfp8
    code, scale = quantize(torch.from_numpy(weight.copy()), pad_32x=True)
    parts = encode("mxfp8", device, weight)
    assert np.array_equal(parts["block_scale"], scale.view(torch.uint8).numpy()), what
    assert np.array_equal(parts["weight"], code.view(torch.uint8).numpy()), what
    expected = dequantize(code, scale, torch.float32).numpy()
    found = decode("mxfp8", device, parts, weight.shape)
    assert found.tobytes() == expected[: len(weight), : weight.shape[1]].tobytes(), what


@pytest.mark.oracle
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_equals_comfy_kitchen(shape: tuple[int, int], device: str) -> None:
    check_nvfp4("shape", gaussian(shape), device)


@pytest.mark.oracle
@pytest.mark.parametrize("device", DEVICES)
def test_nvfp4_of_awkward_weights_equals_comfy_kitchen(
    awkward: Mapping[str, np.ndarray], device: str
) -> None:
    for what, weight in awkward.items():
        if weight.any():  # comfy_kitchen divides zeros by zero
            check_nvfp4(what, weight, device)


def check_nvfp4(what: str, weight: np.ndarray, device: str) -> None:
    tensor = torch.from_numpy(weight.copy())
    whole = torch.amax(tensor.abs()) / (448.0 * 6.0)
    if not whole:
        return  # the tensor's scale is 0 there, and its weights NaN
    code, scale = eager().quantize_nvfp4(tensor, whole, pad_16x=True)
    parts = encode("nvfp4_comfy", device, weight)
    assert parts["tensor_scale"] == whole.numpy()
    assert np.array_equal(parts["block_scale"], scale.view(torch.uint8).numpy()), what
    assert np.array_equal(parts["weight"], code.numpy()), what
    expected = eager().dequantize_nvfp4(code, whole, scale, torch.float32).numpy()
    found = decode("nvfp4_comfy", device, parts, weight.shape)
    assert found.tobytes() == expected[: len(weight), : weight.shape[1]].tobytes(), what


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4_comfy"])
def test_the_runtimes_decoder_gives_the_codecs_numbers(name: str, shape: tuple[int, int]) -> None:
    from diffquant.runtime.kernels import KERNELS

    parts = encode(name, "cpu", gaussian(shape))
    tensors = {key: torch.from_numpy(np.ascontiguousarray(part)) for key, part in parts.items()}
    for part in FORMATS[name].parts:
        if part.dtype == "F8_E4M3":
            tensors[part.name] = tensors[part.name].view(torch.float8_e4m3fn)
    found = KERNELS[name](tensors, shape, torch.float32)
    assert found.numpy().tobytes() == decode(name, "cpu", parts, shape).tobytes()
