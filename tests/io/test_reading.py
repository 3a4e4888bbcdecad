"""Every container reads the same way, and survives damage the same way."""

import contextlib
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffquant.core.errors import (
    CheckpointError,
    DiffquantError,
    MissingKeys,
    PlanMismatch,
    TruncatedFile,
    UnsupportedContainer,
)
from diffquant.io import CONTAINERS, open_source
from diffquant.io.reading import RandomFile

MIB = 1 << 20


def test_source_returns_what_was_stored(sample):
    with open_source(sample.path) as source:
        assert CONTAINERS[source.container].sniff
        assert list(source.specs.values()) == list(sample.specs)
        assert source.nbytes > 0
        for key, data in sample.tensors.items():
            found = source.read(key)
            assert found.dtype == np.uint8
            assert found.ndim == 1
            assert np.array_equal(found, data)
            assert not found.flags.writeable


def test_rows_are_slices_of_the_whole(sample):
    with open_source(sample.path) as source:
        for key, spec in source.specs.items():
            for start in range(spec.rows + 1):
                for stop in range(start, spec.rows + 1):
                    data = source.read(key, (start, stop))
                    step = spec.row_nbytes
                    assert np.array_equal(data, sample.tensors[key][start * step : stop * step])


@pytest.mark.parametrize("rows", [(-1, 1), (2, 1), (0, 10**6)])
def test_rows_outside_raise_plan_mismatch(sample, rows):
    with open_source(sample.path) as source, pytest.raises(PlanMismatch, match="rows"):
        source.read(next(iter(source.specs)), rows)


def test_missing_key_names_the_closest(sample):
    with open_source(sample.path) as source:
        key = next(iter(source.specs))
        with pytest.raises(MissingKeys, match="did you mean") as error:
            source.read(key + "x")
        assert error.value.keys == (key + "x",)


def test_read_after_close_is_an_error(sample):
    source = open_source(sample.path)
    source.close()
    source.close()
    key = next(key for key, spec in source.specs.items() if spec.nbytes)
    with pytest.raises(CheckpointError, match="after close"):
        source.read(key)


def test_threads_read_at_once(sample):
    with open_source(sample.path) as source, ThreadPoolExecutor(8) as pool:
        keys = list(source.specs) * 40
        for key, data in zip(keys, pool.map(source.read, keys), strict=True):
            assert np.array_equal(data, sample.tensors[key])


def test_renamed_file_opens_by_content(sample, tmp_path):
    if sample.path != sample.victim or sample.path.suffix == ".json":
        pytest.skip("folders and indices go by name")
    renamed = sample.path.rename(tmp_path / "checkpoint.txt")
    with open_source(renamed) as source:
        assert list(source.specs) == list(sample.tensors)


def test_truncation_anywhere_is_refused(sample):
    whole = sample.victim.read_bytes()
    last = len(whole) - (32 if sample.victim.suffix == ".gguf" else 1)  # padding may be missing
    for size in sorted({*range(min(last, 300)), *range(0, last, 11), *range(last - 40, last)}):
        sample.victim.write_bytes(whole[:size])
        with pytest.raises((CheckpointError, MissingKeys)):
            open_source(sample.path)
    for size in (1, 4, 7):
        sample.victim.write_bytes(whole[:size])
        with pytest.raises((TruncatedFile, CheckpointError)) as error:
            open_source(sample.path)
        assert str(sample.victim) in str(error.value)


def test_random_damage_raises_only_our_errors_in_little_memory(sample):
    whole = sample.victim.read_bytes()
    rng = random.Random(11)
    opened = 0
    interesting = (0, 1, 0x7F, 0x80, 0xFF)
    tracemalloc.start()
    try:
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 8))):
                near = rng.randrange(min(len(damaged), 1500))  # headers lie at either end
                at = near if rng.random() < 0.7 else len(damaged) - 1 - near
                width = rng.choice((1, 1, 4, 8))
                damaged[at : at + width] = bytes(
                    rng.choice((rng.randrange(256), *interesting)) for _ in range(width)
                )
            sample.victim.write_bytes(damaged)
            with contextlib.suppress(DiffquantError), open_source(sample.path) as source:
                opened += 1
                for key in source.specs:
                    source.read(key)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert opened < 300


def test_trailing_bytes_do_not_pass_for_data(sample):
    if sample.victim.suffix != ".safetensors":
        pytest.skip("GGUF and zip allow bytes after the last tensor")
    with sample.victim.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="1 bytes after the last tensor"):
        open_source(sample.path)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model"])
def test_strangers_are_recognised(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnsupportedContainer, match=message):
        open_source(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".ckpt"])
def test_wrong_content_under_a_known_extension_is_one_clear_error(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"hello, this is text and not a checkpoint at all")
    with pytest.raises(CheckpointError) as error:
        open_source(path)
    assert str(path) in str(error.value)


def test_unknown_content_lists_the_containers(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"hello")
    with pytest.raises(UnsupportedContainer, match="safetensors"):
        open_source(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("one.safetensors",), "one.safetensors"),
        (("a.safetensors", "b.safetensors"), None),
    ],
)
def test_folder_with_one_safetensors_opens_it(tmp_path, writing, names, expected):
    plan, write_all = writing
    specs, tensors = plan()
    for name in names:
        write_all(tmp_path / name, tensors, specs)
    if expected is None:
        with pytest.raises(CheckpointError, match="several"):
            open_source(tmp_path)
        return
    with open_source(tmp_path) as source:
        assert source.path == tmp_path / expected


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 2**50), (2**50, 1), (-1, 1), (0, -1), (9, 2)])
def test_bytes_outside_the_file_are_refused_before_allocating(tmp_path, offset, nbytes):
    (tmp_path / "f").write_bytes(bytes(10))
    file = RandomFile(tmp_path / "f")
    with pytest.raises(TruncatedFile, match="asked for"):
        file.read(offset, nbytes)
    file.close()


def test_file_that_shrinks_while_open_is_truncated_not_a_crash(tmp_path, writing):
    plan, write_all = writing
    specs, tensors = plan()
    path = tmp_path / "model.safetensors"
    write_all(path, tensors, specs)
    with open_source(path) as source:
        with path.open("r+b") as file:
            file.truncate(40)
        with pytest.raises(TruncatedFile, match="when it was opened"):
            source.read("blocks.0.weight")
