"""Every format of FORMATS keeps the promises of its row, in the reference and in the fast twin."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pytest

from diffquant.core.dtypes import STORAGE, storage_nbytes
from diffquant.core.errors import UnsupportedShape
from diffquant.quant.backends import BACKENDS, backend
from diffquant.quant.codecs.nf4 import BOUNDS
from diffquant.quant.formats import FORMATS, QuantFormat

DEVICES = ("reference", "cpu")
ROWS = tuple(row for row in FORMATS.values() if row.encodes)
SCALED = tuple(row for row in ROWS if row.strategy != "none")
NUMPY_OF = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "I8": np.int8,
    "U8": np.uint8,
}
# sha256 of the parts of golden_weight(), in the row's order, by ggml's library, bitsandbytes,
# comfy_kitchen and torch (see test_codecs_oracle.py), shortened.
GOLDEN = {
    "f32": "4dd903cc9caaee1a",
    "f16": "91c4e40c3e61512f",
    "bf16": "86a35fd89088b11e",
    "q4_0": "21a06e54fc6f7cca",
    "q4_1": "b1c3a73558c2dfed",
    "q5_0": "4c305082ccc9bbf5",
    "q5_1": "0e387c0b355e03bc",
    "q8_0": "cb55e6e4e1c1ac3b",
    "q2_k": "a3c750e3ed3dfaee",
    "q3_k": "becc4cfc6a472fad",
    "q4_k": "48040fd898600125",
    "q5_k": "050b3d74c70ae5af",
    "q6_k": "16b5787fee58d153",
    "iq4_nl": "f0c25006dd83d9a7",
    "iq4_xs": "b8c6794ca00dc5dd",
    "mxfp4": "78f132e857dbbc97",
    "iq3_s": "1cdb4e43964dea84",
    "iq3_xxs": "1e35dd25634ae532",
    "iq2_s": "29472b63d5674b7f",
    "iq2_xs": "f875e820576dbe65",
    "iq2_xxs": "f704873e608a3994",
    "fp8_e4m3": "37c3985524d247dc",
    "fp8_e4m3_scaled": "09ba40e320d2bdb3",
    "fp8_e5m2": "217bf8fcdf1f9ebe",
    "fp8_e5m2_scaled": "d76f20e03f5a5826",
    "int8_tensor": "dfbf745c417ff8b8",
    "fp8_e4m3_rowwise": "59b55f2e38bbbfe4",
    "fp8_e4m3_blockwise": "95ca3a6bf492b2ca",
    "int8_blockwise": "126e8b9c7d8c4be5",
    "mxfp8": "6f690c549da7def4",
    "nvfp4_comfy": "465a0425c6203051",
    "int8_rowwise": "ca79d18898bc5b73",
    "int8_convrot": "37b66239951cbba6",
    "int8_convrot_64": "028ac9a403d1d5d7",
    "int8_convrot_16": "fb2ce141fe10041c",
    "asym_w4a8_int8": "8d48d258e41c61ae",
    "asym_w4a8_int8_64": "88fe6dac52c4bbb5",
    "asym_w4a8_int8_16": "a3e1391ecc7cb5a8",
    "convrot_w4a4": "9c4c865fb492b7ad",
    "convrot_w4a4_64": "3d0fb74177b7b3ae",
    "nf4": "d11982b57bdf058d",
    "nf4_dq": "83a55914afcd7c70",
    "fp4": "79f9a0d444fecd8d",
    "fp4_dq": "acfb8861efb0c282",
    "int8_bnb": "6e53d06855037180",
}


def by_name(row: QuantFormat) -> str:
    return row.name


def encode(
    row: QuantFormat, device: str, weight: np.ndarray, importance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    stats = None
    if row.passes == 2:
        stats = backend(row.codec, "reduce", device)(weight, None, fmt=row.name)
    extra = weigh(row, weight.shape[1], importance)
    parts: dict[str, np.ndarray] = backend(row.codec, "encode", device)(
        weight, stats, fmt=row.name, **extra
    )
    return parts


def weigh(
    row: QuantFormat, width: int, importance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The `importance` argument of an encoder: ones where a format cannot do without."""
    if importance is None and row.importance == "required":
        importance = np.ones(width, np.float32)
    return {} if importance is None else {"importance": importance}


def decode(
    row: QuantFormat, device: str, parts: Mapping[str, np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    weight: np.ndarray = backend(row.codec, "decode", device)(parts, shape, fmt=row.name)
    assert weight.dtype == np.float32
    assert weight.shape == shape
    return weight


def gaussian(rows: int, columns: int, deviation: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(deviation)


def golden_weight() -> np.ndarray:
    """(8, 512) of bell-shaped integers over 4096: the same on every machine and numpy."""
    state = np.arange(8 * 512 * 4, dtype=np.uint32)
    for _ in range(3):
        state = (state ^ (state >> np.uint32(15))) * np.uint32(0x2C1B3C6D) + np.uint32(0x9E3779B9)
    sums = (state >> np.uint32(22)).astype(np.int64).reshape(8, 512, 4).sum(axis=2)
    return ((sums - 2046) / 4096).astype(np.float32)


def digest(row: QuantFormat, parts: Mapping[str, np.ndarray]) -> str:
    data = b"".join(np.ascontiguousarray(parts[part.name]).tobytes() for part in row.parts)
    return hashlib.sha256(data).hexdigest()[:16]


def assert_same_parts(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        assert array.shape == right[name].shape
        assert array.tobytes() == right[name].tobytes(), name


def test_every_codec_has_both_functions_on_both_devices() -> None:
    needed = {
        (row.codec, operation, device)
        for row in FORMATS.values()
        for operation in (
            *(("encode",) if row.encodes else ()),
            "decode",
            *(("reduce",) if row.passes == 2 else ()),
        )
        for device in DEVICES
    }
    assert needed <= BACKENDS.keys()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_round_trip_error_is_the_rows(row: QuantFormat, device: str) -> None:
    weight = gaussian(64, 4096)
    decoded = decode(row, device, encode(row, device, weight), weight.shape)
    error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(row.gaussian_error, rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (7, 768)])
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_parts_are_stored_as_the_row_says(
    row: QuantFormat, shape: tuple[int, int], device: str
) -> None:
    parts = encode(row, device, gaussian(*shape))
    assert set(parts) == {part.name for part in row.parts}
    for part in row.parts:
        found, stored = parts[part.name], part.shape(shape)
        assert found.nbytes == storage_nbytes(part.dtype, stored)
        if STORAGE[part.dtype].is_block:
            assert found.dtype == np.uint8
            assert len(found) == shape[0]
        else:
            assert found.dtype == NUMPY_OF[part.dtype]
            assert found.shape == stored
    assert sum(part.nbytes for part in parts.values()) == row.nbytes(shape)


@pytest.mark.parametrize("row", [row for row in ROWS if row.requires], ids=by_name)
def test_bad_shapes_are_refused_with_the_rows_text(row: QuantFormat) -> None:
    for need in row.requires:
        bad = (need.multiple * 3,) if need.what == "ndim" else (4, need.multiple + 1)
        bad = (2, 4, 4) if need.what == "matrix" else bad
        with pytest.raises(UnsupportedShape, match=need.describe()):
            row.demand(bad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [row for row in ROWS if len(row.requires) > 1], ids=by_name)
def test_block_codecs_refuse_rows_that_do_not_divide(row: QuantFormat, device: str) -> None:
    with pytest.raises(UnsupportedShape, match="divisible by"):
        encode(row, device, np.zeros((2, row.block_size + 1), np.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_zeros_decode_to_zeros(row: QuantFormat, device: str) -> None:
    weight = np.zeros((4, 512), np.float32)
    weight[2:] = gaussian(2, 512)
    decoded = decode(row, device, encode(row, device, weight), weight.shape)
    assert not decoded[:2].any()
    assert decoded[2:].any()
    zeros = np.zeros((3, 256), np.float32)
    assert not decode(row, device, encode(row, device, zeros), zeros.shape).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_values_that_are_not_finite_do_not_crash(
    row: QuantFormat, value: float, device: str
) -> None:
    weight = gaussian(5, 512)
    weight[1, 3], weight[2], weight[3, ::2] = value, value, -value
    parts = encode(row, device, weight)
    assert sum(part.nbytes for part in parts.values()) == row.nbytes(weight.shape)
    decode(row, device, parts, weight.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_golden_bytes(row: QuantFormat, device: str) -> None:
    assert digest(row, encode(row, device, golden_weight())) == GOLDEN[row.name]


# The plain searches for IQ blocks are slow: in CI they see 64 super-blocks of every kind of weight,
# in one call. Blocks do not know of each other, as the scales of other formats may.
IQ = tuple(row for row in ROWS if row.name.startswith(("iq2", "iq3")))


@pytest.mark.parametrize(
    ("row", "rows"),
    [
        *(pytest.param(row, 16 if row in IQ else None, id=row.name) for row in ROWS),
        *(pytest.param(row, None, id=f"{row.name}-whole", marks=pytest.mark.slow) for row in IQ),
    ],
)
def test_fast_twin_gives_the_references_bytes(
    row: QuantFormat, rows: int | None, awkward: Mapping[str, np.ndarray]
) -> None:
    kinds = awkward
    if row in IQ:
        kinds = {"all kinds": np.concatenate([weight[:rows] for weight in awkward.values()])}
    for name, weight in kinds.items():
        reference, fast = (encode(row, device, weight) for device in DEVICES)
        assert reference.keys() == fast.keys()
        for part, array in reference.items():
            assert array.tobytes() == fast[part].tobytes(), (name, part)
        left, right = (decode(row, device, reference, weight.shape) for device in DEVICES)
        assert left.tobytes() == right.tobytes(), name


@pytest.mark.parametrize("row", [row for row in ROWS if row.strategy == "none"], ids=by_name)
def test_casts_agree_on_every_kind_of_bits(row: QuantFormat) -> None:
    bits = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32)  # all exponents and signs
    weight = bits[: bits.size // 256 * 256].view(np.float32).reshape(-1, 256)
    reference, fast = (encode(row, device, weight) for device in DEVICES)
    assert_same_parts(reference, fast)
    left, right = (decode(row, device, reference, weight.shape) for device in DEVICES)
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_chunks_of_rows_give_the_bytes_of_the_whole(row: QuantFormat, device: str) -> None:
    # 13 rows of 9 super-blocks: never a whole number of the kernels' batches. Flat blocks also get
    # a row length whose blocks cross row ends.
    for shape in [
        (13, 2304),
        *([(70, 96)] if row.strategy == "none" or row.flat_block else []),
        *([(300, 100)] if row.is_padded else []),
    ]:
        weight = gaussian(*shape)
        whole = encode(row, device, weight)
        stats = None
        step = row.row_multiple(shape)
        starts = range(0, shape[0], step * 2)
        chunks = [np.ascontiguousarray(weight[start : start + step * 2]) for start in starts]
        if row.passes == 2:
            reduce = backend(row.codec, "reduce", device)
            for chunk in chunks:
                stats = reduce(chunk, stats, fmt=row.name)
        function = backend(row.codec, "encode", device)
        extra = weigh(row, shape[1])
        pieces = [function(chunk, stats, fmt=row.name, **extra) for chunk in chunks]
        for part in row.parts:
            if part.per_row:
                joined = b"".join(piece[part.name].tobytes() for piece in pieces)
                assert joined == whole[part.name].tobytes()
            else:
                assert all(p[part.name].tobytes() == whole[part.name].tobytes() for p in pieces)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_and_f16_round_half_to_even_and_keep_nan(device: str) -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFFC12345]], np.uint32)
    weight = bits.view(np.float32)
    bf16 = encode(FORMATS["bf16"], device, weight)["weight"]
    assert bf16.tolist() == [[0x3F80, 0x3F82, 0x7F80, 0x7FC0, 0x7FC0]]
    halves = np.array([[1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520, 2.0**-25, np.nan]], np.float32)
    f16 = encode(FORMATS["f16"], device, halves)["weight"].view(np.uint16)
    assert f16.tolist() == [[0x3C00, 0x3C02, 0x7C00, 0, 0x7E00]]


@pytest.mark.parametrize("device", DEVICES)
def test_plain_fp8_turns_overflow_into_nan(device: str) -> None:
    weight = np.array([[448, 464, 465, 1e9, -465, np.inf, np.nan, 2.0**-10]], np.float32)
    code = encode(FORMATS["fp8_e4m3"], device, weight)["weight"]
    assert code.tolist() == [[0x7E, 0x7E, 0x7F, 0x7F, 0xFF, 0x7F, 0x7F, 0]]


@pytest.mark.parametrize("device", DEVICES)
def test_scaled_fp8_reaches_the_largest_value_and_gives_zeros_scale_one(device: str) -> None:
    row = FORMATS["fp8_e4m3_scaled"]
    parts = encode(row, device, np.array([[1.5, -3.0, 0.0]], np.float32))
    assert parts["weight"].tolist() == [[0x76, 0xFE, 0]]
    assert parts["scale"] == np.float32(3) / np.float32(448)
    assert encode(row, device, np.zeros((2, 3), np.float32))["scale"] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_int8_error_is_at_most_half_a_step(device: str) -> None:
    row = FORMATS["int8_rowwise"]
    weight = gaussian(16, 1024)
    parts = encode(row, device, weight)
    error = np.abs(decode(row, device, parts, weight.shape) - weight)
    assert (error <= parts["scale"] * np.float32(0.50001)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (3, 37), (5, 64), (2, 97)])
def test_nf4_ends_in_a_partial_block(shape: tuple[int, int], device: str) -> None:
    row = FORMATS["nf4"]
    weight = gaussian(*shape)
    parts = encode(row, device, weight)
    assert parts["weight"].shape == (-(-weight.size // 2),)
    assert parts["absmax"].shape == (-(-weight.size // 64),)
    bound = np.repeat(parts["absmax"], 64)[: weight.size].reshape(shape) * np.float32(0.152)
    assert (np.abs(decode(row, device, parts, shape) - weight) <= bound).all()


@pytest.mark.parametrize("row", [row for row in ROWS if row.codec != "cast"], ids=by_name)
def test_decode_refuses_parts_of_the_wrong_size(row: QuantFormat) -> None:
    parts = encode(row, "cpu", gaussian(4, 512))
    with pytest.raises(ValueError, match="reshape"):
        decode(row, "cpu", parts, (136, 512))  # more than any padding


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_read_only_rows_of_a_mapped_file_are_taken(row: QuantFormat) -> None:
    weight = gaussian(4, 512)
    expected = encode(row, "cpu", weight)
    data = np.frombuffer(b"\0" + weight.tobytes(), np.uint8)[1:].view(np.float32)  # unaligned too
    assert not data.flags.writeable
    assert_same_parts(encode(row, "cpu", data.reshape(4, 512)), expected)
    frozen = {name: np.frombuffer(part.tobytes(), part.dtype) for name, part in expected.items()}
    shaped = {name: part.reshape(expected[name].shape) for name, part in frozen.items()}
    decoded = decode(row, "cpu", shaped, weight.shape)
    assert decoded.tobytes() == decode(row, "cpu", expected, weight.shape).tobytes()


@pytest.mark.parametrize("device", DEVICES)
def test_nf4_ties_take_the_lower_index(device: str) -> None:
    weight = np.zeros((1, 64), np.float32)
    weight[0, 0] = 1
    weight[0, 1:16] = BOUNDS  # half way between neighbours in the table
    packed = encode(FORMATS["nf4"], device, weight)["weight"]
    index = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    assert index[:16].tolist() == [15, *range(15)]
    assert (index[16:] == 7).all()
