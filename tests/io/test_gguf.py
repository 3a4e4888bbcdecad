"""The GGUF header: golden bytes, every field broken once, gguf-py as oracle in both directions."""

import struct
import tracemalloc
import warnings

import numpy as np
import pytest

from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import (
    CheckpointError,
    MalformedFile,
    PlanMismatch,
    TruncatedFile,
    UnsupportedContainer,
    UnsupportedDtype,
    UnsupportedShape,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io import GgufArray, GgufValue, gguf, open_source


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, type_id, raw):
    return text(key) + struct.pack("<I", type_id) + raw


def info(name="w", dims=(4,), type_id=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def build(pairs=(), infos=(), data=b"", version=3, counts=None, alignment=32):
    counts = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def open_raw(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return open_source(path)


def test_golden_bytes(tmp_path, writing):
    _, write_all = writing
    specs = [TensorSpec("w", "F32", (1, 3)), TensorSpec("q", "Q8_0", (32,))]
    tensors = {"w": np.arange(12, dtype=np.uint8), "q": np.arange(34, dtype=np.uint8)}
    metadata = {
        "general.architecture": "flux",
        "general.file_type": 7,
        "x": GgufValue("i32", (4, 2)),
    }
    write_all(tmp_path / "m.gguf", tensors, specs, metadata)
    expected = build(
        [
            pair("general.architecture", 8, text("flux")),
            pair("general.file_type", 4, struct.pack("<I", 7)),
            pair("x", 9, struct.pack("<IQ2i", 5, 2, 4, 2)),
        ],
        [info("w", (3, 1), 0, 0), info("q", (32,), 8, 32)],
        bytes(range(12)) + bytes(20) + bytes(range(34)) + bytes(30),
    )
    assert (tmp_path / "m.gguf").read_bytes() == expected


def test_values_keep_their_types_through_a_copy(tmp_path, writing):
    _, write_all = writing
    metadata = {
        "s": "größe",
        "b": True,
        "u32": 7,
        "i32": -7,
        "u64": 2**40,
        "i64": -(2**40),
        "f": 0.5,
        "strings": ("a", ""),
        "bools": (True, False),
        "ints": (1, -2),
        "wide": (1, 2**40),
        "floats": (0.5, 1.5),
        **{name: GgufValue(name, 3) for name in ("u8", "i8", "u16", "i16", "u64", "f64")},
        "none": GgufValue("str", ()),
    }
    write_all(tmp_path / "a.gguf", {}, [], metadata)
    with open_source(tmp_path / "a.gguf") as source:
        types = {key: item.type for key, item in source.typed_metadata.items()}
        assert types["u32"] == "u32"
        assert types["i32"] == "i32"
        assert types["u64"] == "u64"
        assert types["i64"] == "i64"
        assert types["ints"] == "i32"
        assert types["wide"] == "i64"
        assert source.metadata["strings"] == ("a", "")
        assert source.metadata["b"] is True
        assert source.metadata["floats"] == (0.5, 1.5)
        assert list(source.metadata["none"]) == []
        write_all(tmp_path / "b.gguf", {}, [], source.typed_metadata)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a", None),
        ("a", ()),
        ("a", (1, "x")),
        ("a", GgufValue("u8", 256)),
        ("a", GgufValue("u8", "x")),
        ("a", GgufValue("str", 1)),
        ("a", GgufValue("u7", 1)),
        ("a", 2**64),
        ("general.alignment", 64),
    ],
)
def test_metadata_without_a_type_is_refused(tmp_path, key, value):
    with pytest.raises(PlanMismatch, match=key):
        gguf.create(tmp_path / "m.gguf", [], {key: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (build(version=1), UnsupportedContainer, "version 1"),
        (build(version=4), UnsupportedContainer, "version 4"),
        (build(version=0), UnsupportedContainer, "version 0"),
        (build(version=3 << 24), UnsupportedContainer, "big-endian"),
        (build(counts=(2**40, 0)), MalformedFile, "tensors need at least"),
        (build(counts=(0, 2**40)), MalformedFile, "metadata pairs need at least"),
        (build(counts=(2**64 - 1, 2**64 - 1)), MalformedFile, "need at least"),
        (build([pair("k", 99, b"")]), MalformedFile, "unknown type id 99"),
        (build([pair("k", 9, struct.pack("<IQ", 9, 1))]), MalformedFile, "holds arrays"),
        (build([pair("k", 9, struct.pack("<IQ", 77, 1))]), MalformedFile, "unknown type id 77"),
        (build([pair("k", 9, struct.pack("<IQ", 4, 2**61))]), MalformedFile, "items of"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 2**61))]), MalformedFile, "items of"),
        (build([pair("k", 9, struct.pack("<IQQ", 8, 1, 2**60))]), TruncatedFile, "array 'k'"),
        (build([pair("k", 8, struct.pack("<Q", 2**60))]), TruncatedFile, "value of 'k'"),
        (build([pair("k", 8, text(b"\xff"))]), MalformedFile, "not UTF-8"),
        (build([pair(b"\xff", 4, bytes(4))]), MalformedFile, "not UTF-8"),
        (build([pair("k", 4, bytes(4))] * 2), MalformedFile, "'k' appears twice"),
        (build(infos=[info()] * 2, data=bytes(64)), MalformedFile, "'w' appears twice"),
        (build(infos=[info(dims=(1,) * 9)], data=bytes(64)), MalformedFile, "9 dimensions"),
        (build(infos=[info(dims=(2**40, 2**40))]), MalformedFile, "too large"),
        (build(infos=[info(dims=(2**63,))]), MalformedFile, "bad dimension"),
        (build(infos=[info(dims=(2**32,))], data=bytes(64)), TruncatedFile, "download it again"),
        (build(infos=[info(type_id=99)]), MalformedFile, "type id 99"),
        (build(infos=[info(type_id=31)]), UnsupportedDtype, "retired"),
        (build(infos=[info(dims=(33,), type_id=8)]), MalformedFile, "do not divide"),
        (build(infos=[info(offset=4)], data=bytes(64)), MalformedFile, "no multiple of 32"),
        (
            build(infos=[info(offset=2**63)], data=bytes(64)),
            TruncatedFile,
            "first that is cut is 'w'",
        ),
        (build(infos=[info("a"), info("b")], data=bytes(64)), MalformedFile, "inside the tensor"),
        (
            build([pair("general.alignment", 4, struct.pack("<I", 48))]),
            MalformedFile,
            "power of two",
        ),
        (
            build([pair("general.alignment", 4, struct.pack("<I", 0))]),
            MalformedFile,
            "power of two",
        ),
        (
            build([pair("general.alignment", 5, struct.pack("<i", 32))]),
            MalformedFile,
            "power of two",
        ),
    ],
)
def test_broken_field_is_refused_by_name(tmp_path, content, error, message):
    with pytest.raises(error, match=message) as found:
        open_raw(tmp_path, content)
    assert str(tmp_path) in str(found.value)


def test_version_2_and_other_alignments_are_read(tmp_path):
    content = build(
        [pair("general.alignment", 4, struct.pack("<I", 128))],
        [info("a", (2,), 0, 0), info("b", (1,), 0, 128)],
        bytes(range(128)) + b"\1\2\3\4",
        version=2,
        alignment=128,
    )
    with open_raw(tmp_path, content) as source:
        assert source.read("b").tolist() == [1, 2, 3, 4]
        assert source.specs["a"].shape == (2,)


def test_huge_string_claim_in_a_sparse_file_allocates_little(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build([pair("k", 8, struct.pack("<Q", 15 << 30))]))
    with path.open("r+b") as file:
        file.truncate(20 << 30)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="header over"):
        open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_long_arrays_are_decoded_only_when_asked(tmp_path, writing):
    _, write_all = writing
    tokens = tuple(f"token{index}" for index in range(60_000))
    write_all(tmp_path / "m.gguf", {}, [], {"tokens": tokens, "after": "x"})
    with open_source(tmp_path / "m.gguf") as source:
        array = source.metadata["tokens"]
        assert isinstance(array, GgufArray)
        assert array._values is None
        assert len(array) == 60_000
        assert source.metadata["after"] == "x"
        assert array[59_999] == "token59999"
        assert array == tokens
        assert "60000 items" in repr(array)


def test_writer_refuses_what_loaders_refuse(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(PlanMismatch, match="128 bytes"):
        gguf.create(path, [TensorSpec("x" * 128, "F32", (1,))], {})
    with pytest.raises(PlanMismatch, match="128 bytes"):
        gguf.create(path, [TensorSpec("é" * 64, "F32", (1,))], {})
    with pytest.raises(UnsupportedDtype, match="F8_E4M3"):
        gguf.create(path, [TensorSpec("x", "F8_E4M3", (1,))], {})
    with pytest.raises(UnsupportedShape, match="9 dimensions"):
        gguf.create(path, [TensorSpec("x", "F32", (1,) * 9)], {})
    with pytest.raises(UnsupportedShape, match="do not divide"):
        gguf.create(path, [TensorSpec("x", "Q4_K", (2, 128))], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.oracle
def test_gguf_py_reads_what_we_write(tmp_path, writing):
    library = pytest.importorskip("gguf")
    plan, write_all = writing
    shapes = [(2, 256), (1, 512), (3, 1, 1, 256), (1, 1, 2, 1, 256)]
    layout = {
        f"{dtype}.{index}": (dtype, shape)
        for dtype, row in STORAGE.items()
        if row.ggml_id is not None
        for index, shape in enumerate(shapes)
    }
    specs, tensors = plan("", layout)
    metadata = {"general.architecture": "flux", "shape": GgufValue("i32", (3, 4)), "t": ("a", "é")}
    write_all(tmp_path / "m.gguf", tensors, specs, metadata)
    reader = library.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("shape").contents() == [3, 4]
    assert reader.get_field("t").contents() == ["a", "é"]
    assert [tensor.name for tensor in reader.tensors] == [spec.key for spec in specs]
    for tensor, spec in zip(reader.tensors, specs, strict=True):
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        assert tensor.tensor_type.name == spec.dtype
        assert tensor.data.tobytes() == tensors[spec.key].tobytes()


@pytest.mark.oracle
def test_we_read_what_gguf_py_writes(tmp_path):
    library = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((1, 2, 3)).astype(np.float16),
        "i8": np.arange(6, dtype=np.int8),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = library.GGUFWriter(tmp_path / "m.gguf", "qwen_image")
        writer.add_array("list", [1, 2, 3])
        writer.add_array("words", ["a", "bc"])
        writer.add_bool("flag", True)
        writer.add_uint64("big", 2**50)
        for key, array in arrays.items():
            writer.add_tensor(key, array)
        packed = library.quants.quantize(
            rng.standard_normal((4, 64)).astype(np.float32), library.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor("q8", packed, raw_dtype=library.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with open_source(tmp_path / "m.gguf") as source:
        assert source.metadata["general.architecture"] == "qwen_image"
        assert source.metadata["list"] == (1, 2, 3)
        assert source.metadata["words"] == ["a", "bc"]
        assert source.metadata["flag"] is True
        assert source.metadata["big"] == 2**50
        for key, array in arrays.items():
            assert source.specs[key].shape == array.shape
            assert source.read(key).tobytes() == array.tobytes()
        assert source.specs["q8"] == TensorSpec("q8", "Q8_0", (4, 64))
        assert source.read("q8", (1, 3)).tobytes() == packed[1:3].tobytes()
