"""`doctor` on a screen and as JSON: widths, plain terminals, what is supposed, what is broken."""

import dataclasses
import json
import sys

import click
import pytest
from click.testing import CliRunner

import diffquant.runtime.doctor as room
from diffquant.cli.main import cli
from diffquant.cli.view_doctor import render_doctor
from diffquant.runtime.doctor import Diagnosis, Problem, examine
from diffquant.runtime.doctor.accelerators import Accelerator
from diffquant.runtime.doctor.machine import Disk, Memory
from diffquant.runtime.doctor.processor import Processor

GIB = 1 << 30
TITLES = (
    "Machine",
    "Devices, and what --dtype auto computes in",
    "Libraries",
    "Packed weights are decoded by",
    "Published models at native size: rung of memory, predicted peak",
)


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return examine(vram=8 * GIB, ram=16 * GIB)


@pytest.fixture
def doctor(command, diagnosis, monkeypatch):
    """The command, with changes to what is found."""

    def run(*args, **changes):
        found = dataclasses.replace(diagnosis, **changes)
        monkeypatch.setattr(room, "examine", lambda **_: found)
        return command("doctor", *args)

    return run


def test_a_supposed_gpu_fills_one_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ran = command("doctor", "--vram", "8GiB")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line for line in lines if line in TITLES] == list(TITLES)
    assert max(map(len, lines)) <= 80
    assert "on cuda, computing in bfloat16, in 8.00 GiB of device memory, as supposed" in ran.out
    (row,) = [line for line in lines if line.startswith("  Qwen-Image 1328")]
    assert row.count(" GiB") == 3


def test_a_table_that_is_too_wide_is_a_list(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("doctor", "--vram", "2GiB").out.splitlines()
    assert "  SDXL 1024, guided" in lines
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", ["10", "40", "60", "79", "80", "140"])
def test_screens_keep_to_their_width(doctor, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    room = max(int(columns), 40)
    for args in ((), ("-v",)):
        wide = [line for line in doctor(*args).out.splitlines() if len(line) > room]
        assert all(len(line.split()) <= 2 for line in wide), wide  # a name, a word that is not cut


def test_json_has_every_part_and_no_verdict_of_its_own(command):
    ran = command("doctor", "--json", "--vram", "8GiB", "--ram", "16GiB")
    assert (ran.code, ran.json["command"], ran.json["schema_version"]) == (0, "doctor", 1)
    result = ran.result
    assert list(result) == [field.name for field in dataclasses.fields(Diagnosis)]
    assert result["planned"] == {
        "device": "cuda",
        "dtype": "bfloat16",
        "budget": 8 * GIB,
        "ram": 16 * GIB,
        "supposed": True,
    }
    fit = result["families"][0]["types"][0]
    assert set(fit) >= {"type", "level", "decoder", "peak_nbytes", "fits", "stage", "decides"}
    assert all({"what", "do"} == set(one) for one in result["problems"])


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--device", "tpu"), "expected cpu, cuda or mps"),
        (("--device", "cpu", "--vram", "8GiB"), "use --ram"),
        (("--vram", "much"), "such as 8GiB"),
        (("--ram", "0"), "such as 8GiB"),
    ],
)
def test_wrong_questions_are_usage_errors(command, args, word):
    ran = command("doctor", *args)
    assert ran.code == 2
    assert word in ran.err


def test_details_name_every_format_and_what_decides(doctor):
    short, long = doctor().out, doctor("-v").out
    assert "q4_k_s" in short
    assert "iq2_xxs" not in short
    assert "iq2_xxs" in long
    assert "decided by denoise" in long or "decided by decode" in long


def test_what_does_not_fit_says_what_it_needs(command):
    ran = command("doctor", "--vram", "1GiB")
    assert ran.code == 0
    assert "needs " in ran.out
    assert "too little at native size for" in ran.out


def test_a_torch_that_does_not_load_is_said_and_the_exit_code_is_0(command, monkeypatch):
    real = __import__

    def broken(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libtorch.so: \x1b[31mcannot open")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", broken)
    ran = command("doctor", "--ram", "8GiB")
    assert ran.code == 0
    assert "torch does not load" in ran.out
    assert "cannot open" in ran.out
    assert "pip install --force-reinstall torch" in ran.out
    assert "SDXL 1024" in ran.out


def test_a_larger_machine_is_told_in_full(doctor, diagnosis, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    machine = dataclasses.replace(
        diagnosis.machine,
        processor=Processor("Xeon", 32, 64, 4.0, "affinity", ("AVX2", "AVX512_BF16")),
        memory=Memory(64 * GIB, 7 * GIB, 8 * GIB, 2 * GIB, GIB),
        disks=(Disk("HF_HOME", "/later", None, None),),
    )
    cards = dataclasses.replace(
        diagnosis.accelerators,
        found=(Accelerator("cuda:0", "Card", "9.0", 24 * GIB, 20 * GIB),),
        driver="580.1",
        built_for="CUDA 13.0",
        why_none={},
    )
    out = doctor(machine=machine, accelerators=cards).out
    assert "Xeon, 32 cores, 64 threads, 4 usable (affinity)" in out
    assert "AVX2, AVX512_BF16" in out
    assert "7.00 GiB of 64.00 GiB available, limited to 8.00 GiB by a control group" in out
    assert "HF_HOME /later does not exist yet" in out
    assert "Card, 20.00 GiB of 24.00 GiB free" in out
    assert "NVIDIA 580.1" in out
    assert "torch for CUDA 13.0" in out


def test_what_could_not_be_looked_at_is_unknown(doctor, diagnosis):
    machine = dataclasses.replace(diagnosis.machine, processor=None, memory=None, disks=())
    planned = dataclasses.replace(diagnosis.planned, budget=None)
    out = doctor(machine=machine, decoders=(), compute=(), planned=planned).out
    assert "memory        unknown" in out
    assert "whose memory is not known" in out


def test_problems_come_with_what_to_do(doctor):
    assert doctor(problems=()).out.endswith("No problems found\n")
    out = doctor(problems=(Problem("it is so", "do otherwise"),)).out
    assert out.endswith("Problems\n  ! it is so\n  > do otherwise\n")


@pytest.mark.parametrize("plain", [True, False])
def test_colour_is_left_out_under_no_color(plain, diagnosis, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")

    @click.command()
    def show() -> None:
        render_doctor(diagnosis)

    out = CliRunner().invoke(show, color=True).output
    assert ("\x1b[" in out) is not plain


def test_the_command_line_loads_torch_for_the_doctor_alone():
    import subprocess

    code = "import sys, diffquant.cli.doctor, diffquant.cli.main; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_output_is_one_json_object_even_when_a_library_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    ran = CliRunner().invoke(cli, ["doctor", "--json", "--vram", "8GiB"])
    result = json.loads(ran.stdout)["result"]
    assert result["machine"]["memory"] is None
    assert [one["what"] for one in result["broken"]] == ["psutil"] * 2
