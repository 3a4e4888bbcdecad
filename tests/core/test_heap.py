"""Freed pages are kept while streaming, and given back afterwards; the user's variables win."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import textwrap

import pytest

from diffquant.core import heap

GLIBC = platform.libc_ver()[0] == "glibc"

FAULTS = """
    import contextlib, resource, sys, threading
    import numpy as np
    from diffquant.core.heap import keep_freed_pages
    def work():
        for _ in range(100):  # as a chunk does: read, widen, decode
            arrays = [np.ones(1 << 20, np.float32) for _ in range(3)]
            del arrays
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        thread = threading.Thread(target=work)  # workers have heaps of their own
        thread.start()
        thread.join()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    plain = faults()
    with keep_freed_pages():
        kept = faults()
    print(plain, kept)
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc")
def test_pages_are_not_faulted_in_again_while_streaming():
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", textwrap.dedent(FAULTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the C library, which is not glibc itself here."""
    asked = []
    found = {"mallopt": lambda *a: asked.append(a) or 1, "malloc_trim": lambda *a: 1}
    monkeypatch.setattr(heap, "_call", found.get)
    monkeypatch.setattr(heap, "_settled", heap._AS_IT_WAS)
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_variables_of_the_user_win(calls, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    with heap.keep_freed_pages():
        assert [number for number, _ in calls] == [heap._MMAP.number]
    heap.give_back_freed_blocks()
    assert all(number == heap._MMAP.number for number, _ in calls)


def test_what_inference_set_is_in_force_again_after_a_conversion(calls):
    heap.give_back_freed_blocks()
    assert dict(calls)[heap._MMAP.number] == 4 << 20
    with heap.keep_freed_pages(), heap.keep_freed_pages():
        assert dict(calls)[heap._MMAP.number] == 32 << 20
    assert dict(calls)[heap._MMAP.number] == 4 << 20


def test_a_setting_made_meanwhile_waits_for_the_end(calls):
    with heap.keep_freed_pages():
        heap.give_back_freed_blocks()
        assert dict(calls)[heap._MMAP.number] == 32 << 20
    assert dict(calls)[heap._MMAP.number] == 4 << 20


def test_an_error_inside_restores_the_setting(calls):
    with contextlib.suppress(ValueError), heap.keep_freed_pages():
        raise ValueError
    assert dict(calls)[heap._TRIM.number] == heap._AS_IT_WAS[heap._TRIM]


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap._call("mallopt") is None
    with heap.keep_freed_pages():
        heap.give_back_freed_blocks()
