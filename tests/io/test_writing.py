"""Every container is written the same way: whole, or not at all."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.errors import (
    CheckpointError,
    DuplicateTarget,
    PlanMismatch,
    ResourceError,
    UsageError,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(sink, tensors):
    for key, data in tensors.items():
        sink.write(key, 0, data)


@pytest.fixture
def old(target):
    """The target exists already; returns its folder's bytes."""
    path, specs, tensors = target
    with open_sink(path, specs, {"state": "old"}, configs=configs_for(path)) as sink:
        fill(sink, tensors)
        sink.commit()
    return snapshot(path.parent)


def configs_for(path):
    return None if path.suffix else {"unet/config.json": {"a": 1}}


def test_written_tensors_read_back(target):
    path, specs, tensors = target
    with open_sink(path, specs, {"state": "new"}) as sink:
        fill(sink, tensors)
        assert not path.exists()
        files = sink.commit()
    assert all(file.is_file() for file in files)
    assert sum(file.stat().st_size for file in files) == sink.nbytes
    with open_source(path) as source:
        assert list(source.specs.values()) == list(specs)
        for key, data in tensors.items():
            assert np.array_equal(source.read(key), data)


def test_same_input_gives_same_bytes(target, tmp_path):
    path, specs, tensors = target
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open_sink(tmp_path / name / path.name, specs, {"b": "2", "a": "1"}) as sink:
            for key in tensors if name == "a" else reversed(tensors):
                sink.write(key, 0, tensors[key])
            sink.commit()
        results.append(snapshot(tmp_path / name))
    assert results[0] == results[1]


def test_chunks_from_threads_in_any_order(target):
    path, specs, tensors = target
    jobs = [
        (key, at, data[at : at + 3])
        for key, data in tensors.items()
        for at in range(0, data.size, 3)
    ]
    with open_sink(path, specs, {}) as sink, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: sink.write(*job), reversed(jobs)))
        sink.commit()
    with open_source(path) as source:
        for key, data in tensors.items():
            assert np.array_equal(source.read(key), data)


def test_leaving_without_commit_leaves_nothing(target):
    path, specs, tensors = target
    with open_sink(path, specs, {}) as sink:
        fill(sink, tensors)
        assert [entry for entry in path.parent.iterdir() if entry.name.startswith(".out")]
    assert snapshot(path.parent) == {}
    sink.abort()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_the_old_file(target, old, error):
    path, specs, tensors = target

    def write():
        with open_sink(path, specs, {}, force=True) as sink:
            fill(sink, tensors)
            raise error

    with pytest.raises(error):
        write()
    assert snapshot(path.parent) == old


def test_incomplete_commit_is_refused_and_removed(target, old):
    path, specs, tensors = target
    with open_sink(path, specs, {}, force=True) as sink:
        for key, data in tensors.items():
            sink.write(key, 0, data[:-1])
        with pytest.raises(PlanMismatch, match="not fully written"):
            sink.commit()
    assert snapshot(path.parent) == old


def test_force_replaces_and_no_force_refuses(target, old):
    path, specs, tensors = target
    with pytest.raises(UsageError, match="--force"):
        open_sink(path, specs, {})
    assert snapshot(path.parent) == old
    with open_sink(path, specs, {"state": "new"}, force=True) as sink:
        fill(sink, tensors)
        sink.commit()
    assert snapshot(path.parent) != old
    assert not [entry for entry in path.parent.iterdir() if entry.name.startswith(".")]


def test_writes_outside_the_plan_are_refused(target):
    path, specs, tensors = target
    key = specs[0].key
    with open_sink(path, specs, {}) as sink:
        with pytest.raises(PlanMismatch, match="not planned"):
            sink.write(key + "x", 0, tensors[key])
        with pytest.raises(PlanMismatch, match="which has"):
            sink.write(key, 1, tensors[key])
        with pytest.raises(PlanMismatch, match="which has"):
            sink.write(key, -1, tensors[key][:1])
        fill(sink, tensors)
        sink.commit()
        with pytest.raises(PlanMismatch, match="after it was committed"):
            sink.commit()


def test_duplicate_specs_are_refused(target):
    path, specs, _ = target
    with pytest.raises(DuplicateTarget) as error:
        open_sink(path, (*specs, specs[0]), {})
    assert error.value.keys == (specs[0].key,)
    assert snapshot(path.parent) == {}


def test_metadata_is_patched_in_place(target):
    path, specs, tensors = target
    with open_sink(path, specs, {"hash": "0" * 64, "other": "1"}) as sink:
        fill(sink, tensors)
        with pytest.raises(PlanMismatch, match="64 are reserved"):
            sink.patch_metadata("hash", "abc")
        with pytest.raises(PlanMismatch, match="64 are reserved"):
            sink.patch_metadata("hash", "é" * 64)
        with pytest.raises(PlanMismatch, match="no metadata string"):
            sink.patch_metadata("none", "abc")
        sink.patch_metadata("hash", "f" * 64)
        sink.commit()
    with open_source(path) as source:
        prefix = "" if path.suffix else "unet/"
        assert source.metadata[prefix + "hash"] == "f" * 64
        assert source.metadata[prefix + "other"] == "1"
        for key, data in tensors.items():
            assert np.array_equal(source.read(key), data)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate")
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_full_disk_is_a_resource_error_and_cleans_up(target, old, monkeypatch, call):
    path, specs, tensors = target

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with (
            pytest.raises(ResourceError, match="disk full") as error,
            open_sink(path, specs, {}, force=True) as sink,
        ):
            fill(sink, tensors)
    assert error.value.exit_code == 6
    assert snapshot(path.parent) == old


def test_disk_that_fills_up_midway_cleans_up(target, old, monkeypatch):
    path, specs, tensors = target

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_sink(path, specs, {}, force=True) as sink, monkeypatch.context() as patch:
        sink.write(specs[0].key, 0, tensors[specs[0].key])
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError, match="disk full"):
            sink.write(specs[1].key, 0, tensors[specs[1].key])
    assert snapshot(path.parent) == old


def test_too_small_a_disk_is_told_with_both_numbers(target, monkeypatch):
    path, specs, _ = target
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7))
    with pytest.raises(ResourceError, match=r"needs \d+ bytes, 7 bytes are free"):
        open_sink(path, specs, {})
    assert snapshot(path.parent) == {}


def test_file_systems_without_fallocate_are_truncated_to_size(target, monkeypatch):
    path, specs, tensors = target

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with open_sink(path, specs, {}) as sink:
        fill(sink, tensors)
        sink.commit()
    with open_source(path) as source:
        assert np.array_equal(source.read(specs[0].key), tensors[specs[0].key])


def test_systems_without_positional_io_use_a_lock_and_a_seek(target, monkeypatch):
    path, specs, tensors = target
    for name in ("pwrite", "preadv", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    with open_sink(path, specs, {}) as sink, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: sink.write(item[0], 0, item[1]), tensors.items()))
        sink.commit()
    with open_source(path) as source:
        for key, data in tensors.items():
            assert np.array_equal(source.read(key), data)


CRASH = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from diffquant.core.tensors import TensorSpec
    from diffquant.io import open_sink
    path, key = Path(sys.argv[1]), sys.argv[2]
    with open_sink(path, [TensorSpec(key, "I8", (1000,))], {}, force=True) as sink:
        sink.write(key, 0, np.zeros(500, np.uint8))
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_kill_leaves_the_old_file_and_the_next_run_sweeps(target, old):
    path, specs, tensors = target
    key = "unet/w" if not path.suffix else "w"
    script = textwrap.dedent(CRASH)
    command = [sys.executable, "-c", script, str(path), key]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    after = snapshot(path.parent)
    left = [entry for entry in path.parent.iterdir() if entry.name.startswith(".out")]
    assert len(left) == 1
    assert {name: after[name] for name in old} == old
    stranger = path.parent / f".{path.name}.partial-{os.getpid()}-00000000"
    stranger.write_bytes(b"alive")
    with open_sink(path, specs, {}, force=True) as sink:
        assert not left[0].exists()
        assert stranger.exists()
        fill(sink, tensors)
        sink.commit()


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_folder_lost_between_two_renames_is_put_back(tmp_path, writing):
    plan, write_all = writing
    specs, tensors = plan("unet/")
    path = tmp_path / "pipe"
    write_all(path, tensors, specs, configs={"unet/config.json": {}})
    before = snapshot(path)
    path.rename(tmp_path / f".pipe.old-{dead_pid()}-0a0a0a0a")
    with pytest.raises(UsageError, match="--force"):
        open_sink(path, specs, {})
    assert snapshot(path) == before


def test_force_never_replaces_a_folder_that_is_no_checkpoint(tmp_path, writing):
    plan, _ = writing
    specs, _ = plan("unet/")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is no Diffusers folder"):
        open_sink(home, specs, {}, force=True)
    assert (home / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.ckpt", "only read"),
        ("out.xyz", "unknown extension"),
        ("missing/out.gguf", "create it first"),
        ("folder.gguf", "asks for a file"),
    ],
)
def test_targets_that_make_no_sense_are_usage_errors(tmp_path, name, message):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UsageError, match=message) as error:
        open_sink(tmp_path / name, [TensorSpec("w", "F32", (1,))], {})
    assert error.value.exit_code == 2


def test_version_numbers_and_slashes_mean_a_folder(tmp_path):
    spec = TensorSpec("unet/w", "F32", (1,))
    for name in ("sd-v1.5", "sd.alpha/"):
        with open_sink(f"{tmp_path}/{name}", [spec], {}) as sink:
            sink.write("unet/w", 0, np.zeros(4, np.uint8))
            (file,) = sink.commit()
        assert file == Path(tmp_path, name, "unet", "diffusion_pytorch_model.safetensors")


def test_a_file_takes_no_configs(tmp_path):
    with pytest.raises(UsageError, match="side files"):
        open_sink(tmp_path / "a.gguf", [], {}, configs={"config.json": {}})


def test_read_only_folder_is_a_checkpoint_error(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_sink(tmp_path / "a.gguf", [TensorSpec("w", "F32", (1,))], {})
