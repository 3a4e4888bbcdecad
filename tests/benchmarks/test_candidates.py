"""Candidate kernels without a card: by Triton's interpreter, as compiled, in benchmarks."""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_parts import random_parts

from diffquant.runtime.kernels import KERNELS as REFERENCE

pytest.importorskip("triton")

import few_sweep
import gpu_few
import gpu_kernels
import gpu_matmul
from candidates import blocks, blocks_32, blocks_k, few, few_tiles
from triton_compiled import compiled_call

from diffquant.runtime.kernels import triton as package
from diffquant.runtime.kernels.triton import few as measured
from diffquant.runtime.kernels.triton import launch

ROOT = Path(__file__).parents[2]
DECODERS = {**blocks_32.KERNELS, **blocks_k.KERNELS}
MAIN = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0")


def run(script, *arguments):
    """The JSON that a script writes, run by Triton's interpreter."""
    inherited = [path for path in sys.path if path]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(inherited)}
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(run(Path(__file__).with_name("candidates_interpreter.py")))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_references_bits(name, interpreted):
    assert interpreted["decoders"][name] == dict.fromkeys(("float32", "float16", "odd scales"), "")


def test_few_rows_are_as_decoded_and_multiplied(interpreted):
    """float32 sums in another order, and one rounding to float16."""
    limits = {"float32": 2**-20, "float16": 2**-10}
    assert {*gpu_few.FEW_FORMATS} <= interpreted["few"].keys()
    for name, worst in interpreted["few"].items():
        assert worst != "not served", name
        assert worst.get("float32", 1) < limits["float32"], name
        assert all(gap < limits[kind] for kind, gap in worst.items()), (name, worst)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Compiled here and now, whatever the user's cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("name", ["q6_k", "nf4"])
def test_few_rows_decode_each_weight_once_and_fit_small_cards(
    name, count, capability, cache, monkeypatch
):
    """A warp that decodes what another one has would round more weights than its share."""
    x, shape = torch.zeros(count, 1024, dtype=torch.bfloat16), (64, 1024)
    parts = random_parts(name, shape)
    found = compiled_call(
        monkeypatch,
        few,
        lambda: few.few_rows(x, name, parts, shape, None),
        capability=capability,
        of=2,
    )
    code, tile = found.asm["ptx"], few_tiles.tile_for(few.family(name), count, 2)
    assert ("mma.sync" in code or "wgmma" in code) == (count > 1)
    assert found.metadata.shared <= 99 << 10
    rounded = 2 * code.count("cvt.rn.bf16x2.f32") + code.count("cvt.rn.bf16.f32")
    written = max(1, tile.n * max(16, count) // (32 * tile.warps))
    assert rounded <= tile.n * tile.k // (32 * tile.warps) + written


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "most"), [("q3_k", 0.6), ("q4_k", 0.7)])
def test_bytes_that_hold_bits_of_several_weights_are_read_once(
    name, most, capability, cache, monkeypatch
):
    """Loads for each weight, those of scales among them: twice as many where runs read alone."""
    shape = (16, 512)
    parts = random_parts(name, shape)
    found = compiled_call(
        monkeypatch,
        blocks,
        lambda: DECODERS[name](parts, shape, torch.bfloat16),
        capability=capability,
    )
    assert found.metadata.shared == 0
    tile = blocks.TILES.get(name, launch.Tile())
    assert found.asm["ptx"].count("ld.global") * 32 * tile.warps / tile.weights < most


def test_every_share_of_k_is_whole_steps_and_none_is_empty():
    for tile in (one for tiles in few_tiles.CANDIDATES.values() for one in tiles):
        for tiles, units, step in ((1, 24, 4), (48, 240, 2), (6000, 96, 8), (7, 5, 8)):
            share = tile.share(tiles, units, step)
            shares = -(-units // share)
            assert share % step == 0
            assert (shares - 1) * share < units <= shares * share
            assert shares == 1 or (tiles * shares <= tile.programs and shares <= 16)


def test_tiles_are_by_family_and_rows(monkeypatch):
    own = few_tiles.FewTile(32, 128, 2)
    monkeypatch.setitem(few_tiles.TILES, ("4x16", 16), own)
    assert few.family("q6_k") == few.family("q3_k") == "4x16"
    assert few_tiles.tile_for("4x16", 9, 2) == own
    assert own not in (few_tiles.tile_for("4x16", 17, 2), few_tiles.tile_for("flat", 9, 2))


def test_formats_that_are_faster_apart_are_not_served(monkeypatch):
    parts = random_parts("q4_k", (64, 1024))
    assert few.serves("q4_k", parts, (64, 1024))
    monkeypatch.setattr(few, "FORMATS_SERVED", few.FORMATS_SERVED - {"q4_k"})
    assert not few.serves("q4_k", parts, (64, 1024))


def test_a_layout_that_formats_does_not_describe_is_refused_and_not_timed():
    with pytest.raises(ValueError, match="q4_k: 6 bytes do not make"):
        DECODERS["q4_k"]({"weight": torch.zeros(2, 3, dtype=torch.uint8)}, (4, 256), torch.float16)


def test_candidates_serve_what_the_package_serves():
    assert few.FORMATS_SERVED == measured.FORMATS_SERVED
    assert set(MAIN) <= DECODERS.keys() <= package.KERNELS.keys()


def test_a_candidate_is_judged_by_the_packages_bits():
    own, other, alone = gpu_kernels.decoders(("q4_k", "nf4"), candidates=True)
    assert (own.name, other.name, alone.name) == ("q4_k", "q4_k candidate", "nf4")
    assert own.wanted is REFERENCE["q4_k"]
    assert (other.routine, other.wanted) == (DECODERS["q4_k"], own.routine)
    assert (own.tiles, other.tiles) == (launch.TILES, blocks.TILES)
    assert [one.name for one in gpu_kernels.decoders(("q4_k",), candidates=False)] == ["q4_k"]


class Clock:
    """Says 3 ms, then 2, and so on."""

    def __init__(self):
        self.said = itertools.cycle((3.0, 2.0))

    def ms(self, work):
        work()
        return next(self.said)


@pytest.mark.parametrize("wrong", [False, True], ids=["same bits", "other bits"])
def test_a_candidates_row_says_its_bits_and_its_time_to_the_measured(wrong, monkeypatch, capsys):
    def other(parts, shape, dtype):
        weight = REFERENCE["q4_k"](parts, shape, dtype)
        return -weight if wrong else weight

    shape = (4, 256)
    monkeypatch.setattr(gpu_kernels, "KERNELS", {"q4_k": REFERENCE["q4_k"]})
    monkeypatch.setattr(gpu_kernels, "CANDIDATES", {"q4_k": other})
    monkeypatch.setattr(gpu_kernels, "random_parts", random_parts)
    monkeypatch.setattr(gpu_kernels, "gemm_ms", lambda *_: 1.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # no bitsandbytes
    args = argparse.Namespace(formats=["q4_k"], shapes=[shape], tokens=1, candidates=True)
    own, row = gpu_kernels.rows(args, Clock(), 1.0)
    assert (own["format"], own["equal"], "to_measured" in own) == ("q4_k", True, False)
    assert (row["format"], row["equal"]) == ("q4_k candidate", not wrong)
    assert row["to_measured"] == pytest.approx(2 / 3)
    told = capsys.readouterr().out
    assert ("NOT EQUAL" in told, "x 0.67" in told) == (wrong, True)


def test_a_result_is_equal_if_it_is_the_float32_sum_rounded_once():
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = gpu_few.Few.of("q4_k", (16, 512), x)
    sums, magnitudes = product.sums
    good = sums.bfloat16()
    assert product.judged(good)["equal"]
    assert product.judged(good)["error"] < 2**-8
    for wrong in (float(sums[1, 2] + magnitudes[1, 2] / 200), float("nan")):
        bad = good.clone()
        bad[1, 2] = wrong
        assert not product.judged(bad)["equal"]


def test_kernels_are_compiled_with_and_without_shares_of_k():
    tiles = few_tiles.CANDIDATES[16]
    variants = [("q4_k", 16, tile) for tile in tiles]
    ahead = few_sweep.compiled_ahead(variants)
    assert len(ahead) == 2 * len({tile._replace(programs=0) for tile in tiles})
    shared = [tile.share(48, 480, 8) < 480 for _, _, tile in ahead]
    assert shared.count(True) == shared.count(False)


def benchmark(tmp_path, *arguments):
    file = tmp_path / "found.json"
    given = ("--tiny", "--parts", "few", "--candidates", "--formats", "nf4", "--few", "1")
    told = run(ROOT / "benchmarks" / "gpu_matmul.py", *given, *arguments, "--json", str(file))
    return told, json.loads(file.read_text())["rows"]


def test_the_benchmark_has_a_candidate_beside_the_measured_kernel(tmp_path):
    _, rows = benchmark(tmp_path, "--shapes", "48x64")
    assert [row["name"] for row in rows] == [
        "bf16 gemm, 1 rows", "nf4, 1 rows", "nf4, 1 rows, candidate",
    ]  # fmt: skip
    assert rows[1]["equal"]
    assert rows[2]["equal"]
    assert rows[2]["measured_x"] == pytest.approx(rows[2]["ms"] / rows[1]["ms"])


def test_the_sweep_is_of_candidates_and_names_the_fastest_way(tmp_path):
    told, rows = benchmark(tmp_path, "--shapes", "48x64", "--sweep")
    assert [row["tile"] for row in rows[:1]] == ["measured"]
    tried = few_sweep.tried("nf4", 1, tiny=True)
    assert [tuple(row["tile"]) for row in rows[1:]] == list(tried)
    assert all(len(row["x"]) == 1 for row in rows)
    assert "# nf4, 1 rows: " in told
    assert "    ('flat', 1): FewTile(" in told


@pytest.mark.parametrize("given", ["--parts layers", "--sweep --parts few,rows"])
def test_candidates_of_other_parts_are_a_usage_error(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_matmul.py", "--candidates", *given.split()])
    with pytest.raises(SystemExit) as refused:
        gpu_matmul.main()
    assert refused.value.code == 2
    assert "--candidates: " in capsys.readouterr().err
