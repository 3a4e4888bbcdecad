"""Damaged files end in a documented exit code: no traceback, no hang, no code run, little memory.

samples.py writes valid files, mutations.py and pickles.py damage them by seed, worker.py runs the
commands in a process with limits. A case that breaks a promise is told by its seed and index:
`python worker.py SAMPLES WORK SEED INDEX 1` repeats it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
HERE = Path(__file__).parent
PEAK_MIB = 400
# One attack, loaded by the standard library in a process of its own.
TRY_OUT = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import pickles
class Fixed:
    def choice(self, items): return items[0]
pickle.loads(b"\\x80\\x02" + pickles.attack(sys.argv[2], Fixed()) + b".")
"""


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    texts = [str(one) for one in arguments]
    return subprocess.run([sys.executable, *texts], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    made = run_python(HERE / "samples.py", folder)
    assert made.returncode == 0, made.stderr
    return folder


def fuzz(samples: Path, work: Path, *, seed: int, count: int) -> None:
    ran = run_python(HERE / "worker.py", samples, work, seed, 0, count)
    assert ran.returncode == 0, f"exit code {ran.returncode}: {ran.stderr}"  # negative: a signal
    *broken, summary = [json.loads(line) for line in ran.stdout.splitlines()]
    assert not broken, "\n\n".join(
        f"seed {seed}, case {one['index']} ({one['sample']}; {one['did']}): {one['why']}\n"
        f"{' '.join(one['ran'])}\n{one['text']}"
        for one in broken[:5]
    )
    assert summary["peak_mib"] < PEAK_MIB
    assert len(summary["codes"]) >= 4  # damage of all depths: accepted, refused, unsafe, unknown


def test_damaged_files_end_in_a_documented_exit_code(samples, tmp_path):
    fuzz(samples, tmp_path, seed=1, count=800)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_five_thousand_damaged_files(samples, tmp_path, seed):
    fuzz(samples, tmp_path, seed=seed, count=5000)


def test_the_attacks_would_run_code(tmp_path):
    """What the fuzz looks for does happen where a pickle is loaded without care."""
    canary = tmp_path / "canary"
    run_python("-c", TRY_OUT, HERE, canary)
    assert canary.exists()
