"""--resume: interrupted anywhere and continued, an output ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from diffquant.convert import cutting, resume
from diffquant.convert.jobs import run_job
from diffquant.convert.journal import Found, Journal, read_journal
from diffquant.convert.plan import Request
from diffquant.core.errors import CheckpointError, QuantError, ResourceError, UsageError
from diffquant.io.atomic import FlatSink
from diffquant.io.kept import Claim, journal_path, kept_path
from diffquant.quant.types import type_named

Q8_0 = Request("gguf", type=type_named("q8_0"))
SAFE = Request("safetensors", type=type_named("fp8_scaled"), parts=("denoiser",))

SLOW = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    import diffquant.io.atomic as atomic
    from diffquant.cli import main
    plain = atomic.FlatSink.write
    def slow(self, key, offset, data):
        plain(self, key, offset, data)
        print(f"wrote {key}\\n", end="", flush=True)
        time.sleep(0.05)
    atomic.FlatSink.write = slow
    sys.argv = ["diffquant", *sys.argv[1:]]
    main()
"""


class Stop(Exception):
    """Stands for a process that ends here."""


@contextlib.contextmanager
def stopping_after(monkeypatch, writes, error=Stop):
    """Let so many writes to a sink through, then raise."""
    plain, seen, lock = FlatSink.write, [0], threading.Lock()

    def write(self, key, offset, data):
        with lock:
            seen[0] += 1
            if seen[0] > writes:
                raise error()
        plain(self, key, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(FlatSink, "write", write)
        yield seen


@pytest.fixture
def source(examples):
    return examples / "flux1-shapes"


@pytest.fixture(scope="module")
def whole(examples, tmp_path_factory):
    """What an uninterrupted run writes and reports."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for name, request in (("out.gguf", Q8_0), ("out.safetensors", SAFE)):
        report = run_job(examples / "flux1-shapes", folder / name, request)
        found[name] = (folder / name).read_bytes(), report
    return found


def interrupt(source, out, monkeypatch, *, writes=40, request=Q8_0, workers=1, **options):
    with stopping_after(monkeypatch, writes), pytest.raises(Stop):
        run_job(source, out, request, resume=True, workers=workers, **options)
    assert not out.exists()
    assert kept_path(out).exists()


def names(folder):
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.parametrize("name", ["out.gguf", "out.safetensors"])
@pytest.mark.parametrize("workers", [1, 3])
def test_stopped_again_and_again_it_ends_with_the_same_bytes_and_report(
    source, whole, tmp_path, monkeypatch, name, workers
):
    monkeypatch.setattr(cutting, "CHUNK", 1 << 15)
    out, request = tmp_path / name, Q8_0 if name.endswith("gguf") else SAFE
    run_job(source, out, request)
    plain = out.read_bytes()
    out.unlink()
    for _ in range(3):
        interrupt(source, out, monkeypatch, writes=15, request=request, workers=workers)
    report = run_job(source, out, request, resume=True, workers=workers)
    assert out.read_bytes() == plain == whole[name][0]
    assert names(tmp_path) == [name]
    assert 0 < report.continued < len(report.tensors)
    assert report.warnings == whole[name][1].warnings
    for again, once in zip(report.tensors, whole[name][1].tensors, strict=True):
        assert (again.error or 0) == pytest.approx(once.error or 0, rel=1e-6)
        assert dataclasses.replace(again, error=once.error) == once


def test_what_is_finished_is_not_converted_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    with stopping_after(monkeypatch, 10**9) as seen:
        run_job(source, out, Q8_0, resume=True, workers=1)
    total = seen[0]
    out.unlink()
    interrupt(source, out, monkeypatch, writes=total - 5)
    with stopping_after(monkeypatch, 10**9) as seen:
        run_job(source, out, Q8_0, resume=True, workers=1)
    assert seen[0] == 5


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_killed_process_is_continued_by_another(source, whole, tmp_path, sent, threads):
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", textwrap.dedent(SLOW), "quantize", str(source), "-o", str(out)]
    options = ["-t", "q8_0", "--resume", "--threads", threads]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        for _ in range(12):
            assert child.stdout.readline().startswith("wrote")
        with pytest.raises(UsageError, match="another process is writing it"):
            run_job(source, out, Q8_0, resume=True)
        child.send_signal(sent)
        errors = child.communicate()[1]
    assert names(tmp_path) == [kept_path(out).name, journal_path(out).name]
    if sent == signal.SIGINT:
        assert child.returncode == 130
        assert "weights are kept beside" in errors
        assert "--resume continues" in errors
    report = run_job(source, out, Q8_0, resume=True)
    assert report.continued >= 8
    assert out.read_bytes() == whole["out.gguf"][0]
    assert names(tmp_path) == ["out.gguf"]


def test_ctrl_c_before_anything_is_finished_keeps_nothing(source, tmp_path, monkeypatch):
    with (
        stopping_after(monkeypatch, 0, KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt, match="nothing was left behind"),
    ):
        run_job(source, tmp_path / "out.gguf", Q8_0, resume=True, workers=1)
    assert names(tmp_path) == []


def test_another_request_is_refused_and_told_what_differs(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    interrupt(source, out, monkeypatch)
    before = kept_path(out).read_bytes(), journal_path(out).read_bytes()
    other = Request("gguf", type=type_named("q4_0"))
    with pytest.raises(UsageError, match=r"type: kept 'q8_0', now 'q4_0'.*--force to start over"):
        run_job(source, out, other, resume=True)
    with pytest.raises(UsageError, match="verify: kept tensors, now load or none"):
        run_job(source, out, Q8_0, resume=True, verify="load")
    assert before == (kept_path(out).read_bytes(), journal_path(out).read_bytes())
    report = run_job(source, out, other, resume=True, force=True)
    assert report.continued == 0
    assert "started over" in report.warnings[-1]
    assert "q8_0" in report.warnings[-1]
    plain = run_job(source, tmp_path / "plain.gguf", other)
    assert plain.nbytes == report.nbytes
    assert out.read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_force_continues_what_matches(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with stopping_after(monkeypatch, 40), pytest.raises(Stop):
        run_job(source, out, Q8_0, resume=True, force=True, workers=1)
    assert out.read_bytes() == b"old"
    with pytest.raises(UsageError, match="exists; use --force"):
        run_job(source, out, Q8_0, resume=True)
    assert run_job(source, out, Q8_0, resume=True, force=True).continued > 20
    assert out.read_bytes() == whole["out.gguf"][0]


def test_a_source_that_changed_is_refused(source, tmp_path, monkeypatch):
    """Also where the fingerprint's samples are the same."""
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    out = tmp_path / "out.gguf"
    interrupt(copy, out, monkeypatch)
    file = next((copy / "transformer").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(1, 1))
    with pytest.raises(UsageError, match="source files: kept"):
        run_job(copy, out, Q8_0, resume=True)


@pytest.mark.parametrize("damage", ["flipped", "shortened", "empty", "longer"])
def test_damaged_bytes_are_found_and_converted_again(source, whole, tmp_path, monkeypatch, damage):
    out = tmp_path / "out.gguf"
    interrupt(source, out, monkeypatch)
    raw = bytearray(kept_path(out).read_bytes())
    with out_lines(out) as lines:
        finished = len(lines) - 1
    if damage == "flipped":
        raw[len(raw) // 4 :: 50_000] = bytes(len(raw[len(raw) // 4 :: 50_000]))
        raw[len(raw) // 8] ^= 255
    if damage == "shortened":
        del raw[len(raw) // 8 :]
    if damage == "empty":
        raw.clear()
    if damage == "longer":
        raw += b"x" * 1000
    kept_path(out).write_bytes(raw)
    report = run_job(source, out, Q8_0, resume=True)
    assert out.read_bytes() == whole["out.gguf"][0]
    if damage in ("flipped", "shortened"):
        assert 0 < report.continued < finished
        assert "in the kept file were damaged: done again" in report.warnings[-1]
    else:
        assert report.continued == (finished if damage == "longer" else 0)


@contextlib.contextmanager
def out_lines(out):
    """The journal's lines, written back on leaving."""
    lines = journal_path(out).read_bytes().splitlines(keepends=True)
    yield lines
    journal_path(out).write_bytes(b"".join(lines))


@pytest.mark.parametrize("damage", ["flipped", "torn", "garbage", "other step", "short digests"])
def test_damaged_journal_lines_cost_their_own_weight_only(
    source, whole, tmp_path, monkeypatch, damage
):
    out = tmp_path / "out.gguf"
    interrupt(source, out, monkeypatch)
    with out_lines(out) as lines:
        finished = len(lines) - 1
        assert finished > 20
        if damage == "flipped":
            lines[3] = lines[3].replace(b'"step":', b'"stop":')
        if damage == "torn":
            lines[-1] = lines[-1][:-20]
        if damage == "garbage":
            lines[5] = b"\xff\x00 not a line\n"
        if damage == "other step":
            lines[4] = resign(lines[4], step=10**6)
        if damage == "short digests":
            lines[4] = resign(lines[4], digests={})
    report = run_job(source, out, Q8_0, resume=True)
    assert report.continued == finished - 1
    assert out.read_bytes() == whole["out.gguf"][0]
    assert any("lines of the journal" in text for text in report.warnings) == (damage != "torn")


def resign(line, **changed):
    """A line with other content whose checksum is right."""
    from diffquant.convert.journal import _line

    return _line({**json.loads(line.partition(b" ")[2]), **changed})


def test_a_journal_without_a_readable_beginning_is_refused(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    interrupt(source, out, monkeypatch)
    with out_lines(out) as lines:
        lines[0] = b"x" + lines[0]
    with pytest.raises(UsageError, match=r"first line of its journal is damaged.*--force"):
        run_job(source, out, Q8_0, resume=True)
    assert run_job(source, out, Q8_0, resume=True, force=True).continued == 0
    assert out.read_bytes() == whole["out.gguf"][0]


def test_bytes_without_a_journal_are_not_trusted(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    kept_path(out).write_bytes(b"\x55" * len(whole["out.gguf"][0]))
    assert run_job(source, out, Q8_0, resume=True).continued == 0
    assert out.read_bytes() == whole["out.gguf"][0]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="calls of Linux")
def test_a_full_disk_keeps_what_is_finished(source, whole, tmp_path, monkeypatch, call):
    out = tmp_path / "out.gguf"
    plain, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(call)
        if len(calls) > (50 if call == "pwrite" else 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match="disk full"):
        run_job(source, out, Q8_0, resume=True, workers=1)
    monkeypatch.setattr(os, call, plain)
    assert not out.exists()
    assert kept_path(out).exists() == (call != "posix_fallocate")
    report = run_job(source, out, Q8_0, resume=True)
    assert (report.continued > 0) == (call == "pwrite")
    assert out.read_bytes() == whole["out.gguf"][0]
    assert names(tmp_path) == ["out.gguf"]


def test_a_weight_that_no_retry_can_convert_leaves_nothing(tmp_path, source, monkeypatch):
    with stopping_after(monkeypatch, 40, lambda: QuantError("no")), pytest.raises(QuantError):
        run_job(source, tmp_path / "out.gguf", Q8_0, resume=True, workers=1)
    assert names(tmp_path) == []


def test_without_the_flag_nothing_is_left_and_what_is_kept_is_told(
    source, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out.gguf"
    with (
        stopping_after(monkeypatch, 40, KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt, match=r"nothing was left behind \(with --resume"),
    ):
        run_job(source, out, Q8_0, workers=1)
    assert names(tmp_path) == []
    interrupt(source, out, monkeypatch)
    report = run_job(source, out, Q8_0)
    assert f"{kept_path(out)} is kept from an interrupted run" in report.warnings[-1]
    assert out.read_bytes() == whole["out.gguf"][0]
    assert kept_path(out).exists()


def test_folders_are_refused(source, tmp_path):
    with pytest.raises(UsageError, match="not folders"):
        run_job(source, tmp_path / "out", Request("folder"), resume=True)
    assert names(tmp_path) == []


def test_a_claim_is_exclusive_and_leaves_nothing(tmp_path):
    out = tmp_path / "out.gguf"
    with Claim(out), pytest.raises(UsageError, match="another process"):
        Claim(out)
    assert names(tmp_path) == []
    Claim(out).__exit__(None, None, None)  # free again


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="no O_NOFOLLOW")
def test_a_link_in_the_kept_files_place_is_not_followed(source, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    kept_path(tmp_path / "out.gguf").symlink_to(victim)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        run_job(source, tmp_path / "out.gguf", Q8_0, resume=True)
    assert victim.read_bytes() == b"mine"


def test_a_journal_that_cannot_be_written_stops_the_run(source, tmp_path, monkeypatch):
    def fail(self, lines):
        raise ResourceError("journal: disk full")

    monkeypatch.setattr(resume.Journal, "_append", fail)
    with pytest.raises(ResourceError, match="journal: disk full"):
        run_job(source, tmp_path / "out.gguf", Q8_0, resume=True)
    assert names(tmp_path) == []


def test_lines_are_written_after_the_bytes_they_speak_of(source, tmp_path):
    """`sync` runs before each line is appended."""
    from diffquant.convert.engine import StepResult

    path, order = tmp_path / "j", []
    journal = Journal(path, {"a": "b"}, Found(), lambda: order.append(path.read_bytes()))
    for index in range(3):
        journal.add(index, StepResult(f"w{index}", 0.5, {}))
    journal.close()
    lines = path.read_bytes().splitlines()
    assert len(lines) == 4
    assert order[0].count(b"\n") == 1
    assert b"w0" not in order[0]


def test_errors_and_digests_come_back_exactly(source, tmp_path, monkeypatch):
    from diffquant.convert.jobs import opened
    from diffquant.convert.plan import make_plan

    out = tmp_path / "out.gguf"
    interrupt(source, out, monkeypatch)
    with opened(source) as (_, logical, match):
        plan = make_plan(logical, match, Q8_0)
    found = read_journal(journal_path(out), plan)
    assert found.damaged == 0
    errors = [one.error for one in found.results.values() if one.error]
    assert errors
    assert all(isinstance(one, float) and np.isfinite(one) for one in errors)
