import json
import time

import pytest
import torch
from click.testing import CliRunner

from diffquant.cli.main import cli
from diffquant.quant.formats import FORMATS
from diffquant.runtime.doctor import bench as module
from diffquant.runtime.doctor.bench import USUAL, bench

SIZE = (256, 256, 4)


class Told:
    """Progress that remembers."""

    def __init__(self):
        self.total, self.done, self.keys = 0, 0, []

    def start(self, _label, total, _unit):
        self.total = total

    def advance(self, amount, key=""):
        self.done += amount
        self.keys.append(key)

    def stop(self):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_COPIED_NBYTES", 1 << 16)
    monkeypatch.setattr(module, "_ROUNDS", 1)


def test_every_format_that_is_decoded_here_has_a_row(quick):
    told = Told()
    found = bench("cpu", "float32", every=True, size=SIZE, progress=told)
    assert [row.format for row in found.table] == [
        name for name, row in FORMATS.items() if not row.check(SIZE[:2])
    ]
    assert told.done == told.total == len(found.table) + 1
    assert {row.backend for row in found.table} == {"stored", "numba"}
    for row in found.table:
        assert row.layer_ms > 0
        assert (row.decode_ms is None) == (row.format == "f32")
        if FORMATS[row.format].block_size and len(FORMATS[row.format].parts) == 1:
            assert row.bits == pytest.approx(FORMATS[row.format].nbytes((256, 256)) / 8192)


def test_numbers_are_of_the_clock(quick, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    found = bench("cpu", "bfloat16", size=SIZE)
    assert [row.format for row in found.table] == sorted(USUAL, key=list(FORMATS).index)
    assert found.copy_gb_per_s == 2 * (1 << 16) / 1e9  # a second each
    assert found.tflops == 2 * 256 * 256 * 4 / 1e12
    row = next(row for row in found.table if row.format == "q8_0")
    assert (row.decode_ms, row.layer_ms, row.to_plain) == (1000, 1000, 1)
    assert row.gb_per_s == 256 * 256 * (34 / 32 + 2) / 1e9
    assert found.threads == torch.get_num_threads()


def test_the_command_adds_the_table(quick, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", module._Size(*SIZE))
    monkeypatch.setattr(module, "USUAL", ("q8_0", "nf4"))
    shown = CliRunner().invoke(cli, ["doctor", "--bench", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "Measured on cpu" in shown.output
    assert "x plain" in shown.output
    told = CliRunner().invoke(cli, ["doctor", "--bench", "--device", "cpu", "--json"])
    rows = json.loads(told.stdout)["result"]["bench"]["table"]
    assert [row["format"] for row in rows] == ["q8_0", "nf4"]
    plain = CliRunner().invoke(cli, ["doctor", "--device", "cpu", "--json"])
    assert json.loads(plain.stdout)["result"]["bench"] is None


def test_what_is_not_here_cannot_be_measured():
    for words in (("--vram", "8GiB"), ("--ram", "8GiB")):
        found = CliRunner().invoke(cli, ["doctor", "--bench", *words])
        assert found.exit_code == 2
        assert "--bench measures what is here" in found.stderr
