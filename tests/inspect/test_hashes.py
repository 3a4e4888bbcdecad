"""Hashes: the definitions of the programs that use them, restated with hashlib."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from diffquant.inspect import hashes as module
from diffquant.inspect.hashes import hash_paths


@pytest.fixture
def big(write, tmp_path):
    """2.5 MiB, so that the first web UIs' hash has its 64 KiB."""
    data = np.random.default_rng(1).standard_normal((640, 1024)).astype(np.float32)
    return write(tmp_path / "a.safetensors", {"w": data})


def test_hashes_are_what_their_programs_compute(big, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_NBYTES", 100_000)
    raw = big.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for workers in (1, 4):
        (one,) = hash_paths([big], workers=workers)
        assert one.sha256 == hashlib.sha256(raw).hexdigest()
        assert one.data_sha256 == hashlib.sha256(raw[start:]).hexdigest()
        assert one.autov1 == hashlib.sha256(raw[0x100000:][:0x10000]).hexdigest()[:8]
        assert (one.autov2, one.autov3) == (one.sha256[:10], one.data_sha256[:12])
        assert one.zeros == ()


def restate(path, **notes):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length]) | {"__metadata__": notes}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_autov3_does_not_depend_on_the_metadata(big):
    (before,) = hash_paths([big])
    restate(big, note="x")
    (after,) = hash_paths([big])
    assert before.autov3 == after.autov3
    assert before.autov2 != after.autov2


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("{}", "matches"),
        ("0x{}", "matches"),
        ("0X{}", "matches"),
        ("{:.12}", "matches"),
        ("f{}", "differs"),
        ("", "unreadable"),
        ("0x", "unreadable"),
        ("not a hash at all", "unreadable"),
    ],
)
def test_stated_hashes_are_compared(big, text, verdict):
    (one,) = hash_paths([big])
    restate(big, **{"modelspec.hash_sha256": text.format(one.data_sha256)})
    (stated,) = hash_paths([big])[0].stated
    assert stated.verdict == verdict


def test_files_of_other_kinds_have_no_data_hash(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"anything")
    (one,) = hash_paths([path])
    assert (one.data_sha256, one.autov1, one.autov3) == ("", "", "")
    assert one.sha256 == hashlib.sha256(b"anything").hexdigest()


def test_a_file_with_a_broken_header_is_hashed_all_the_same(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"{" + bytes(30))
    (one,) = hash_paths([path])
    assert one.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (one.data_sha256, one.stated) == ("", ())


def test_folders_are_hashed_file_by_file(examples):
    found = hash_paths([examples / "sd15-shapes"])
    assert len(found) == 3
    for one in found:
        raw = Path(one.path).read_bytes()
        assert one.sha256 == hashlib.sha256(raw).hexdigest()


def test_runs_of_zeros_are_found(tmp_path):
    mib = 1 << 20
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * mib + bytes(2 * mib) + b"x" * mib + bytes(mib + 5))
    (one,) = hash_paths([path])
    assert [(zeros.start, zeros.stop) for zeros in one.zeros] == [
        (mib, 3 * mib),
        (4 * mib, 5 * mib + 5),
    ]
