"""A shard index: names stay in their folder, and index and shards agree."""

import json
import logging

import pytest

from diffquant.core.errors import CheckpointError, MalformedFile, MissingKeys
from diffquant.io import open_source, sharded


@pytest.fixture
def index(tmp_path, writing):
    """Write two shards; returns a function that writes the index and opens it."""
    plan, write_all = writing
    specs, tensors = plan("", {"a": ("F32", (2, 3)), "b": ("F16", (4,)), "c": ("U8", (1,))})
    for name, part in (("one.safetensors", specs[:2]), ("two.safetensors", specs[2:])):
        write_all(tmp_path / name, {s.key: tensors[s.key] for s in part}, part, {"format": "pt"})

    def opened(content):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return open_source(path)

    return opened


ALL = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def test_shards_read_as_one(index):
    with index({"metadata": {"total_size": 33}, "weight_map": ALL}) as source:
        assert list(source.specs) == ["a", "b", "c"]
        assert source.metadata == {"total_size": "33", "format": "pt"}
        assert [file.name for file in source.files] == ["one.safetensors", "two.safetensors"]
        assert source.unlisted == ()
        assert source.read("a", (1, 2)).size == 12


def test_tensors_beyond_the_index_are_left_out_and_reported(index, caplog):
    with (
        caplog.at_level(logging.WARNING),
        index({"weight_map": {"a": "one.safetensors"}}) as source,
    ):
        assert list(source.specs) == ["a"]
        assert source.unlisted == (("one.safetensors", "b"),)
    assert "b in one.safetensors" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "/etc/passwd",
        "x/one.safetensors",
        "..",
        ".",
        "",
        "C:one",
        "x\\y",
        "a\0b",
        3,
    ],
)
def test_shard_names_that_leave_the_folder_are_refused(index, name):
    with pytest.raises(MalformedFile, match="no plain file name"):
        index({"weight_map": {"a": name}})


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", MalformedFile, "not valid JSON"),
        ({"weight_map": []}, MalformedFile, "no object 'weight_map'"),
        ('{"weight_map": {"a": "one.safetensors", "a": "x"}}', MalformedFile, "appears twice"),
        ({"weight_map": {**ALL, "d": "one.safetensors"}}, MissingKeys, "lack tensors .*: d"),
        ({"weight_map": {**ALL, "c": "one.safetensors"}}, MissingKeys, ": c"),
        (
            {"weight_map": {**ALL, "d": "three.safetensors"}},
            CheckpointError,
            "1 of 3 shards are missing, with 1 of 4 tensors: three.safetensors",
        ),
    ],
)
def test_index_that_contradicts_its_shards_is_refused(index, content, error, message):
    with pytest.raises(error, match=message):
        index(content)


def test_pickled_shards_open_too(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.arange(4)}, tmp_path / "p-00001-of-00001.bin")
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"w": "p-00001-of-00001.bin"}}))
    with sharded.open_index(path) as source:
        assert source.specs["w"].dtype == "I64"
