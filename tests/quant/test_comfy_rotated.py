"""comfy_kitchen decides: int8 convrot, W4A4 and W4A8, both directions.

It multiplies by the whole Hadamard matrix, where we take it factor by factor: float32 sums round in
another order. So bytes are the same where no sum rounds (weights on a grid of 1 / 1024), and on any
other weights up to near ties, which are counted.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from diffquant.quant.backends import backend
from diffquant.quant.codecs.asym_w4a8_int8 import CODEBOOK
from diffquant.quant.codecs.rotation import rotate
from diffquant.quant.formats import FORMATS, QuantFormat

pytestmark = pytest.mark.oracle
DEVICES = ("reference", "cpu")
ROWS = [row for row in FORMATS.values() if row.rotation]
SHAPES = ((200, 1024), (1, 256), (37, 768), (7, 2304))


@pytest.fixture(scope="module")
def eager() -> dict[str, Any]:
    names = {"int8_convrot": "quantization", "convrot_w4a4": "convrot_w4a4"}
    names["asym_w4a8_int8"] = "w4a8_int8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            codec: pytest.importorskip(f"comfy_kitchen.backends.eager.{module}")
            for codec, module in names.items()
        }


def theirs(eager: dict[str, Any], row: QuantFormat, weight: np.ndarray):
    """Its parts, and what it decodes them to."""
    module, tensor, group = eager[row.codec], torch.from_numpy(weight.copy()), row.rotation
    if row.codec == "int8_convrot":
        level, scale = module.quantize_int8_convrot_weight(tensor, group)
        decoded = module.dequantize_int8_convrot_weight(level, scale, group)
        parts = {"weight": level, "scale": scale}
    elif row.codec == "convrot_w4a4":
        level, scale = module.quantize_convrot_w4a4_weight(tensor, group)
        decoded = module.dequantize_convrot_w4a4_weight(level, scale, group)
        parts = {"weight": level, "scale": scale}
    else:
        # Without a codebook it may fit one of its own, which we never do.
        book = torch.from_numpy(CODEBOOK)
        level, step, channel, _, book = module.quantize_w4a8_int8_weight(
            tensor, convrot_groupsize=group, codebook_tensor=book
        )
        decoded = module.dequantize_w4a8_int8_weight(
            level, step, channel, book, convrot_groupsize=group, output_dtype=torch.float32
        )
        parts = {"weight": level, "s_rel": step.view(torch.uint8), "s_channel": channel}
        parts["codebook"] = book
    return {name: part.numpy() for name, part in parts.items()}, decoded.numpy()


def weights(shape: tuple[int, int], kind: str) -> np.ndarray:
    weight = np.random.default_rng(shape[1]).standard_normal(shape).astype(np.float32)
    weight *= np.float32(0.02)
    if kind == "grid":
        weight = np.round(weight * 1024).astype(np.float32) / np.float32(1024)
        weight[shape[0] // 2] = 0
    if kind == "outlier":
        weight[:, 5] *= 20
    return weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bytes_are_the_same_where_no_sum_rounds(eager, row, shape, device) -> None:
    weight = weights(shape, "grid")
    expected, decoded = theirs(eager, row, weight)
    parts = backend(row.codec, "encode", device)(weight, fmt=row.name)
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert part.tobytes() == expected[name].tobytes(), name
    found = backend(row.codec, "decode", device)(parts, shape, fmt=row.name)
    np.testing.assert_allclose(found, decoded, atol=4e-6 * np.abs(decoded).max())


@pytest.mark.parametrize("kind", ["gaussian", "outlier"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_codes_differ_in_near_ties_alone(eager, row, kind) -> None:
    weight = weights((200, 1024), kind)
    expected, _ = theirs(eager, row, weight)
    parts = backend(row.codec, "encode")(weight, fmt=row.name)
    different = int((parts["weight"] != expected["weight"]).sum())
    assert different <= 10, "of 204,800 codes; 0 to 3 were seen"
    scales = "s_channel" if "s_channel" in parts else "scale"
    np.testing.assert_allclose(parts[scales], expected[scales], rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_their_parts_decode_to_their_weights(eager, row, device) -> None:
    weight = weights((200, 1024), "outlier")
    parts, decoded = theirs(eager, row, weight)
    found = backend(row.codec, "decode", device)(parts, weight.shape, fmt=row.name)
    np.testing.assert_allclose(found, decoded, atol=4e-6 * np.abs(decoded).max())


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_the_rotation_is_their_matrix_and_its_own_inverse(group: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("comfy_kitchen.tensor.int8_utils")
    matrix = module._build_hadamard(group).numpy()
    weight = np.random.default_rng(1).standard_normal((3, 2 * group)).astype(np.float32)
    turned = rotate(weight, group)
    expected = (weight.reshape(3, 2, group).astype(np.float64) @ matrix.T).reshape(3, -1)
    np.testing.assert_allclose(turned, expected, atol=2e-6)
    np.testing.assert_allclose(rotate(turned, group), weight, atol=2e-6)


def test_gaussian_weights_get_the_codebook_that_is_always_taken_here(eager) -> None:
    weight = weights((200, 1024), "gaussian")
    book = eager["asym_w4a8_int8"].quantize_w4a8_int8_weight(torch.from_numpy(weight))[4]
    assert np.array_equal(book.numpy(), CODEBOOK)


def test_an_outlier_column_costs_int8_rows_and_not_rotated_ones() -> None:
    weight = weights((64, 1024), "outlier")

    def error(name: str) -> float:
        row = FORMATS[name]
        parts = backend(row.codec, "encode")(weight, fmt=name)
        decoded = backend(row.codec, "decode")(parts, weight.shape, fmt=name)
        return float(np.sqrt(((decoded - weight) ** 2).mean() / (weight**2).mean()))

    assert error("int8_convrot") < error("int8_rowwise") / 3
