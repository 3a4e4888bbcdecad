"""The safetensors header: golden bytes, every rule broken once, and the Rust library as oracle."""

import json
import struct

import numpy as np
import pytest

from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import (
    MalformedFile,
    PlanMismatch,
    TruncatedFile,
    UnsupportedDtype,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_source, safetensors

OK = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def raw_file(header, data=b"\1\2"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def open_raw(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return open_source(path)


def test_golden_bytes(tmp_path, writing):
    _, write_all = writing
    specs = [
        TensorSpec("b", "U8", (2,)),
        TensorSpec("a", "F16", (1, 2)),
        TensorSpec("e", "F32", (0,)),
    ]
    tensors = {"b": np.array([1, 2], np.uint8), "a": np.arange(4, dtype=np.uint8)}
    write_all(tmp_path / "m.safetensors", tensors, specs, {"format": "pt"})
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"a":{"dtype":"F16","shape":[1,2],"data_offsets":[2,6]},'
        b'"e":{"dtype":"F32","shape":[0],"data_offsets":[6,6]}}'
    )
    # "e" would start at 6, no multiple of 4: wide elements go first.
    header = (
        header.replace(b"[6,6]", b"[0,0]").replace(b"[0,2]", b"[4,6]").replace(b"[2,6]", b"[0,4]")
    )
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + bytes([0, 1, 2, 3, 1, 2])
    assert (tmp_path / "m.safetensors").read_bytes() == expected


def test_given_order_is_kept_where_it_is_aligned(tmp_path):
    specs = [
        TensorSpec("z", "U8", (4,)),
        TensorSpec("a", "F32", (1,)),
        TensorSpec("m", "F16", (1,)),
    ]
    with safetensors.create(tmp_path / "m.safetensors", specs, {}) as sink:
        for spec in specs:
            sink.write(spec.key, 0, np.zeros(spec.nbytes, np.uint8))
        sink.commit()
    with open_source(tmp_path / "m.safetensors") as source:
        places = [source.offsets[spec.key] for spec in specs]
        assert list(source.specs) == ["z", "a", "m"]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "starts with"),
        (b" {}", "starts with"),
        (b"{", "not valid JSON"),
        (b'{"a":1}', "exactly"),
        (b'{"\xff":1}', "not valid JSON"),
        (b'{"\\ud800":{}}', "surrogates not allowed"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (b'{"a":{},"a":{}}', "appears twice"),
        (b'{"__metadata__":{"x":"1","x":"2"}}', "appears twice"),
        ({"__metadata__": {"a": 1}}, "is not text"),
        ({"__metadata__": []}, "not an object"),
        ({"a": {**OK, "more": 1}}, "exactly"),
        ({"a": {"dtype": "U8", "shape": [2]}}, "exactly"),
        ({"a": {**OK, "dtype": "U9"}}, "unknown dtype 'U9'"),
        ({"a": {**OK, "dtype": "Q8_0"}}, "unknown dtype 'Q8_0'"),
        ({"a": {**OK, "dtype": 3}}, "not text"),
        ({"a": {**OK, "shape": [-2]}}, "bad dimension -2"),
        ({"a": {**OK, "shape": [2.0]}}, "bad dimension 2.0"),
        ({"a": {**OK, "shape": [True, 2]}}, "bad dimension True"),
        ({"a": {**OK, "shape": "2"}}, "no list"),
        ({"a": {**OK, "shape": [1] * 33 + [2]}}, "no list"),
        ({"a": {**OK, "shape": [2**62]}}, "bad dimension"),
        ({"a": {**OK, "shape": [2**40, 2**40]}}, "too large"),
        (b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", "not valid JSON"),
        ({"a": {**OK, "data_offsets": [0]}}, "two integers"),
        ({"a": {**OK, "data_offsets": [-2, 0]}}, "two integers"),
        ({"a": {**OK, "data_offsets": [0, 2.0]}}, "two integers"),
        ({"a": {**OK, "data_offsets": [2, 0]}}, "span -2"),
        ({"a": {**OK, "data_offsets": [0, 1]}}, "span 1"),
        ({"a": OK, "b": OK}, "overlaps"),
        ({"a": {**OK, "shape": [1], "data_offsets": [1, 2]}}, "leaves a gap"),
        ({"a": {**OK, "shape": [1], "data_offsets": [0, 1]}}, "1 bytes after the last"),
        ({}, "2 bytes after the last"),
    ],
)
def test_broken_rule_raises_malformed_file(tmp_path, header, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(header))
    with pytest.raises(MalformedFile, match=message):
        safetensors.open_file(path)


def test_header_lengths_are_held_against_the_file(tmp_path):
    with pytest.raises(MalformedFile, match="at most 100000000"):
        open_raw(tmp_path, struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(TruncatedFile, match="header of 99 bytes"):
        open_raw(tmp_path, struct.pack("<Q", 99) + b"{}")
    with pytest.raises(TruncatedFile):
        open_raw(tmp_path, b"")
    with pytest.raises(TruncatedFile, match="download it again"):
        open_raw(tmp_path, raw_file({"a": {**OK, "shape": [9], "data_offsets": [0, 9]}}))


@pytest.mark.parametrize("dtype", ["F4", "C64", "F8_E4M3FNUZ"])
def test_known_dtype_that_is_not_supported_says_so(tmp_path, dtype):
    with pytest.raises(UnsupportedDtype, match=dtype):
        open_raw(tmp_path, raw_file({"a": {**OK, "dtype": dtype}}))


def test_writer_refuses_what_the_format_lacks(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UnsupportedDtype, match="Q8_0"):
        safetensors.create(path, [TensorSpec("a", "Q8_0", (32,))], {})
    with pytest.raises(PlanMismatch, match="is int"):
        safetensors.create(path, [], {"a": 1})
    with pytest.raises(PlanMismatch, match="cannot be called"):
        safetensors.create(path, [TensorSpec("__metadata__", "U8", (1,))], {})
    assert not list(tmp_path.iterdir())


def test_empty_file_has_no_tensors(tmp_path, writing):
    _, write_all = writing
    write_all(tmp_path / "m.safetensors", {}, [])
    with open_source(tmp_path / "m.safetensors") as source:
        assert source.specs == {}
        assert source.metadata == {}


def test_long_header_opens(tmp_path, writing):
    _, write_all = writing
    specs = [TensorSpec(f"block.{index}." + "x" * 200, "U8", (1,)) for index in range(20_000)]
    tensors = {spec.key: np.zeros(1, np.uint8) for spec in specs}
    write_all(tmp_path / "m.safetensors", tensors, specs, {"workflow": "é" * 1_000_000})
    with open_source(tmp_path / "m.safetensors") as source:
        assert list(source.specs) == [spec.key for spec in specs]
        assert len(source.metadata["workflow"]) == 1_000_000


@pytest.mark.oracle
def test_safetensors_library_reads_what_we_write(tmp_path, writing):
    library = pytest.importorskip("safetensors")
    plan, write_all = writing
    layout = {
        f"{dtype} {index}": (dtype, shape)
        for dtype, row in STORAGE.items()
        if row.safetensors and dtype != "BOOL"
        for index, shape in enumerate([(3, 5), (), (0, 2), (1,)])
    }
    specs, tensors = plan("", layout)
    path = tmp_path / "m.safetensors"
    write_all(path, tensors, specs, {"format": "pt", "größe": 'q"\\\n'})
    found = dict(library.deserialize(path.read_bytes()))
    assert {(key, item["dtype"], tuple(item["shape"])) for key, item in found.items()} == {
        (spec.key, spec.dtype, spec.shape) for spec in specs
    }
    for key, data in tensors.items():
        assert bytes(found[key]["data"]) == data.tobytes()
    with library.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "größe": 'q"\\\n'}
        for key in opened.keys():  # noqa: SIM118 - no mapping
            opened.get_tensor(key)


@pytest.mark.oracle
def test_we_read_what_the_safetensors_library_writes(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.standard_normal((3, 4)).astype(np.float32),
        "a": rng.standard_normal(5).astype(np.float16),
        "i": np.arange(3),
        "s": np.array(2.5),
        "e": np.zeros((0, 3), np.float32),
    }
    library.save_file(tensors, tmp_path / "m.safetensors", {"k": "v"})
    with open_source(tmp_path / "m.safetensors") as source:
        assert source.metadata == {"k": "v"}
        for key, array in tensors.items():
            assert source.specs[key].shape == array.shape
            assert source.read(key).tobytes() == array.tobytes()
