"""Plans with budgets and recipes: the bytes of `quantize`, made once, again where one changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import batch_works
import numpy as np
import pytest

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.allocation_choice import Choice, choice_from
from diffquant.convert.budgets import budget_of
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.output import fingerprint
from diffquant.convert.recipe_source import load_recipe
from diffquant.convert.recipes import recipe_of, render_recipe
from diffquant.convert.request import Request
from diffquant.convert.sensitivity import Sensitivity, keep_sensitivity, write_sensitivity
from diffquant.core.errors import DiffquantError
from diffquant.io.imatrix import read_imatrix, write_imatrix
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.publish.batch import job as job_module
from diffquant.publish.batch import run as run_module
from diffquant.publish.batch import run_batch
from diffquant.publish.batch.items import items_of
from diffquant.publish.batch.plan_file import read_plan_file
from diffquant.publish.batch.record import read_record, record_path
from diffquant.quant.types import type_named

FLUX = Path(__file__).parents[2] / "examples" / "flux1-shapes"
DENOISER = FLUX / "transformer" / "diffusion_pytorch_model.safetensors"
WORKS = Path(__file__).with_name("batch_works.py")
SIZE, BITS = '{ max_size = "2.9MB" }', "{ bpw = 6.5, free_kept = true }"
NAMES = ("flux-2.9MB.gguf", "flux-6.5bpw-freed.gguf", "flux-mix.gguf", "flux-Q8_0.gguf")


@pytest.fixture(autouse=True)
def _one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "run_pool", batch_works.inline)
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / ".cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What `quantize` writes, name -> bytes; and the recipe of the third."""
    folder = tmp_path_factory.mktemp("whole")
    os.environ["DIFFQUANT_CACHE"] = str(folder / ".cache")
    source = folder / "flux.safetensors"
    shutil.copy(DENOISER, source)
    found = {}
    budgets = (
        budget_of("--max-size", "2.9MB"),
        budget_of("--bpw", 6.5, free_kept=True),
    )
    for name, budget in zip(NAMES, budgets, strict=False):
        run_job(source, folder / name, allocate_bits(source, Request("gguf"), budget).request)
    report = run_job(
        source, Path("x.gguf"), Request("gguf", type=type_named("q4_k_m")), dry_run=True
    )
    rows = [(row.part, row.key, row.stored) for row in report.tensors]
    (folder / "mix.txt").write_text(render_recipe(recipe_of(report.architecture, "q4_k_s", rows)))
    recipe = load_recipe(folder / "mix.txt")
    run_job(source, folder / NAMES[2], Request("gguf", type=type_named("q4_k_s"), recipe=recipe))
    run_job(source, folder / NAMES[3], Request("gguf", type=type_named("q8_0")))
    for name in NAMES:
        found[name] = (folder / name).read_bytes()
    return found, (folder / "mix.txt").read_text()


@pytest.fixture
def plan(tmp_path, whole):
    """Write plan.toml beside flux.safetensors and mix.txt, one [[model]] with these types."""
    shutil.copy(DENOISER, tmp_path / "flux.safetensors")
    (tmp_path / "mix.txt").write_text(whole[1])

    def write(*types, more=""):
        path = tmp_path / "plan.toml"
        listed = ", ".join(types)
        path.write_text(
            f'output = "out"\n[[model]]\nsource = "flux.safetensors"\ntypes = [{listed}]\n{more}\n'
        )
        return path

    return write


ALL = (SIZE, BITS, '{ recipe = "mix.txt" }', '"q8_0"')


def files(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


def results(report):
    return [row.result for row in report.outputs]


def states(report):
    return [row.state for row in report.outputs]


def counted(monkeypatch):
    """How often formats are chosen."""
    calls = []
    plain = job_module.allocate_bits

    def counting(*args, **options):
        calls.append(args[2].text)
        return plain(*args, **options)

    monkeypatch.setattr(job_module, "allocate_bits", counting)
    return calls


def test_outputs_are_those_of_quantize_and_are_chosen_and_made_once(
    plan, tmp_path, whole, monkeypatch
):
    calls = counted(monkeypatch)
    path = plan(*ALL)
    report = run_batch(path)
    assert results(report) == ["written"] * 4, [row.message for row in report.outputs]
    assert [row.name for row in report.outputs] == list(NAMES)
    assert files(tmp_path / "out") == whole[0]
    assert calls == ["--max-size 2.9MB", "--bpw 6.5"]
    assert report.outputs[0].nbytes <= 2_900_000
    assert report.outputs[1].bits_per_weight <= 6.5
    assert "weights alone" in report.outputs[0].notes[0]
    again = run_batch(path)
    assert (results(again), again.jobs) == (["done before"] * 4, ())
    assert [row.notes for row in again.outputs] == [row.notes for row in report.outputs]
    assert len(calls) == 2


@pytest.mark.parametrize("point", ["record:1", "write:120", "commit:2", "record:6"])
def test_killed_and_run_again_it_ends_with_the_same_bytes(
    plan, tmp_path, whole, point, monkeypatch
):
    path, out = plan(*ALL), tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, WORKS, path, point], capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stdout + ran.stderr
    calls = counted(monkeypatch)
    begun = {name for name in NAMES if read_record(record_path(out, name)) is not None}
    done = {name for name in begun if read_record(record_path(out, name)).done}
    report = run_batch(path)
    assert files(out) == whole[0]
    assert {row.name for row in report.outputs if row.result == "done before"} == done
    # What was begun goes on with the formats that were chosen for it.
    assert len(calls) == len(set(NAMES[:2]) - begun)


def test_one_output_continues_where_it_was_killed(plan, tmp_path, whole, monkeypatch):
    path = plan(SIZE)
    ran = subprocess.run([sys.executable, WORKS, path, "commit:1"], check=False)
    assert ran.returncode == -signal.SIGKILL
    kept = tmp_path / "out" / f".{NAMES[0]}.resume.jsonl"
    assert kept.read_bytes().count(b"\n") > 1
    continued = []
    plain = job_module.run_job

    def noted(*args, **options):
        report = plain(*args, **options)
        continued.append(report.continued)
        return report

    monkeypatch.setattr(job_module, "run_job", noted)
    report = run_batch(path)
    assert states(report) == ["unfinished"]
    assert continued[0] == 0 < continued[1]  # planned, then continued
    assert files(tmp_path / "out") == {NAMES[0]: whole[0][NAMES[0]]}


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        ('{ max_size = "2.9MB" }', '{ max_size = "2.90MB" }', "new"),
        (SIZE, '{ max_size = "2.9MB", among = "q3_k,q6_k" }', "changed: formats to choose from"),
        (SIZE, '{ max_size = "2.9MB", sensitivity = "s.json" }', "changed: sensitivity"),
        ('{ recipe = "mix.txt" }', '{ recipe = "mix.txt", type = "q4_k_m" }', "recipe's type"),
        ('{ recipe = "mix.txt" }', "touch", "again: changed: recipe"),
        (SIZE, "measured", "again: changed: sensitivity"),
    ],
)
def test_a_changed_budget_is_made_again_and_said(plan, tmp_path, before, after, state):
    keys = [one.key for one in _tensors(DENOISER)]
    with opened(DENOISER) as (source, _, _match):
        mark = fingerprint(source)
    errors = {key: {"q3_k": 1.0, "q4_k": 0.5, "q8_0": 0.01} for key in keys}
    found = Sensitivity("flux1", "outputs", "u", mark, errors, {})
    write_sensitivity(tmp_path / "s.json", found)
    run_batch(plan(before))
    if after == "touch":
        os.utime(tmp_path / "mix.txt", ns=(1, 1))
        after = before
    elif after == "measured":
        keep_sensitivity(found)
        after = before
    report = run_batch(plan(after))
    assert results(report) == ["written"], report.outputs[0].message
    assert state in report.outputs[0].state
    assert results(run_batch(plan(after))) == ["done before"]


def _tensors(path):
    found = allocate_bits(path, Request("gguf"), budget_of("--max-size", "1GB"))
    return found.report.tensors


def test_a_dry_run_shows_sizes_and_writes_nothing(plan, tmp_path):
    report = run_batch(plan(*ALL), dry_run=True)
    assert results(report) == ["to do"] * 4
    assert [row.type for row in report.outputs] == ["2.9MB", "6.5bpw-freed", "mix", "q8_0"]
    assert 2_800_000 < report.outputs[0].nbytes <= 2_900_000
    assert 6.4 < report.outputs[1].bits_per_weight <= 6.5
    assert not (tmp_path / "out").exists()


def test_a_budget_that_cannot_be_met_is_told_before_any_work(plan, tmp_path):
    with pytest.raises(DiffquantError, match="--max-size 1MB cannot be met: among") as found:
        run_batch(plan('{ max_size = "1MB" }', '"q8_0"'))
    assert found.value.exit_code == 2
    assert "[[model]] 1 (line 2): " in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "more", "message"),
    [
        ('{ max_sise = "6GB" }', "", "no key 'max_sise', did you mean 'max_size'?"),
        ('{ max_size = "6XB" }', "", "--max-size 6XB: expected an amount"),
        ("{ max_size = 6 }", "", "a text of 1 to"),
        ("{ bpw = 33 }", "", "expected bits per weight"),
        ('{ bpw = "4" }', "", "a number for `bpw`"),
        ("{ bpw = true }", "", "a number for `bpw`"),
        ("{ bpw = nan }", "", "expected bits per weight"),
        ('{ bpw = 4, max_size = "6GB" }', "", "one of max_size, bpw, which all choose formats"),
        ('{ bpw = 4, recipe = "mix.txt" }', "", "which all choose formats"),
        ('{ bpw = 4, type = "q4_0" }', "", "type or bpw, which both choose formats"),
        ("{ free_kept = true }", "", "one of type, max_size, bpw, vram and recipe"),
        ('{ type = "q4_0", among = ["q4_k"] }', "", "`among` beside max_size, bpw, vram only"),
        ('{ recipe = "mix.txt", free_kept = true }', "", "`free_kept` beside"),
        ('{ bpw = 4, free_kept = "yes" }', "", "true or false"),
        ('{ bpw = 4, among = "," }', "", "formats for `among`"),
        ('{ bpw = 4, among = ["q4_q"] }', "", "did you mean 'q4_k'"),
        ('{ bpw = 4, among = ["nf4", "q4_k"] }', "", "no one file has them all"),
        ('{ bpw = 4, sensitivity = "no.json" }', "", "a file that exists; there is no"),
        ('{ recipe = "no.txt" }', "", "a file that exists; there is no"),
        ('{ recipe = "plan.toml" }', "", "expected something known"),
        ('{ type = "q4_q" }', "", "type 'q4_q'"),
        ("{ bpw = 6 }", "pure = true", "`pure` and --bpw 6 both choose formats"),
        ("{ bpw = 6 }, { bpw = 6 }", "", "each value once; 6bpw comes twice"),
        ('{ bpw = 6 }, { bpw = 6, among = ["q4_k"] }', "", "is an output of [[model]] 1"),
    ],
)
def test_wrong_entries_are_told_with_their_table(plan, tmp_path, entry, more, message):
    with pytest.raises(DiffquantError) as found:
        run_batch(plan(entry, more=more))
    assert message in str(found.value)
    assert "[[model]] 1 (line 2)" in str(found.value)
    assert found.value.exit_code == (4 if entry == '{ type = "q4_q" }' else 2)
    assert not (tmp_path / "out").exists()


def test_names_follow_what_was_asked_for_and_the_container(plan, tmp_path):
    path = plan(
        '{ max_size = "9 GB", among = "fp8_scaled,bf16" }',
        '{ max_size = "8GiB" }',
        '{ vram = "8GiB", free_kept = true }',
        '{ type = "q4_k_m" }',
    )
    (row,) = items_of(read_plan_file(path))
    assert [one.name for one in row] == [
        "flux_9GB.safetensors",
        "flux-8GiB.gguf",
        "flux-8GiB-vram-freed.gguf",
        "flux-Q4_K_M.gguf",
    ]


def test_an_entry_may_have_a_matrix_of_its_own_and_goes_in_a_pass_of_its_own(
    plan, tmp_path, whole, matrix_of
):
    matrix_of(tmp_path / "m.gguf")
    path = plan('{ max_size = "2.9MB", imatrix = "m.gguf" }', '"q8_0"', '"q4_0"')
    report = run_batch(path)
    assert results(report) == ["written"] * 3, [row.message for row in report.outputs]
    assert [row.name for row in report.outputs][:2] == [NAMES[0], NAMES[3]]
    assert [(job.outputs, job.label.partition(") ")[2]) for job in report.jobs] == [
        (1, "flux with m.gguf"),
        (2, "flux"),
    ]
    made = files(tmp_path / "out")
    assert made[NAMES[3]] == whole[0][NAMES[3]]
    source, out = tmp_path / "flux.safetensors", tmp_path / "alone.gguf"
    matrix = read_imatrix(tmp_path / "m.gguf")
    budget = budget_of("--max-size", "2.9MB")
    found = allocate_bits(source, Request("gguf"), budget, matrix=matrix)
    run_job(source, out, found.request, matrix=matrix)
    assert made[NAMES[0]] == out.read_bytes() != whole[0][NAMES[0]]
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    assert states(run_batch(path, dry_run=True)) == ["again: changed: imatrix", "done", "done"]


@pytest.fixture
def matrix_of():
    """Write an importance matrix of the denoiser, of uneven made-up values."""

    def write(path):
        rng = np.random.default_rng(0)
        with opened(DENOISER) as (_, _logical, match):
            shapes = {key: shape for part in match.parts for key, shape in part.shapes.items()}
        entries = {
            key: Entry(rng.lognormal(0, 2, (1, shape[1])) * 8, np.array([8]))
            for key, shape in shapes.items()
            if len(shape) == 2
        }
        write_imatrix(path, ImportanceMatrix(entries, chunk_count=8))

    return write


def test_a_choice_that_was_kept_is_read_as_hostile():
    row = Choice(
        "flux1", "denoiser", {"a.weight": "q4_k"}, {}, "4.50bpw", "q4_k_s", 14, "universal", "x"
    ).to_json()
    assert choice_from(json.loads(json.dumps(row))).formats == {"a.weight": "q4_k"}
    for change in (
        {"formats": {"a": "q4_q"}},
        {"formats": [1]},
        {"reasons": {"a": 1}},
        {"base": "nothing"},
        {"file_type": True},
        {"notes": "x"},
        {"notes": [1]},
        {"part": 1},
        {"more": 1},
    ):
        with pytest.raises(ValueError, match="no choice of formats"):
            choice_from({**row, **change})
    with pytest.raises(ValueError, match="no choice of formats"):
        choice_from([])


def test_a_damaged_choice_costs_its_own_output_only(plan, tmp_path, whole):
    run_batch(plan(*ALL))
    path = record_path(tmp_path / "out", NAMES[0])
    row = json.loads(path.read_text())
    row["choice"]["formats"] = {"x": "nothing"}
    path.write_text(json.dumps(row))
    report = run_batch(plan(*ALL))
    assert states(report) == ["again: its record is damaged", "done", "done", "done"]
    assert files(tmp_path / "out") == whole[0]
