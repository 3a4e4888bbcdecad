"""Importance matrix files: golden bytes of both kinds, every field broken, merge arithmetic."""

import struct
import tracemalloc

import numpy as np
import pytest

from diffquant.core.errors import (
    CheckpointError,
    MalformedFile,
    TruncatedFile,
    UnsupportedContainer,
    UsageError,
)
from diffquant.io.imatrix import (
    Entry,
    ImportanceMatrix,
    is_legacy_imatrix,
    merge_imatrices,
    read_imatrix,
    with_prefix,
    write_imatrix,
)


def text(value):
    return struct.pack("<i", len(value.encode())) + value.encode()


def entry(name, calls, values):
    return text(name) + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)


def legacy(*entries, tail=b"", count=None):
    head = struct.pack("<i", len(entries) if count is None else count)
    return head + b"".join(entries) + tail


def measured(sums, counts):
    return Entry(np.array(sums, np.float64), np.array(counts, np.int64))


def stored(tmp_path, content, name="m.dat"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


ENTRIES = (entry("a.weight", 4, [4.0, 8.0, 0.0]), entry("größe", 2, [3.0]))
TAIL = struct.pack("<i", 4) + text("prompts.txt")


@pytest.fixture
def matrix():
    entries = {
        "b.weight": measured([[1.0, 2.0, 3.0, 4.0]], [8]),
        "a.weight": measured([[0.5, 0.25], [6.0, 0.0]], [4, 2]),
    }
    return ImportanceMatrix(entries, ("one.txt", "two.txt"), 5, 4, files=("m.gguf",))


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [(b"", 4, ()), (struct.pack("<i", 9), 9, ()), (TAIL, 4, ("prompts.txt",))],
    ids=["oldest", "stable-diffusion.cpp", "llama.cpp"],
)
def test_legacy_files_of_every_writer_are_read(tmp_path, tail, chunks, datasets):
    path = stored(tmp_path, legacy(*ENTRIES, tail=tail))
    assert is_legacy_imatrix(path)
    found = read_imatrix(path)
    assert list(found.entries) == ["a.weight", "größe"]
    assert found.entries["a.weight"].values().tolist() == [1.0, 2.0, 0.0]
    assert found.entries["größe"].values().tolist() == [1.5]
    assert (found.chunk_count, found.datasets, found.legacy) == (chunks, datasets, True)
    assert found.files == ("m.dat",)


def test_values_of_an_entry_without_calls_are_taken_as_they_are(tmp_path):
    found = read_imatrix(stored(tmp_path, legacy(entry("a", 0, [3.0, 5.0]))))
    assert found.entries["a"].values().tolist() == [3.0, 5.0]


def test_legacy_golden_bytes(tmp_path, matrix):
    write_imatrix(tmp_path / "m.dat", matrix)
    # calls: the larger count in chunks of 4, rounded up; values: mean times calls
    expected = legacy(
        entry("a.weight", 1, [0.125, 0.0625, 3.0, 0.0]),
        entry("b.weight", 2, [0.25, 0.5, 0.75, 1.0]),
        tail=struct.pack("<i", 5) + text("two.txt"),
    )
    assert (tmp_path / "m.dat").read_bytes() == expected


def test_gguf_golden_bytes(tmp_path, matrix):
    def string(value):
        return struct.pack("<Q", len(value)) + value.encode()

    def info(name, dims, offset):
        head = string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        return head + struct.pack("<IQ", 0, offset)

    write_imatrix(tmp_path / "m.gguf", matrix)
    head = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    head += string("general.type") + struct.pack("<I", 8) + string("imatrix")
    head += string("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2)
    head += string("one.txt") + string("two.txt")
    head += string("imatrix.chunk_count") + struct.pack("<II", 4, 5)
    head += string("imatrix.chunk_size") + struct.pack("<II", 4, 4)
    head += info("a.weight.in_sum2", (2, 2), 0) + info("a.weight.counts", (1, 2), 32)
    head += info("b.weight.in_sum2", (4,), 64) + info("b.weight.counts", (1,), 96)
    head += bytes(-len(head) % 32)
    data = [(0.5, 0.25, 6.0, 0.0), (4.0, 2.0), (1.0, 2.0, 3.0, 4.0), (8.0,)]
    body = b"".join(struct.pack(f"<{len(row)}f", *row).ljust(32, b"\0") for row in data)
    assert (tmp_path / "m.gguf").read_bytes() == head + body


@pytest.mark.parametrize("ending", [".gguf", ".dat"])
def test_round_trip_keeps_the_values(tmp_path, matrix, ending):
    path = tmp_path / f"m{ending}"
    write_imatrix(path, matrix)
    found = read_imatrix(path)
    assert found.entries.keys() == matrix.entries.keys()
    for name, one in matrix.entries.items():
        assert np.array_equal(found.entries[name].values(), one.values())
    assert (found.chunk_count, found.legacy) == (5, ending == ".dat")


@pytest.mark.oracle
def test_gguf_py_reads_what_we_write(tmp_path, matrix):
    gguf = pytest.importorskip("gguf")
    write_imatrix(tmp_path / "m.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = gguf.Keys.IMatrix
    assert reader.get_field("general.type").contents() == gguf.GGUFType.IMATRIX
    assert reader.get_field(keys.DATASETS).contents() == ["one.txt", "two.txt"]
    assert reader.get_field(keys.CHUNK_COUNT).contents() == 5
    assert reader.get_field(keys.CHUNK_SIZE).contents() == 4
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert found["a.weight.in_sum2"].tolist() == [[0.5, 0.25], [6.0, 0.0]]
    assert found["b.weight.counts"].tolist() == [8.0]


def write_with_gguf_py(path, tensors, kind="imatrix", datasets=("d.txt",)):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch="none")
    if kind:
        writer.add_type(kind)
    if datasets:
        writer.add_array(gguf.Keys.IMatrix.DATASETS, list(datasets))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, 7)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, 512)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.oracle
def test_what_gguf_py_writes_is_read(tmp_path):
    tensors = {
        "w.in_sum2": [[1.0, 3.0], [5.0, 5.0]],
        "w.counts": [[4.0], [0.0]],
        "w.in_sum": [[9.0, 9.0], [9.0, 9.0]],  # newer collectors: not needed here
    }
    found = read_imatrix(write_with_gguf_py(tmp_path / "m.gguf", tensors))
    # a matrix that never saw an input counts as one, as in llama-quantize
    assert found.entries["w"].values().tolist() == [0.25, 0.75, 1.0, 1.0]
    assert found.partial == ("w",)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (7, 512, ("d.txt",))


def test_division_is_llama_quantizes_in_float32():
    sums = np.float32([1.0, 2.0, 7.0])
    found = measured([sums.astype(np.float64)], [3]).values()
    assert found.dtype == np.float32
    assert np.array_equal(found, sums / np.float32(3))


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.in_sum2": [1.0]}, "sums without counts"),
        ({"w.counts": [1.0], "v.in_sum2": [1.0], "v.counts": [1.0]}, "counts without sums: w"),
        ({"w.in_sum2": [1.0, 2.0, 3.0], "w.counts": [1.0, 1.0]}, "3 sums for 2 counts"),
        ({"w.in_sum2": [-1.0], "w.counts": [1.0]}, "sums of 'w' hold -1"),
        ({"w.in_sum2": [np.nan], "w.counts": [1.0]}, "sums of 'w' hold nan"),
        ({"w.in_sum2": [1.0], "w.counts": [np.inf]}, "counts of 'w' hold inf"),
        ({"w.in_sum2": [1.0], "w.counts": [1e30]}, "counts of 'w' hold 1"),
        ({"w": [1.0]}, "without entries"),
    ],
)
def test_gguf_contradictions_are_named(tmp_path, tensors, message):
    with pytest.raises(MalformedFile, match=message):
        read_imatrix(write_with_gguf_py(tmp_path / "m.gguf", tensors))


@pytest.mark.oracle
def test_a_gguf_model_is_no_importance_matrix(tmp_path):
    path = write_with_gguf_py(tmp_path / "m.gguf", {"w": [1.0]}, kind="model")
    with pytest.raises(UnsupportedContainer, match="no importance matrix"):
        read_imatrix(path)


def test_legacy_truncated_anywhere_is_refused(tmp_path):
    whole = legacy(*ENTRIES, tail=TAIL)
    full = legacy(*ENTRIES)
    # cut where a shorter kind of file ends, the rest is a whole file of that kind
    fine = {len(full), len(full) + 4}
    for size in range(len(whole)):
        path = stored(tmp_path, whole[:size])
        assert is_legacy_imatrix(path) == (size in fine), size
        if size in fine:
            assert len(read_imatrix(path).entries) == 2
        else:
            with pytest.raises((TruncatedFile, MalformedFile), match=r"m\.dat: "):
                read_imatrix(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(*ENTRIES, count=0), "first number, 0"),
        (legacy(*ENTRIES, count=-1), "first number, -1"),
        (legacy(*ENTRIES, count=2**31 - 1), "first number, 2147483647"),
        (legacy(*ENTRIES, count=3), "ends at byte"),
        (legacy(*ENTRIES, count=1), "name has .* bytes|follow|ends at byte"),
        (legacy(struct.pack("<i", 2**31 - 1) + bytes(40)), "2147483647 bytes, expected 1 to"),
        (legacy(struct.pack("<i", -5) + bytes(40)), "-5 bytes, expected"),
        (legacy(entry("", 1, [1.0]) + bytes(8)), "0 bytes, expected"),
        (legacy(struct.pack("<i", 1) + b"\xff" + bytes(40)), "not UTF-8"),
        (legacy(text("a") + struct.pack("<ii", 1, 2**31 - 1) + bytes(64)), "values of 'a' ends at"),
        (legacy(text("a") + struct.pack("<ii", 1, -1) + bytes(64)), "-1 values from 1 calls"),
        (legacy(text("a") + struct.pack("<ii", -1, 1) + bytes(64)), "1 values from -1 calls"),
        (legacy(ENTRIES[0], ENTRIES[0]), "appears twice"),
        (legacy(entry("a", 1, [float("nan")])), "values of 'a' hold nan"),
        (legacy(entry("a", 1, [-2.0])), "values of 'a' hold -2"),
        (legacy(*ENTRIES, tail=TAIL + b"x"), "1 bytes follow"),
        (legacy(*ENTRIES, tail=struct.pack("<ii", 1, -1)), "dataset's name has -1"),
        (legacy(*ENTRIES, tail=struct.pack("<ii", 1, 2**31 - 1)), "ends at byte"),
        (legacy(*ENTRIES, tail=struct.pack("<i", -7)), "chunks is -7"),
        (b"", "ends at byte 4"),
    ],
)
def test_absurd_fields_are_refused_before_memory_is_taken(tmp_path, content, message):
    path = stored(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read_imatrix(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_merging_adds_sums_and_counts(matrix):
    other = ImportanceMatrix(
        {"b.weight": measured([[7.0, 0.0, 1.0, 0.0]], [8]), "c": measured([[2.0]], [1])},
        ("two.txt", "three.txt"),
        2,
        8,
        files=("n.gguf",),
    )
    found = merge_imatrices([matrix, other])
    assert found.entries["b.weight"].values().tolist() == [0.5, 0.125, 0.25, 0.25]
    assert found.entries["b.weight"].counts.tolist() == [16]
    assert found.entries["c"].values().tolist() == [2.0]
    assert np.array_equal(found.entries["a.weight"].values(), matrix.entries["a.weight"].values())
    assert found.datasets == ("one.txt", "two.txt", "three.txt")
    assert (found.chunk_count, found.chunk_size, found.legacy) == (7, 8, False)
    assert found.files == ("m.gguf", "n.gguf")


def test_a_legacy_call_weighs_as_one_chunk(tmp_path, matrix):
    path = stored(tmp_path, legacy(entry("b.weight", 3, [3.0, 3.0, 3.0, 3.0])))
    found = merge_imatrices([read_imatrix(path), matrix]).entries["b.weight"]
    assert found.counts.tolist() == [3 * 4 + 8]
    assert found.sums.tolist() == [[13.0, 14.0, 15.0, 16.0]]


def test_one_legacy_count_serves_every_expert(tmp_path, matrix):
    path = stored(tmp_path, legacy(entry("a.weight", 1, [1.0, 1.0, 1.0, 1.0])))
    found = merge_imatrices([matrix, read_imatrix(path)]).entries["a.weight"]
    assert found.counts.tolist() == [8, 6]
    assert found.sums.tolist() == [[4.5, 4.25], [10.0, 4.0]]


def test_matrices_of_different_models_do_not_merge(matrix):
    other = ImportanceMatrix({"b.weight": measured([[1.0]], [1])})
    with pytest.raises(UsageError, match=r"b\.weight: 4 values in one .* 1 in another"):
        merge_imatrices([matrix, other])


def test_prefixes_are_put_before_names(matrix):
    assert set(with_prefix(matrix, "model.").entries) == {"model.a.weight", "model.b.weight"}


@pytest.mark.parametrize("ending", [".gguf", ".dat"])
def test_an_existing_file_is_replaced_only_by_force(tmp_path, matrix, ending):
    path = stored(tmp_path, b"mine", f"m{ending}")
    with pytest.raises(UsageError, match="--force"):
        write_imatrix(path, matrix)
    assert path.read_bytes() == b"mine"
    write_imatrix(path, matrix, force=True)
    assert len(read_imatrix(path).entries) == 2
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_other_extensions_are_refused(tmp_path, matrix):
    with pytest.raises(UsageError, match=r"\.gguf, or as \.dat"):
        write_imatrix(tmp_path / "m.bin", matrix)


def test_sums_beyond_float32_are_refused(tmp_path):
    huge = ImportanceMatrix({"a": measured([[1e39]], [1])})
    with pytest.raises(MalformedFile, match="beyond the range"):
        write_imatrix(tmp_path / "m.gguf", huge)
    assert not list(tmp_path.iterdir())


def test_gguf_truncated_anywhere_is_refused(tmp_path, matrix):
    write_imatrix(tmp_path / "m.gguf", matrix)
    whole = (tmp_path / "m.gguf").read_bytes()
    end = len(whole) - 28  # the last count; padding follows it
    for size in range(end):
        with pytest.raises(CheckpointError):
            read_imatrix(stored(tmp_path, whole[:size], "cut.gguf"))
