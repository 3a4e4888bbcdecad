"""`inspect --audit` from the command line: exit codes, text, JSON."""

from __future__ import annotations

import json
import struct

import pytest


@pytest.fixture
def broken(tmp_path):
    """A safetensors file with a gap, and a misaligned header."""
    head = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
    head += b" " * (4 - (8 + len(head)) % 4)
    path = tmp_path / "broken.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    return path


def test_a_clean_file_is_zero(command, gguf_file):
    ran = command("inspect", "--audit", gguf_file)
    assert (ran.code, ran.err) == (0, "")
    assert "0 violations, 0 warnings" in ran.out


def test_a_violation_is_three_and_says_rule_and_source(command, broken, gguf_file):
    ran = command("inspect", "--audit", gguf_file, broken)
    assert ran.code == 3
    assert "violation: tiles, 1 times (safetensors/src/tensor.rs" in ran.out
    assert "a: expected begin 0, found 4: a gap" in ran.out
    # without --audit nothing of it is checked beyond what reading needs
    assert command("inspect", gguf_file).code == 0


def test_json(command, broken):
    ran = command("inspect", "--audit", "--full", broken, "--json")
    body = ran.json
    assert (ran.code, body["ok"]) == (3, False)
    (audit,) = body["result"]["audits"]
    assert audit["full"] is True
    assert audit["counts"]["tiles"] == 1
    rows = [one for one in audit["findings"] if one["rule"] == "tiles"]
    assert set(rows[0]) == {"rule", "severity", "tensor", "expected", "found", "source"}


def test_warnings_alone_are_zero(command, tmp_path):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    ran = command("inspect", "--audit", path)
    assert ran.code == 0
    assert "0 violations, 1 warnings" in ran.out


def test_nonsense_and_trouble(command, tmp_path, gguf_file):
    assert command("inspect", "--full", gguf_file).code == 2
    assert command("inspect", "--audit", tmp_path / "none").code == 1
    (tmp_path / "a.ckpt").write_bytes(b"PK")
    assert command("inspect", "--audit", tmp_path / "a.ckpt").code == 4
