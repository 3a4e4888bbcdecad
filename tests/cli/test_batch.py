"""`diffquant batch`: what it shows, its exit codes, and a batch that is really interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

PAIR = '[[model]]\nsource = "unet.safetensors"\ntypes = ["q8_0", "f16"]\n'
NAMES = ["unet-Q8_0.gguf", "unet-F16.gguf"]


@pytest.fixture
def plan(tmp_path, unet):
    shutil.copy(unet, tmp_path / "unet.safetensors")

    def write(text=PAIR):
        path = tmp_path / "plan.toml"
        path.write_text(f'output = "out"\n{text}')
        return path

    return write


def test_a_dry_run_a_run_and_a_run_again(command, plan, tmp_path):
    path = plan()
    ran = command("batch", path, "--dry-run", "--jobs", "3")
    assert (ran.code, ran.err) == (0, "")
    assert f"2 outputs in {tmp_path / 'out'}: 2 to do" in ran.out
    assert "[[model]] 1 (line 2) unet" in ran.out
    assert "3 processes" not in ran.out  # one job needs one
    ran = command("batch", path)
    assert ran.code == 0
    assert f"2 outputs in {tmp_path / 'out'}: 2 written" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if line.endswith(".gguf")]
    assert [(row[0], row[-1]) for row in rows] == [("q8_0", NAMES[0]), ("f16", NAMES[1])]
    assert all("pass" in row for row in rows)
    assert "[[model]] 1 (line 2) unet: " in ran.err
    (tmp_path / "out" / NAMES[1]).unlink()
    result = command("batch", path, "--json", "--dry-run").result
    assert [row["state"] for row in result["outputs"]] == ["done", "again: it is gone"]
    assert f"{NAMES[1]}: again: it is gone" in command("batch", path, "--dry-run").out


@pytest.mark.parametrize(
    ("text", "options", "code", "told"),
    [
        ("", (), 2, "expected [[model]] tables"),
        (PAIR + "pure = 1\n", (), 2, "[[model]] 1 (line 2): `pure`: expected true or false"),
        (PAIR, ("--memory", "1MiB"), 6, "the batch has 1 MiB"),
        (PAIR, ("--memory", "much"), 2, "--memory much: expected an amount"),
        ('[[model]]\nsource = "plan.toml"\ntypes = "q8_0"\n', (), 4, "[[model]] 1 (line 2): "),
        ("x = [1", (), 1, "plan.toml: not TOML: "),
        ('[[model]]\n"\\u001b[31m" = 1', (), 2, r"unknown key '\x1b[31m'"),
    ],
)
def test_what_cannot_be_done_has_its_exit_code(command, plan, tmp_path, text, options, code, told):
    ran = command("batch", plan(text), *options)
    assert (ran.code, ran.out) == (code, "")
    assert told in ran.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_a_run_refuses(command, plan):
    path = plan()
    path.write_text(path.read_text().replace('"out"', '"no/out"'))
    for flags in ((), ("--dry-run",)):
        ran = command("batch", path, *flags)
        assert (ran.code, "does not exist, create it first" in ran.err) == (2, True)


def test_a_failed_gate_is_three_and_names_the_output(command, plan, examples):
    text = f'[[model]]\nsource = "{examples / "flux1-shapes"}"\ntypes = "int8_tensor"\n'
    ran = command("batch", plan(text), "--json")
    assert (ran.code, ran.json["ok"]) == (3, False)
    assert ran.json["result"]["outputs"][0]["verdict"] == "fail"
    assert "verification failed: do not publish it" in ran.err


def test_a_job_that_fails_is_told_once_with_its_outputs(command, plan, tmp_path):
    path = plan()
    command("batch", path)
    (tmp_path / "out" / NAMES[0]).unlink()
    (tmp_path / "out" / NAMES[0]).mkdir()
    (tmp_path / "out" / NAMES[0] / "mine").touch()
    ran = command("batch", path, "--json")
    assert ran.code != 0
    assert [row["result"] for row in ran.json["result"]["outputs"]] == ["failed", "done before"]
    assert ran.err.count("is a folder, .gguf asks for a file") == 1
    assert (tmp_path / "out" / NAMES[0] / "mine").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_line_that_installs_it_is_told(command, plan, tmp_path):
    ran = command("batch", plan(), "--ray", "local")
    assert (ran.code, ran.out) == (2, "")
    assert "pip install 'diffquant[ray]'" in ran.err
    assert not (tmp_path / "out").exists()


SLOW = """
import signal, sys, time
import diffquant.io.atomic as atomic
plain = atomic.FlatSink.write
def slow(self, key, offset, data):  # in the child too: it imports this file
    plain(self, key, offset, data)
    time.sleep(0.02)
atomic.FlatSink.write = slow
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    from diffquant.cli import main
    main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
def test_stopped_and_run_again_it_goes_on(command, plan, tmp_path, kind):
    path, out = plan(), tmp_path / "out"
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, script, "batch", path, "--threads", "1"],
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as ran:
        until = time.monotonic() + 60
        while not list(out.glob(".unet*.partial-*")) and time.monotonic() < until:
            time.sleep(0.02)
        assert list(out.glob(".unet*.partial-*"))
        if kind == "SIGINT":
            os.killpg(ran.pid, signal.SIGINT)
            told = ran.stderr.read().decode()
            assert ran.wait(30) == 130
            assert "interrupted; what is finished is noted, the same command goes on" in told
            assert "Traceback" not in told
            assert [one.name for one in out.iterdir()] == [".diffquant-batch"]
        else:
            ran.kill()  # the parent alone: its child must end, and the next run waits for it
            ran.wait()
    again = command("batch", path, "--json").result
    assert [row["state"] for row in again["outputs"]] == ["unfinished", "unfinished"]
    assert sorted(one.name for one in out.iterdir() if one.is_file()) == sorted(NAMES)
    records = (out / ".diffquant-batch").glob("*.json")
    assert all(json.loads(one.read_text())["done"] for one in records)


def test_budgets_show_what_was_asked_for_and_where_errors_come_from(command, plan):
    text = '[[model]]\nsource = "unet.safetensors"\ntypes = [{ bpw = 11.5, free_kept = true }]\n'
    path = plan(text)
    ran = command("batch", path, "--dry-run")
    assert ran.code == 0, ran.err
    row = next(line for line in ran.out.splitlines() if line.endswith("unet-11.5bpw-freed.gguf"))
    assert row.split()[0] == "11.5bpw-freed"
    assert "unet-11.5bpw-freed.gguf: errors from weights alone" in ran.out
    found = command("batch", path, "--json").result["outputs"][0]
    assert found["result"] == "written"
    assert found["bits_per_weight"] <= 11.5
    assert found["notes"][0].startswith("errors from weights alone")
    path.write_text(path.read_text().replace("11.5", "1.5"))
    ran = command("batch", path)
    assert ran.code == 2
    told = " ".join(ran.err.split())
    assert "[[model]] 1 (line 2): --bpw 1.5 cannot be met: among q2_k" in told
    assert "bits per weight (for universal)" in told
