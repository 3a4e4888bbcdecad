"""`diff` from the command line: the table, its JSON and its exit codes."""

from __future__ import annotations

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink


def write(path, **tensors):
    specs = [TensorSpec(key, "F32", array.shape) for key, array in tensors.items()]
    with open_sink(path, specs, {}) as sink:
        for key, array in tensors.items():
            sink.write(key, 0, array.astype("<f4").reshape(-1).view(np.uint8))
        sink.commit()
    return path


@pytest.fixture
def files(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    return (
        write(tmp_path / "a.safetensors", w=x, v=x[0], gone=x),
        write(tmp_path / "b.safetensors", w=x + 1, v=x[0]),
    )


def test_equal_files_are_zero(command, files):
    ran = command("diff", files[0], files[0])
    assert (ran.code, ran.err) == (0, "")
    assert "same bytes" in ran.out
    assert ran.out.endswith("no real difference\n")


def test_real_differences_are_three_and_come_worst_first(command, files):
    ran = command("diff", *files)
    assert ran.code == 3
    assert ran.out.index("missing in B") < ran.out.index("really different")
    assert "2 tensors differ" in ran.out
    detail = ran.out.split("tensor ")[1]
    assert "gone" in detail
    assert "\nv " not in detail
    assert "\nv " in command("diff", *files, "-v").out


def test_json_has_every_tensor(command, files):
    ran = command("diff", *files, "--json")
    body = ran.json
    assert (ran.code, body["ok"], body["command"]) == (3, False, "diff")
    assert [row["key"] for row in body["result"]["tensors"]] == ["gone", "w", "v"]
    assert body["result"]["classes"]["identical"] == 1
    assert body["result"]["same"] is False


def test_trouble_is_one_and_nonsense_two(command, files, tmp_path):
    assert command("diff", files[0], tmp_path / "none").code == 1
    assert command("diff", *files, "--allow", "shape").code == 2
    assert command("diff", files[0]).code == 2
    assert command("diff", *files, "--part", "vae").code == 2
