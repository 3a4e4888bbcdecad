"""bitsandbytes decides: fp4, double quantization and int8, both directions, on the CPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from diffquant.quant.backends import backend
from diffquant.quant.codecs.double_quant import compress, expand
from diffquant.quant.codecs.dynamic_map import DYNAMIC_MAP, nearest_codes
from diffquant.quant.formats import FORMATS

pytestmark = pytest.mark.oracle
DEVICES = ("reference", "cpu")
SHAPES = ((96, 1024), (7, 37), (4, 8), (5, 101), (300, 64))  # three end in a partial block


@pytest.fixture(scope="module")
def functional() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")


def slices(awkward: Mapping[str, np.ndarray]):
    for what, whole in awkward.items():
        for rows, columns in SHAPES:
            yield what, np.ascontiguousarray(np.resize(whole, (rows, columns)))


@pytest.mark.parametrize("device", DEVICES)
def test_fp4_has_its_bytes(functional, device: str, awkward: Mapping[str, np.ndarray]) -> None:
    encode, decode = (backend("fp4_bnb", operation, device) for operation in ("encode", "decode"))
    for what, weight in slices(awkward):
        packed, state = functional.quantize_4bit(torch.from_numpy(weight), quant_type="fp4")
        parts = encode(weight, fmt="fp4")
        assert np.array_equal(parts["weight"], packed.numpy()[:, 0]), (what, weight.shape)
        assert np.array_equal(parts["absmax"], state.absmax.numpy()), (what, weight.shape)
        expected = functional.dequantize_4bit(packed, state).numpy()
        # Its CPU kernel multiplies by twelfths that it spells out, a rounding apart from its table.
        np.testing.assert_allclose(
            decode(parts, weight.shape, fmt="fp4"), expected, rtol=3e-7, err_msg=what
        )


def test_the_dynamic_map_is_its(functional) -> None:
    assert np.array_equal(DYNAMIC_MAP, functional.create_dynamic_map().numpy())


@pytest.mark.parametrize("power", [1, 3, 9])
def test_absmax_get_the_codes_that_its_library_gives(functional, power: int) -> None:
    rng = np.random.default_rng(power)
    values = ((rng.random((4000, 256)) * 2 - 1) ** power).astype(np.float32)
    values[7] = 0
    found, state = functional.quantize_blockwise(torch.from_numpy(values), blocksize=256)
    scale = np.abs(values).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        codes = nearest_codes(values * (np.float32(1) / scale))
    codes[7] = 0
    assert np.array_equal(codes, found.numpy())
    assert np.array_equal(scale[:, 0], state.absmax.numpy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_has_its_bytes(
    functional, kind: str, device: str, awkward: Mapping[str, np.ndarray]
) -> None:
    name = f"{kind}_dq"
    ours = {op: backend("double_quant", op, device) for op in ("reduce", "encode", "decode")}
    for what, weight in slices(awkward):
        packed, state = functional.quantize_4bit(
            torch.from_numpy(weight), quant_type=kind, compress_statistics=True
        )
        offset = state.offset.item()
        # torch adds up in another order, so that offsets differ by roundings of float32.
        mean = ours["encode"](weight, ours["reduce"](weight, fmt=name), fmt=name)["nested_offset"]
        assert float(mean) == pytest.approx(offset, rel=1e-6), what
        parts = ours["encode"](weight, (offset, 1), fmt=name)
        assert np.array_equal(parts["weight"], packed.numpy()[:, 0]), what
        assert np.array_equal(parts["absmax"], state.absmax.numpy()), what
        assert np.array_equal(parts["nested_absmax"], state.state2.absmax.numpy()), what
        expected = functional.dequantize_4bit(packed, state).numpy()
        found = ours["decode"](parts, weight.shape, fmt=name)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-38, err_msg=what)


def test_an_absmax_is_off_by_half_a_gap_of_the_map_at_most() -> None:
    absmax = np.random.default_rng(3).uniform(0.01, 0.2, 1000).astype(np.float32)
    parts = compress(absmax, np.float32(absmax.mean()))
    widest = np.diff(DYNAMIC_MAP).max() / 2 + 2 / 65535
    bound = np.repeat(parts["nested_absmax"], 256)[:1000] * widest + 1e-7
    assert (np.abs(expand(parts) - absmax) <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
def test_int8_has_its_bytes(functional, device: str, awkward: Mapping[str, np.ndarray]) -> None:
    encode, decode = (backend("int8_bnb", operation, device) for operation in ("encode", "decode"))
    for what, weight in slices(awkward):
        parts = encode(weight, fmt="int8_bnb")
        level, scb, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight.copy()))
        usable = scb.numpy() > 2.0**-120  # below it 127 / absmax overflows there, ours are zeros
        assert np.array_equal(parts["scb"], scb.numpy()), what
        assert np.array_equal(parts["weight"][usable], level.numpy()[usable]), what
        expected = functional.int8_vectorwise_dequant(level, scb).numpy()
        found = decode(parts, weight.shape, fmt="int8_bnb")
        assert np.array_equal(found[usable], expected[usable]), what


@pytest.mark.parametrize("name", ["nf4_dq", "fp4_dq"])
def test_sizes_are_those_of_the_facts(name: str) -> None:
    row = FORMATS[name]
    shapes = {part.name: part.shape((200, 520)) for part in row.parts}
    assert shapes == {
        "weight": (52000,),
        "absmax": (1625,),
        "nested_absmax": (7,),
        "nested_offset": (),
    }
    assert row.bits == pytest.approx(4.127, abs=5e-4)


def test_the_state_is_json_of_a_fixed_length() -> None:
    from diffquant.convert.dialects import pack

    marker = pack("bnb", "l.weight", "nf4_dq", (64, 64), "bf16")[-1]
    texts = [bytes(marker.data(np.float32(value))) for value in (0.1, 1e-38, -3.4028235e38)]
    assert {len(text) for text in texts} == {marker.spec.nbytes}
    assert [json.loads(text)["nested_offset"] for text in texts] == [
        float(np.float32(value)) for value in (0.1, 1e-38, -3.4028235e38)
    ]
