"""Processes of a batch: which job starts next, how a child ends, and that none is left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import batch_works
import psutil
import pytest

from diffquant.publish.batch.child import Child
from diffquant.publish.batch.job import Job
from diffquant.publish.batch.pool import NOT_DONE, run_pool
from diffquant.publish.batch.settings import Settings
from diffquant.publish.batch.slots import Slots, default_processes, next_job, visible_gpus

MIB = 1 << 20
LINUX = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def job(label="x", folder=Path(), *, peak=10, pictures="", gpu="", threads=1):
    settings = Settings("source", "name", ("q8_0",))
    return Job(
        label, folder, settings, (), (), {}, pictures, threads, peak * MIB, nbytes=8, gpu=gpu
    )


def slots(processes=8, memory=100, gpus=()):
    return Slots(processes, memory * MIB, gpus)


def order(jobs, given):
    """Start as many as fit: (label, gpu) of each."""
    waiting, running = list(jobs), []
    while (chosen := next_job(waiting, running, given)) is not None:
        one = waiting.pop(chosen[0])
        running.append(job(one.label, peak=one.peak_nbytes // MIB, gpu=chosen[1]))
    return [(one.label, one.gpu) for one in running]


def test_no_more_start_than_there_are_processes():
    assert order([job("a"), job("b"), job("c")], slots(processes=2)) == [("a", ""), ("b", "")]


def test_memory_bounds_them_and_small_ones_pass_large_ones():
    jobs = [job("a", peak=70), job("b", peak=50), job("c", peak=30), job("d", peak=1)]
    assert order(jobs, slots(memory=100)) == [("a", ""), ("c", "")]


def test_one_alone_always_starts():
    assert order([job("a", peak=500), job("b")], slots(memory=100)) == [("a", "")]


def test_jobs_with_pictures_have_a_gpu_each_and_others_none():
    jobs = [job("a", pictures="p"), job("b"), job("c", pictures="p"), job("d", pictures="p")]
    assert order(jobs, slots(gpus=("0", "3"))) == [("a", "0"), ("b", ""), ("c", "3")]


def test_a_gpu_that_is_free_again_is_given_again():
    running = [job(gpu="0"), job(gpu="2")]
    given = slots(gpus=("0", "1", "2"))
    assert next_job([job(pictures="p")], running, given) == (0, "1")
    assert next_job([job(pictures="p")], [*running, job(gpu="1")], given) is None


def test_without_gpus_pictures_are_drawn_by_the_processor():
    assert order([job("a", pictures="p"), job("b")], slots()) == [("a", ""), ("b", "")]


@pytest.mark.parametrize(
    ("stated", "count", "found"),
    [
        (None, 2, ("0", "1")),
        ("", 0, ()),
        ("3, 5", 2, ("3", "5")),
        ("GPU-a1,GPU-b2", 1, ("GPU-a1",)),
    ],
)
def test_gpus_are_those_that_cuda_may_see(stated, count, found):
    assert visible_gpus(stated, count) == found


@pytest.mark.parametrize(
    ("jobs", "cores", "count"), [(9, 2, 1), (9, 16, 4), (2, 64, 2), (0, 64, 1), (9, 1, 1)]
)
def test_a_process_has_four_cores(jobs, cores, count):
    assert default_processes(jobs, cores) == count


class Bar:
    """Counts what a progress bar is told."""

    def __init__(self):
        self.total = self.done = 0

    def start(self, label, total, unit="B"):
        self.total = total

    def advance(self, amount, key=""):
        self.done += amount

    def stop(self):
        pass


def test_children_do_their_jobs_and_one_that_fails_or_crashes_stops_no_other(tmp_path):
    jobs = [
        job("fail-1", tmp_path),
        job("crash-1", tmp_path),
        job("note-1", tmp_path, pictures="p", threads=3),
        job("note-2", tmp_path),
    ]
    bar, told = Bar(), []
    found = run_pool(
        jobs,
        slots(processes=2, gpus=("7",)),
        progress=bar,
        ended=told.append,
        work=batch_works.by_label,
    )
    assert {one.job.label: one.code for one in found} == {
        "fail-1": 3,
        "crash-1": 1,
        "note-1": 0,
        "note-2": 0,
    }
    messages = {one.job.label: one.message for one in found}
    assert messages["fail-1"] == "a gate failed"
    assert "ended by SIGKILL: out of memory?" in messages["crash-1"]
    assert (tmp_path / "note-1").read_text() == "'7' '7' 3"
    assert (tmp_path / "note-2").read_text() == "'' '' 1"
    assert (bar.total, bar.done) == (32, 16)
    assert told == list(found)
    assert all(one.seconds > 0 for one in found)


@LINUX
def test_fail_fast_ends_those_at_work_and_starts_no_more(tmp_path):
    jobs = [job("wait-1", tmp_path), job("fail-1", tmp_path), job("note-1", tmp_path)]
    found = run_pool(jobs, slots(processes=2), fail_fast=True, work=batch_works.by_label)
    ends = {one.job.label: (one.code, one.message) for one in found}
    assert ends["fail-1"] == (3, "a gate failed")
    assert ends["wait-1"] == ends["note-1"] == (1, NOT_DONE)
    assert not (tmp_path / "note-1").exists()


@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.3, 0.5])
def test_a_child_that_is_told_to_end_while_it_starts_was_told_to_end(tmp_path, after_s):
    child = Child(job("wait-1", tmp_path), batch_works.by_label)
    time.sleep(after_s)
    child.stop()
    deadline = time.monotonic() + 20
    while not child.ended and time.monotonic() < deadline:
        child.poll()
        time.sleep(0.01)
    assert child.failure[0] == 130


SCRIPT = """
    import signal
    import sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    import batch_works
    import test_batch_pool as t
    from diffquant.publish.batch.pool import run_pool

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        jobs = [t.job(f"wait-{{n}}", Path(sys.argv[1])) for n in range(2)]
        try:
            run_pool(jobs, t.slots(processes=2), work=batch_works.by_label)
        except KeyboardInterrupt:
            sys.exit(130)
"""


@contextlib.contextmanager
def two_waiting(folder):
    """A process with two children at work; they are gone at the end, whatever happens."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(here=str(Path(__file__).parent))))
    command = [sys.executable, script, folder]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as parent:
        pids = []
        try:
            until = time.monotonic() + 60
            while len(pids) < 2 and time.monotonic() < until:
                time.sleep(0.02)
                pids = [int(one.name.split(".")[1]) for one in folder.glob("*.at-work")]
            assert len(pids) == 2
            yield parent, pids
        finally:
            for pid in (parent.pid, *pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def gone(pids, within_s=20):
    until = time.monotonic() + within_s
    while time.monotonic() < until and any(map(psutil.pid_exists, pids)):
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, pids))


@LINUX
def test_ctrl_c_ends_the_children_first_and_they_clean_up(tmp_path):
    with two_waiting(tmp_path) as (parent, pids):
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to children too
        assert parent.wait(30) == 130
        assert not any(map(psutil.pid_exists, pids))
        assert len(list(tmp_path.glob("*.cleaned"))) == 2
        assert b"Traceback" not in parent.stderr.read()


@LINUX
def test_children_of_a_killed_batch_end_by_themselves_and_clean_up(tmp_path):
    with two_waiting(tmp_path) as (parent, pids):
        parent.kill()
        assert gone(pids)
        assert len(list(tmp_path.glob("*.cleaned"))) == 2
