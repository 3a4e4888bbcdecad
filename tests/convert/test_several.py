"""Several outputs in one pass: the bytes of single runs, the source read once, all or none."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from diffquant.convert import chunk_work, cutting, sharing
from diffquant.convert.adapters import ROWS
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request
from diffquant.convert.several import Wanted, run_jobs
from diffquant.core.errors import QuantError, ResourceError, UsageError
from diffquant.io.reading import RandomFile
from diffquant.quant.types import TYPES, type_named

SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}
ALL = [(name, container) for name, row in TYPES.items() for container in row.dialects]
# Borders at 1, 64 and 128 rows, statistics in two passes, folders with names of their own.
CUT = [
    *(("q8_0", "gguf"), ("q4_0", "gguf"), ("fp8_scaled", "safetensors"), ("nf4", "safetensors")),
    *(("nf4_dq", "folder"), ("mxfp8", "safetensors"), ("int8_convrot", "safetensors")),
]
THREE = [("q8_0", "gguf"), ("q4_k_s", "gguf"), ("fp8_scaled", "safetensors")]


def wanted_in(folder, cases, **asked):
    return [
        Wanted(
            folder / f"{name}-{container}{SUFFIX[container]}",
            Request(container, type=type_named(name), **asked),
        )
        for name, container in cases
    ]


@pytest.fixture(scope="module")
def flux(examples, tmp_path_factory):
    """flux1-shapes in one file."""
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    run_job(examples / "flux1-shapes", path, Request("safetensors"))
    return path


@pytest.fixture
def asked(monkeypatch):
    """Bytes read per file."""
    found, lock, read = {}, threading.Lock(), RandomFile.read

    def counted(self, offset, nbytes):
        with lock:
            found[self.path] = found.get(self.path, 0) + nbytes
        return read(self, offset, nbytes)

    monkeypatch.setattr(RandomFile, "read", counted)
    return found


@pytest.mark.parametrize(
    ("model", "cases", "chunk", "workers"),
    [
        ("flux1-shapes", ALL, 1 << 20, 2),
        ("flux1-shapes", CUT, 1 << 14, 3),
        ("sd15-shapes", CUT, 1 << 15, 2),
    ],
)
def test_every_type_together_has_the_bytes_it_has_alone(
    examples, tmp_path, monkeypatch, matrix_for, digest, model, cases, chunk, workers
):
    source, matrix = examples / model, None
    if cases is ALL:
        with opened(source) as (_, logical, match):
            matrix = matrix_for("iq2_xs", logical, match)
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    wanted = wanted_in(tmp_path, cases)
    report = run_jobs(source, wanted, workers=workers, matrix=matrix)
    assert [job.output for job in report.outputs] == [str(one.path) for one in wanted]
    alone = tmp_path / "alone"
    alone.mkdir()
    for one, job in zip(wanted, report.outputs, strict=True):
        single = run_job(source, alone / one.path.name, one.request, workers=1, matrix=matrix)
        assert digest(alone / one.path.name) == digest(one.path), one.path.name
        assert job.nbytes == single.nbytes
        assert job.error == pytest.approx(single.error)
        assert job.verdict == single.verdict


@pytest.mark.parametrize("chunk", [1 << 20, 1 << 14])
def test_three_types_read_the_source_once(flux, tmp_path, monkeypatch, asked, chunk):
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    report = run_jobs(flux, wanted_in(tmp_path, THREE), workers=2)
    once = asked.pop(flux)
    assert report.read_nbytes <= once <= flux.stat().st_size * 1.02  # the header, and its samples
    for name, container in THREE:
        kind = Request(container, type=type_named(name))
        run_job(flux, tmp_path / f"alone{SUFFIX[container]}", kind, workers=2, force=True)
    assert asked[flux] > 2.5 * once


def test_what_cannot_be_held_is_read_again_and_counted(flux, tmp_path, monkeypatch, asked, digest):
    held = run_jobs(flux, wanted_in(tmp_path, THREE), workers=2)
    before, once = {one.name: digest(one) for one in tmp_path.iterdir()}, asked.pop(flux)
    monkeypatch.setattr(sharing, "HELD_NBYTES", 0)
    report = run_jobs(flux, wanted_in(tmp_path, THREE), workers=2, force=True)
    again = report.read_nbytes - held.read_nbytes
    assert asked[flux] - once == again > 0
    assert {one.name: digest(one) for one in tmp_path.iterdir()} == before


def test_a_dry_run_plans_all_and_writes_nothing(flux, tmp_path):
    planned = run_jobs(flux, wanted_in(tmp_path, THREE), dry_run=True, workers=2)
    assert list(tmp_path.iterdir()) == []
    made = run_jobs(flux, wanted_in(tmp_path, THREE), workers=2)
    assert (planned.read_nbytes, planned.peak_nbytes) == (made.read_nbytes, made.peak_nbytes)
    assert [job.nbytes for job in planned.outputs] == [job.nbytes for job in made.outputs]
    assert all(job.verdict == "pass" and job.error for job in made.outputs)


@dataclass
class Doubling:
    """Doubles a weight, and counts the rows it was asked for."""

    name: str = "twice"
    reach: str = ROWS
    rows: list[int] = field(default_factory=list)

    def apply(self, weight, rows):
        self.rows.append(rows[1] - rows[0])
        return weight * np.float32(2)


def test_adapters_are_applied_once_for_all_outputs(flux, tmp_path, digest):
    key, twice = "double_blocks.0.img_attn.qkv.weight", Doubling()
    cases = [("q8_0", "gguf"), ("q4_k_s", "gguf"), ("fp8_e4m3", "safetensors")]
    changes = {"denoiser": {key: (twice,)}}
    wanted = wanted_in(tmp_path, cases, changes=changes)
    report = run_jobs(flux, wanted, workers=2)
    row = next(one for one in report.outputs[0].tensors if one.key == key)
    assert sum(twice.rows) * 64 <= row.parameters  # no more rows than the weight has
    count = len(twice.rows)
    run_job(flux, tmp_path / "alone.gguf", wanted[0].request)
    assert digest(tmp_path / "alone.gguf") == digest(wanted[0].path)
    assert len(twice.rows) == 2 * count
    plain = tmp_path / "plain.gguf"
    run_job(flux, plain, Request("gguf", type=type_named("q8_0")))
    assert digest(plain) != digest(wanted[0].path)


def test_a_weight_that_one_type_cannot_hold_leaves_no_output(examples, tmp_path, load, write):
    tensors, _ = load(examples / "sd15-shapes" / "unet")
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    dtype, shape, _ = tensors[key]
    tensors = {name: (kind, data, size) for name, (kind, size, data) in tensors.items()}
    bad = np.full(tensors[key][1].size // 2, np.inf, np.float16).view(np.uint8)
    tensors[key] = (dtype, bad, shape)
    source = write(tmp_path / "bad.safetensors", tensors)
    out = tmp_path / "out"
    out.mkdir()
    cases = [("f16", "safetensors"), ("q8_0", "gguf")]
    with pytest.raises(QuantError, match="infinite"):
        run_jobs(source, wanted_in(out, cases), workers=2)
    assert list(out.iterdir()) == []


def test_an_interrupted_run_leaves_no_output_and_older_files_as_they_were(
    flux, tmp_path, monkeypatch
):
    wanted, calls, load = wanted_in(tmp_path, THREE), [], chunk_work.backend
    wanted[0].path.write_bytes(b"older")

    def interrupted(codec, operation):
        calls.append(codec)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return load(codec, operation)

    monkeypatch.setattr(chunk_work, "backend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(flux, wanted, workers=2, force=True)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"older"]


def test_outputs_must_fit_the_disk_together(flux, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    sizes = [job.nbytes for job in run_jobs(flux, wanted_in(tmp_path, THREE), dry_run=True).outputs]
    free = SimpleNamespace(free=max(sizes) + 10_000_000 // 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ResourceError, match="are free"):
        run_jobs(flux, wanted_in(tmp_path, THREE))
    assert list(tmp_path.iterdir()) == []


def test_outputs_may_not_replace_the_source_each_other_or_a_file(flux, tmp_path):
    request = Request("safetensors", type=type_named("fp8_scaled"))
    one, two = Wanted(tmp_path / "a.safetensors", request), Wanted(tmp_path / "b.gguf", request)
    with pytest.raises(UsageError, match="two outputs have this name"):
        run_jobs(flux, [one, one])
    with pytest.raises(UsageError, match="is the source itself"):
        run_jobs(flux, [one, Wanted(flux, request)], force=True)
    one.path.write_bytes(b"older")
    with pytest.raises(UsageError, match="use --force"):
        run_jobs(flux, [two, one])
    nested = Wanted(tmp_path / "a.safetensors" / "c.safetensors", request)
    with pytest.raises(UsageError, match="another output"):
        run_jobs(flux, [one, nested], force=True)


def test_outputs_that_read_the_source_differently_are_refused(flux, tmp_path):
    kind = type_named("q8_0")
    wanted = [
        Wanted(tmp_path / "a.gguf", Request("gguf", type=kind)),
        Wanted(tmp_path / "b.gguf", Request("gguf", type=kind, use_ema=True)),
    ]
    with pytest.raises(UsageError, match="one by one"):
        run_jobs(flux, wanted)


def test_warnings_are_said_once_or_with_their_type(flux, tmp_path):
    cases = [("q8_0", "gguf"), ("nf4", "safetensors")]
    report = run_jobs(flux, wanted_in(tmp_path, cases), dry_run=True)
    assert len(report.warnings) == len(set(report.warnings))
    assert any(text.startswith("nf4: written for forge") for text in report.warnings)


@pytest.fixture
def encoded(monkeypatch):
    """How often each format's codec was asked to encode which rows."""
    found, lock, backend = {}, threading.Lock(), chunk_work.backend

    def counted(codec, operation):
        made = backend(codec, operation)
        if operation != "encode":
            return made

        def encode(weight, *args, fmt, **more):
            rows = (fmt, weight.shape, weight.tobytes())
            with lock:
                found[rows] = found.get(rows, 0) + 1
            return made(weight, *args, fmt=fmt, **more)

        return encode

    monkeypatch.setattr(chunk_work, "backend", counted)
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_each_weight_is_encoded_once_per_format(
    flux, tmp_path, monkeypatch, encoded, matrix_for, weighted
):
    monkeypatch.setattr(cutting, "CHUNK", 1 << 17)
    matrix = None
    if weighted:
        with opened(flux) as (_, logical, match):
            matrix = matrix_for("q4_k_m", logical, match)
    names = ("q4_k_m", "q4_k_s", "q8_0", "q5_k_m", "q5_k_s")
    wanted = wanted_in(tmp_path, [(name, "gguf") for name in names])
    run_jobs(flux, wanted, workers=2, matrix=matrix, verify="load")
    wide = {rows: count for rows, count in encoded.items() if rows[0].startswith("q")}
    assert len({rows[0] for rows in wide}) >= 4  # the mixes differ
    assert set(wide.values()) == {1}
