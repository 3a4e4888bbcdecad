"""What says that a card and the CPU disagree: figures, exit codes, time, and what stands in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_runs import Bench, Ran, Row, Side
from stand_ins import error_sums, ssim_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def row(tmp_path):
    sides = [Side("cpu", "cpu", tmp_path), Side("card", "cuda", tmp_path)]
    return Row(Bench(sides, until=0, limit_s=1, found={}, json=None), "row")


@pytest.mark.parametrize(
    ("cpu", "card", "agrees"),
    [
        (40.0, 40.4, True),
        (40.0, 40.6, False),
        (None, None, True),
        (None, 40.0, False),
        (float("nan"), 40.0, False),
    ],
)
def test_numbers_agree_within_what_is_stated(row, cpu, card, agrees):
    row.near("psnr", cpu, card, 0.5)
    assert row.agrees is agrees


def test_one_figure_is_enough_to_disagree(row):
    row.holds("bytes", "aa and bb", False)
    row.told("how", "by diffquant")
    assert not row.agrees


def test_a_failed_verdict_shows_its_problems_not_its_json():
    image = {"verdict": "fail", "problems": ["psnr 9 dB is below the gate of 25 dB"]}
    out = json.dumps({"result": {"load": {"problems": []}, "image": image}})
    assert Ran((), 3, 0.0, out, "warning: odd\n").last() == (
        "psnr 9 dB is below the gate of 25 dB\nwarning: odd"
    )


def run(*command):
    """A process of its own: what forks should have no threads."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


ROWS = """
import sys, time
from pathlib import Path
from command_runs import Bench, Side
sides = [Side("cpu", "cpu", Path(sys.argv[1]) / "cpu"), Side("card", "cpu", Path(sys.argv[1]))]
sides[0].folder.mkdir()
bench = Bench(sides, time.monotonic() + 60, 60, {}, Path(sys.argv[1]) / "found.json")
with bench.row("fails") as row:
    row.run(lambda s: ("convert", s.folder / "nowhere.gguf", "-o", s.folder / "x.gguf"))
    row.told("never", "reached")
with bench.row("refused") as row:
    row.run(lambda s: ("formats", "--no-such-option"), exits=2)
with bench.row("runs") as row:
    assert row.run(lambda s: ("formats", "--json"), fresh=True)[1].result
bench.limit_s = 0.01
with bench.row("slow") as row:
    row.run(lambda s: ("formats",))
bench.until = 0
with bench.row("late") as row:
    row.run(lambda s: ("formats",))
"""


def test_a_command_that_fails_is_shown_and_others_go_on(tmp_path):
    done = run("-c", ROWS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {one["name"]: one for one in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert {name: one["agrees"] for name, one in rows.items()} == {
        "fails": False, "refused": True, "runs": True, "slow": False, "late": False,
    }  # fmt: skip
    assert rows["fails"]["codes"] == [1, 1]
    assert rows["fails"]["trouble"].count("nowhere.gguf: no such file") == 2
    assert not rows["fails"]["figures"]
    assert "ended after" in rows["slow"]["trouble"]
    assert rows["late"]["trouble"] == "not run: no time is left"
    assert "| diffquant convert: " in done.stdout


@pytest.mark.slow
def test_the_cpu_agrees_with_itself_and_not_with_other_bytes(tmp_path):
    script = ROOT / "benchmarks" / "gpu_commands.py"
    asked = ("--device", "cpu", "--only", "quantize", "--json", tmp_path / "found.json")
    done = run(script, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 4
    other = "import gpu_commands as g; g.sha256 = lambda path: str(path); g.main()"
    done = run("-c", other, *asked)
    assert done.returncode == 1
    assert done.stdout.count("NOT bytes: ") == 5


def test_ssim_and_sums_are_those_of_the_libraries():
    from skimage.metrics import structural_similarity

    from diffquant.quant.codecs.numba import error_sums as compiled

    generator = np.random.default_rng(0)
    one = generator.random((40, 33, 3), np.float32)
    other = np.clip(one + generator.normal(0, 0.1, one.shape), 0, 1).astype(np.float32)
    wanted = structural_similarity(one, other, channel_axis=2, data_range=1.0)
    assert ssim_of(one, other, channel_axis=2, data_range=1.0) == pytest.approx(wanted, abs=1e-5)
    flat = one.reshape(-1), other.reshape(-1)
    assert error_sums(*flat) == pytest.approx(compiled.error_sums(*flat), rel=1e-12)
