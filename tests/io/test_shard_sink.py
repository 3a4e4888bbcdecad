"""Checkpoints in several files: what is cut where, what is refused, what is left behind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffquant.core.errors import PlanMismatch, UsageError
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.io.shard_sink import split

SPECS = tuple(TensorSpec(f"t{index}", "F32", (size,)) for index, size in enumerate((4, 4, 9, 1, 2)))
LIMIT = 32


def fill(sink):
    for index, spec in enumerate(SPECS):
        sink.write(spec.key, 0, np.full(spec.nbytes, index, np.uint8))


def test_shards_are_filled_in_order_and_a_large_tensor_stands_alone():
    cut = [[spec.key for spec in shard] for shard in split(SPECS, LIMIT)]
    assert cut == [["t0", "t1"], ["t2"], ["t3", "t4"]]
    assert [len(shard) for shard in split(SPECS[:1], 1)] == [1]


def test_what_is_written_reads_back_through_the_index(tmp_path):
    path = tmp_path / "model.safetensors"
    with open_sink(path, SPECS, {"a": "b"}, shard_nbytes=LIMIT) as sink:
        fill(sink)
        files = sink.commit()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in files] == ["model.safetensors.index.json", *names]
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(file.name for file in files)
    index = json.loads(files[0].read_text())
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS)
    with open_source(files[0]) as source:
        assert dict(source.specs) == {spec.key: spec for spec in SPECS}
        assert source.metadata["a"] == "b"
        assert [int(source.read(spec.key)[0]) for spec in SPECS] == [0, 1, 2, 3, 4]


def test_what_fits_is_one_file(tmp_path):
    path = tmp_path / "model.safetensors"
    with open_sink(path, SPECS, {}, shard_nbytes=1000) as sink:
        fill(sink)
        assert sink.commit() == (path,)


def test_nothing_is_left_without_a_commit(tmp_path):
    with open_sink(tmp_path / "m.safetensors", SPECS, {}, shard_nbytes=LIMIT) as sink:
        fill(sink)
    assert list(tmp_path.iterdir()) == []
    sink = open_sink(tmp_path / "m.safetensors", SPECS, {}, shard_nbytes=LIMIT)
    with pytest.raises(PlanMismatch, match="not fully written"), sink:
        sink.commit()
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_refused_and_replaced_with_force(tmp_path):
    path = tmp_path / "model.safetensors"
    for force in (False, True):
        with open_sink(path, SPECS, {}, shard_nbytes=LIMIT, force=force) as sink:
            fill(sink)
            sink.commit()
    with pytest.raises(UsageError, match="exists; use --force"):
        open_sink(path, SPECS, {}, shard_nbytes=LIMIT)


def test_other_containers_are_not_cut(tmp_path):
    with pytest.raises(UsageError, match="only safetensors files are cut"):
        open_sink(tmp_path / "m.gguf", SPECS, {}, shard_nbytes=LIMIT)


def test_folders_cut_the_components_that_are_too_large(tmp_path):
    specs = [TensorSpec(f"unet/{spec.key}", spec.dtype, spec.shape) for spec in SPECS]
    specs.append(TensorSpec("vae/a", "F32", (2,)))
    with open_sink(tmp_path / "folder", specs, {}, shard_nbytes=LIMIT) as sink:
        for spec in specs:
            sink.write(spec.key, 0, np.zeros(spec.nbytes, np.uint8))
        files = sink.commit()
    names = {file.relative_to(tmp_path / "folder").as_posix() for file in files}
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in names
    assert "unet/diffusion_pytorch_model-00003-of-00003.safetensors" in names
    assert "vae/diffusion_pytorch_model.safetensors" in names
    assert all(file.is_file() for file in files)
    with open_source(tmp_path / "folder") as source:
        assert set(source.specs) == {spec.key for spec in specs}
