"""The sweep of products of few rows, small and interpreted: what it tries, and its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from diffquant.runtime.kernels.triton import few_tiles

ROOT = Path(__file__).parents[2]


def test_the_sweep_tries_the_packages_tiles_and_prints_its_tables(tmp_path):
    inherited = [path for path in sys.path if path]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(inherited)}
    file = tmp_path / "found.json"
    done = subprocess.run(
        [
            sys.executable, ROOT / "benchmarks" / "gpu_matmul.py", "--tiny", "--sweep",
            *("--parts", "few", "--formats", "nf4", "--few", "1", "--shapes", "48x64"),
            *("--json", str(file)),
        ],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    in_use = few_tiles.tile_for("flat", 1, 2)
    right = [tile for tile in few_tiles.CANDIDATES[1] if few_tiles.usable("flat", tile, 1, 2)]
    wanted = dict.fromkeys((in_use, *right[:2]))
    assert [tuple(row["tile"]) for row in rows] == list(wanted)
    assert all(len(row["x"]) == 1 for row in rows)
    assert "# nf4, 1 rows: " in done.stdout
    assert "    ('flat', 1): FewTile(" in done.stdout
    assert "LIMITS = {" in done.stdout
