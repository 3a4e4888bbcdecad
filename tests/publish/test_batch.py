"""A batch: what is done stays done, what is not is made, whatever happened in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import batch_works
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffquant.convert.jobs import run_job
from diffquant.convert.request import Request
from diffquant.core.errors import DiffquantError, ResourceError, UsageError
from diffquant.publish.batch import planning, run_batch
from diffquant.publish.batch import run as run_module
from diffquant.publish.batch.record import FOLDER, locked, read_record, record_path
from diffquant.quant.types import type_named

EXAMPLES = Path(__file__).parents[2] / "examples"
UNET = EXAMPLES / "sd15-shapes" / "unet" / "diffusion_pytorch_model.safetensors"
WORKS = Path(__file__).with_name("batch_works.py")
NAMES = ("unet-Q8_0.gguf", "unet-Q4_K_S.gguf", "unet_fp8_scaled.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What `quantize` writes: name -> bytes."""
    folder = tmp_path_factory.mktemp("whole")
    source = folder / "unet.safetensors"
    shutil.copy(UNET, source)
    found = {}
    for name, kind in zip(NAMES, ("q8_0", "q4_k_s", "fp8_scaled"), strict=True):
        out = folder / name
        run_job(source, out, Request(out.suffix[1:], type=type_named(kind)))
        found[name] = out.read_bytes()
    return found


@pytest.fixture(autouse=True)
def _one_process(monkeypatch, tmp_path):
    """Jobs run in this process: what a process of its own adds is test_batch_pool's."""
    monkeypatch.setattr(run_module, "run_pool", batch_works.inline)
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / ".cache"))


@pytest.fixture
def plan(tmp_path):
    """Write plan.toml beside unet.safetensors, with a [[model]] for each text."""
    shutil.copy(UNET, tmp_path / "unet.safetensors")

    def write(*models, output="out"):
        path = tmp_path / "plan.toml"
        rows = [f'[[model]]\nsource = "unet.safetensors"\n{text}\n' for text in models]
        path.write_text(f'output = "{output}"\n' + "".join(rows))
        return path

    return write


PASS = 'types = ["q8_0", "q4_k_s"]'
ONE = 'types = "fp8_scaled"'


def files(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


def results(report):
    return [row.result for row in report.outputs]


def states(report):
    return [row.state for row in report.outputs]


def test_outputs_are_those_of_quantize_and_are_made_once(plan, tmp_path, whole):
    path = plan(PASS, ONE)
    report = run_batch(path)
    assert (report.exit_code, results(report)) == (0, ["written"] * 3)
    assert files(tmp_path / "out") == whole
    assert [job.outputs for job in report.jobs] == [2, 1]
    before = {one: one.stat().st_ino for one in (tmp_path / "out").iterdir()}
    again = run_batch(path)
    assert (results(again), again.jobs, again.needed_nbytes) == (["done before"] * 3, (), 0)
    assert before == {one: one.stat().st_ino for one in (tmp_path / "out").iterdir()}
    assert [row.error for row in again.outputs] == [row.error for row in report.outputs]


@pytest.mark.parametrize(
    "point",
    ["record:1", "write:120", "commit:2", "digest:1", "record:4", "write:900"],
)
def test_killed_at_a_point_and_run_again_it_ends_with_the_same_bytes(
    plan, tmp_path, whole, point, monkeypatch
):
    path, out = plan(PASS, ONE), tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, WORKS, path, point], capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stdout + ran.stderr
    records = {name: read_record(record_path(out, name)) for name in whole}
    done = {name for name, one in records.items() if one is not None and one.done}
    before = {name: (out / name).stat().st_ino for name in done}
    made = []
    monkeypatch.setattr(batch_works.job_module, "convert", _counted(made))
    report = run_batch(path)
    assert files(out) == whole  # and no partial file
    assert {row.name for row in report.outputs if row.result == "done before"} == done
    assert set(made) == whole.keys() - done
    assert before == {name: (out / name).stat().st_ino for name in done}
    assert (point != "write:900") or done == set(NAMES[:2])


def _counted(made):
    plain = batch_works.job_module.convert

    def convert(settings, items, **options):
        made.extend(item.name for item in items)
        return plain(settings, items, **options)

    return convert


def test_one_output_continues_where_it_was_killed(plan, tmp_path, whole):
    path = plan(ONE)
    ran = subprocess.run([sys.executable, WORKS, path, "write:200"], check=False)
    assert ran.returncode == -signal.SIGKILL
    kept = tmp_path / "out" / f".{NAMES[2]}.resume.jsonl"
    assert kept.read_bytes().count(b"\n") > 5
    report = run_batch(path)
    assert states(report) == ["unfinished"]
    assert files(tmp_path / "out") == {NAMES[2]: whole[NAMES[2]]}


def test_what_was_kept_of_one_output_goes_when_it_is_made_with_others(plan, tmp_path, whole):
    subprocess.run([sys.executable, WORKS, plan('types = "q8_0"'), "write:200"], check=False)
    assert (tmp_path / "out" / f".{NAMES[0]}.resume").exists()
    report = run_batch(plan(PASS))
    assert states(report) == ["unfinished", "new"]
    assert files(tmp_path / "out") == {name: whole[name] for name in NAMES[:2]}
    assert not any("kept" in text for row in report.outputs for text in row.warnings)


def test_a_type_more_is_made_alone(plan, tmp_path):
    run_batch(plan('types = "q8_0"'))
    report = run_batch(plan(PASS))
    assert results(report) == ["done before", "written"]
    assert report.jobs[0].outputs == 1


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("option", "again: changed: exclude"),
        ("source", "again: changed: source, source files"),
        ("touch", "again: changed: source files"),
        ("damage", "again: its bytes are not what was written"),
        ("cut", "again: its bytes are not what was written"),
        ("remove", "again: it is gone"),
        ("record", "again: its record is damaged"),
        ("force", "again: --force"),
    ],
)
def test_what_does_not_fit_is_made_again_and_said(plan, tmp_path, whole, change, state):
    path, out, source = plan('types = "q8_0"'), tmp_path / "out", tmp_path / "unet.safetensors"
    run_batch(path)
    file = out / NAMES[0]
    if change == "option":
        path = plan('types = "q8_0"\nexclude = "attn1"')
    elif change == "source":
        raw = bytearray(source.read_bytes())
        raw[len(raw) // 2 :] = b"\x01\x2c" * (len(raw[len(raw) // 2 :]) // 2)
        source.write_bytes(raw[: source.stat().st_size])
    elif change == "touch":
        os.utime(source, ns=(1, 1))
    elif change == "damage":
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
    elif change == "cut":
        os.truncate(file, 1000)
    elif change == "remove":
        file.unlink()
    elif change == "record":
        record_path(out, NAMES[0]).write_text('{"schema": 1, "identity": [')
    report = run_batch(path, force=change == "force")
    assert (states(report), results(report)) == ([state], ["written"])
    assert (files(out)[NAMES[0]] == whole[NAMES[0]]) == (change not in ("option", "source"))
    assert results(run_batch(path)) == ["done before"]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"identity": {"source": 1}},
        {"nbytes": "many"},
        {"report": {"warnings": "x"}},
        {"report": {"error": "x"}},
        {"pictures": {"verdict": 3}},
    ],
)
def test_a_record_of_another_shape_is_damaged(plan, tmp_path, change):
    run_batch(plan('types = "q8_0"'))
    path = record_path(tmp_path / "out", NAMES[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_record(path).identity == {}


def test_a_file_that_is_no_batchs_is_not_replaced(plan, tmp_path):
    path, out = plan(PASS), tmp_path / "out"
    out.mkdir()
    (out / NAMES[1]).write_bytes(b"mine")
    with pytest.raises(DiffquantError, match="there already, and not made by this batch") as found:
        run_batch(path)
    assert found.value.exit_code == 2
    assert files(out) == {NAMES[1]: b"mine"}
    assert results(run_batch(path, force=True)) == ["written", "written"]


def test_a_job_that_fails_does_not_stop_the_others(plan, tmp_path, monkeypatch):
    plain = batch_works.job_module.convert

    def convert(settings, items, **options):
        if [one.label for one in settings.types] == ["q8_0", "q4_k_s"]:
            raise ResourceError("disk full")
        return plain(settings, items, **options)

    monkeypatch.setattr(batch_works.job_module, "convert", convert)
    path = plan(PASS, ONE)
    report = run_batch(path)
    assert results(report) == ["failed", "failed", "written"]
    assert (report.exit_code, report.outputs[0].message) == (6, "disk full")
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "run_pool", batch_works.inline)
    assert results(run_batch(path)) == ["written", "written", "done before"]


def test_a_failed_gate_is_told_again_by_every_run(plan):
    path = plan('types = "int8_tensor"')
    path.write_text(path.read_text().replace("unet.safetensors", str(EXAMPLES / "flux1-shapes")))
    for result in ("written", "done before"):
        report = run_batch(path)
        assert (report.exit_code, results(report)) == (3, [result])
        assert report.outputs[0].verdict == "fail"


def test_problems_of_all_models_are_told_before_any_work(plan, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no checkpoint")
    path = plan('types = "iq2_xs"', 'types = "q8_0"\ntarget = "comfyui"', ONE)
    path.write_text(path.read_text() + '[[model]]\nsource = "bad.safetensors"\ntypes = "q8_0"\n')
    with pytest.raises(DiffquantError) as found:
        run_batch(path)
    message = str(found.value)
    for part in ("[[model]] 1 (line 2): ", "importance matrix", "[[model]] 2 (line 5): "):
        assert part in message
    assert "[[model]] 4 (line 12): " in message
    assert "[[model]] 3" not in message
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_what_is_left_and_writes_nothing(plan, tmp_path):
    path = plan(PASS, ONE)
    report = run_batch(path, dry_run=True)
    assert results(report) == ["to do"] * 3
    assert report.needed_nbytes == report.nbytes == sum(row.nbytes for row in report.outputs)
    assert all(job.peak_nbytes > 1 << 20 for job in report.jobs)
    assert not (tmp_path / "out").exists()
    run_batch(plan(PASS))
    report = run_batch(plan(PASS, ONE), dry_run=True)
    assert results(report) == ["done", "done", "to do"]
    assert 0 < report.needed_nbytes < report.nbytes


def test_what_does_not_fit_the_disk_or_the_memory_is_refused_before_work(
    plan, tmp_path, monkeypatch
):
    path = plan(PASS)
    with pytest.raises(ResourceError, match="the batch has 8 MiB"):
        run_batch(path, memory_nbytes=8 << 20)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ResourceError, match="1000 bytes are free"):
            run_batch(path)
    assert not (tmp_path / "out").exists()


def test_two_batches_do_not_share_a_folder(plan, tmp_path):
    path = plan(PASS)
    lock = tmp_path / "out" / FOLDER / "lock"
    with locked(lock, "x"), pytest.raises(UsageError, match="another batch is at work on"):
        run_batch(path)
    assert results(run_batch(path)) == ["written", "written"]


def test_an_output_that_a_stopped_run_still_writes_is_waited_for(plan, tmp_path, monkeypatch):
    path = plan('types = "q8_0"')
    monkeypatch.setattr(batch_works.job_module, "_ORPHAN_S", 0.05)
    with locked(record_path(tmp_path / "out", NAMES[0]).with_suffix(".lock"), "x"):
        report = run_batch(path)
    assert (results(report), report.exit_code) == (["failed"], 2)
    assert "another batch is at work" in report.outputs[0].message


def test_targets_and_folders_are_outputs_too(plan, tmp_path):
    path = plan('types = "nf4"\ncontainer = "folder"', 'types = "q8_0"\ntargets = ["sdcpp"]')
    report = run_batch(path)
    assert results(report) == ["written", "written"]
    folder = tmp_path / "out" / "unet-nf4"
    assert folder.is_dir()
    assert results(run_batch(path)) == ["done before"] * 2
    weights = next(folder.rglob("*.safetensors"))
    weights.rename(weights.with_name("x.safetensors"))
    assert states(run_batch(path)) == ["again: its bytes are not what was written", "done"]


@pytest.fixture
def lora(tmp_path):
    config = json.loads(UNET.with_name("config.json").read_text())
    width = config["block_out_channels"][-1]
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{name}.lora_down.weight": np.full((2, width), 0.1, np.float32),
            f"{name}.lora_up.weight": np.full((width, 2), 0.1, np.float32),
        },
        tmp_path / "style.safetensors",
    )
    return tmp_path / "style.safetensors"


def test_a_lora_is_merged_and_its_strength_counts(plan, tmp_path, lora, whole):
    text = PASS + '\nlora = {{ file = "style.safetensors", weight = {} }}'
    run_batch(plan(text.format(0.5)))
    once = files(tmp_path / "out")
    assert all(once[name] != whole[name] for name in once)
    report = run_batch(plan(text.format(0.25)))
    assert states(report) == ["again: changed: lora"] * 2
    assert files(tmp_path / "out") != once
    os.utime(lora, ns=(1, 1))
    assert states(run_batch(plan(text.format(0.25)), dry_run=True)) == ["again: changed: lora"] * 2


def test_a_source_on_a_hub_is_read_there(plan, tmp_path, hub, whole):
    hub.add("me/unet", {"unet.safetensors": UNET})
    path = plan('types = "q8_0"')
    text = path.read_text().replace('"unet.safetensors"', '"hf://me/unet/unet.safetensors"')
    path.write_text(text)
    report = run_batch(path)
    assert results(report) == ["written"], report.outputs[0].message
    assert files(tmp_path / "out") == {NAMES[0]: whole[NAMES[0]]}
    assert results(run_batch(path)) == ["done before"]


@pytest.fixture
def judged(monkeypatch):
    """Stands for the runtime's comparison; the list tells what was compared."""
    from diffquant.runtime import compare

    calls = []

    def compared(candidate, against, settings, *, reference, progress):
        assert reference == "reference"
        if candidate.name == calls_fail[0]:
            raise ResourceError("no memory for pictures")
        calls.append((candidate.name, settings.device, settings.prompts))
        verdict = "fail" if candidate.name == NAMES[1] else "pass"
        return SimpleNamespace(verdict=verdict, psnr_db=31.5), None, ("a note",)

    calls_fail = [""]
    monkeypatch.setattr(compare, "make_reference", lambda *_, **__: "reference")
    monkeypatch.setattr(compare, "compare_pictures", compared)
    return calls, calls_fail


def test_pictures_are_compared_once_and_again_for_other_prompts_only(plan, tmp_path, judged):
    calls, failing = judged
    (tmp_path / "p.txt").write_text("a red circle\n")
    text = PASS + '\nverify = "image"'
    failing[0] = NAMES[1]
    report = run_batch(plan(text))
    assert results(report) == ["written", "failed"]
    assert (report.exit_code, report.outputs[1].message) == (6, "no memory for pictures")
    failing[0] = ""
    before = files(tmp_path / "out")
    inodes = [(tmp_path / "out" / name).stat().st_ino for name in before]
    report = run_batch(plan(text))
    assert states(report) == ["done", "pictures to be compared"]
    assert results(report) == ["done before", "compared"]
    assert (report.exit_code, report.outputs[1].verdict, report.outputs[1].psnr_db) == (
        3,
        "fail",
        31.5,
    )
    assert [name for name, *_ in calls] == list(NAMES[:2])
    assert run_batch(plan(text)).jobs == ()
    report = run_batch(plan(text + '\nprompts = "p.txt"'))
    assert results(report) == ["compared", "compared"]
    assert calls[-1][1:] == ("cpu", ("a red circle",))
    assert report.needed_nbytes == 0
    assert report.outputs[0].warnings[-1] == "a note"
    report = run_batch(plan(PASS))  # which asks for no pictures
    assert (report.exit_code, results(report)) == (0, ["done before"] * 2)
    assert report.outputs[1].psnr_db is None
    assert inodes == [(tmp_path / "out" / name).stat().st_ino for name in before]
