"""`inspect --deep` and `--hash`: exit codes, JSON, and what a cut file says."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink


def write(path, arrays, metadata=None):
    specs = [TensorSpec(key, "F32", array.shape) for key, array in arrays.items()]
    with open_sink(path, specs, metadata or {}, force=True) as sink:
        for key, array in arrays.items():
            sink.write(key, 0, array.astype(np.float32).reshape(-1).view(np.uint8))
        sink.commit()
    return path


def test_a_healthy_file_is_0_and_has_its_hashes(command, unet):
    ran = command("inspect", "--deep", unet)
    assert (ran.code, ran.err) == (0, "")
    assert hashlib.sha256(unet.read_bytes()).hexdigest() in ran.out
    assert ran.out.endswith("  healthy: 0 errors, 0 warnings\n")
    (report,) = command("inspect", "--deep", "--json", unet).result["health"]
    assert (report["verdict"], report["findings"]) == ("healthy", [])
    assert report["parts"][0]["weights"] > 1_000_000


def test_errors_are_3_and_warnings_are_0(command, tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 8))
    weight[0, 0] = np.nan
    bad = write(tmp_path / "bad.safetensors", {"a.weight": weight})
    ran = command("inspect", "--deep", bad)
    assert ran.code == 3
    assert "error: nan (1): not a number" in ran.out
    assert "- a.weight: 1 of 64" in ran.out
    body = command("inspect", "--deep", "--json", bad).json
    assert (body["ok"], body["result"]["health"][0]["verdict"]) == (False, "damaged")
    odd = write(tmp_path / "odd.safetensors", {"a.weight": np.full((8, 8), 70_000.0)})
    ran = command("inspect", "--deep", odd)
    assert ran.code == 0
    assert "suspicious: 0 errors, 2 warnings" in ran.out


def test_several_files_have_the_worst_code(command, tmp_path, unet):
    weight = np.full((8, 8), np.inf)
    bad = write(tmp_path / "bad.safetensors", {"a.weight": weight})
    ran = command("inspect", "--deep", "--json", unet, bad)
    assert ran.code == 3
    assert [one["verdict"] for one in ran.json["result"]["health"]] == ["healthy", "damaged"]


def test_a_file_that_cannot_be_read_does_not_hide_the_others(command, tmp_path, unet):
    ran = command("inspect", "--deep", "--json", unet, tmp_path / "gone")
    assert ran.code == 1
    assert [one["verdict"] for one in ran.json["result"]["health"]] == ["healthy"]
    assert ran.json["warnings"] == [f"{tmp_path / 'gone'}: no such file"]


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_a_cut_file_says_what_is_missing(command, tmp_path, ending, options):
    arrays = {f"t{i}.weight": np.ones((8, 8)) for i in range(10)}
    path = write(tmp_path / f"a.{ending}", arrays)
    path.write_bytes(path.read_bytes()[: -2 * 256 - 1])
    ran = command("inspect", *options, path)
    assert ran.code == 1
    assert "its header is whole, 3 of 10 tensors are not" in ran.err
    assert "the first that is cut is 't7.weight'" in ran.err
    assert "513 are missing: download it again" in ran.err


def test_missing_shards_are_all_named(command, tmp_path):
    index = {"weight_map": {f"w{i}": f"m-{i}.safetensors" for i in range(3)}}
    write(tmp_path / "m-1.safetensors", {"w1": np.ones((2, 2))})
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    ran = command("inspect", "--deep", path)
    assert ran.code == 1
    told = "2 of 3 shards are missing, with 2 of 3 tensors: m-0.safetensors, m-2.safetensors"
    assert told in ran.err


def test_hashes_alone(command, unet):
    ran = command("inspect", "--hash", unet)
    digest = hashlib.sha256(unet.read_bytes()).hexdigest()
    assert f"sha256  {digest}\n" in ran.out
    assert f"AutoV2 {digest[:10]}" in ran.out
    (one,) = command("inspect", "--hash", "--json", unet).result["hashes"]
    assert (one["sha256"], one["autov3"]) == (digest, one["data_sha256"][:12])


def test_one_report_at_a_time(command, unet):
    from click.testing import CliRunner

    from diffquant.cli.main import cli

    ran = CliRunner().invoke(cli, ["inspect", "--deep", "--hash", str(unet)])
    assert ran.exit_code == 2
    assert "ask one at a time" in ran.stderr


def test_names_in_log_lines_are_shown_not_sent(command, tmp_path):
    """`command` asserts that no escape is printed."""
    write(tmp_path / "m.safetensors", {"a": np.ones((2, 2)), "b\x1b[2J": np.ones((2, 2))})
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    ran = command("inspect", path)
    assert ran.code == 0
    assert r"left out: b\x1b[2J in m.safetensors" in ran.err


def test_half_a_surrogate_pair_is_refused_in_a_header_and_never_printed(command, tmp_path):
    raw = b'{"__metadata__": {"note": "\\ud800"}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    ran = command("inspect", "--explain", path)
    assert ran.code == 1
    assert "header is not valid JSON" in ran.err
    good = raw.replace(b"\\ud800", b"\\ud83d\\ude00")
    path.write_bytes(len(good).to_bytes(8, "little") + good)
    assert "note = \U0001f600" in command("inspect", "--explain", path).out
    index = tmp_path / "b.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "\\ud800.safetensors"}}')
    for options in ((), ("--audit",), ("--deep",)):
        assert command("inspect", *options, index).code == 1
