"""A KeyboardInterrupt that Python throws away comes again."""

import subprocess
import sys

import pytest

PRESSED = """
import signal, sys, time, weakref
from diffquant.core.interrupts import ctrl_c, keep_interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
keep_interrupts(ctrl_c)
class Buffer: pass
try:
    weakref.finalize(Buffer(), signal.raise_signal, signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
sys.exit("lost")
"""
OTHERS = """
import sys, weakref
from diffquant.core.interrupts import ctrl_c, keep_interrupts
keep_interrupts(ctrl_c)
class Buffer: pass
weakref.finalize(Buffer(), lambda: 1 / 0)
"""
CHILD = """
import signal, sys, time, weakref
from diffquant.core.interrupts import keep_interrupts
from diffquant.publish.batch.child import _interrupt, _interrupt_again
signal.signal(signal.SIGTERM, _interrupt)
keep_interrupts(_interrupt_again)
class Buffer: pass
try:
    weakref.finalize(Buffer(), signal.raise_signal, signal.SIGTERM)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pass
except KeyboardInterrupt:
    sys.exit(130)
sys.exit("lost")
"""


def ran(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, text=True)


@pytest.mark.parametrize("code", [PRESSED, CHILD], ids=["ctrl-c", "a child told to end"])
def test_an_interrupt_inside_a_finalizer_is_raised_again(code):
    found = ran(code)
    assert found.returncode == 130, found.stderr
    assert found.stderr == ""


def test_other_errors_in_finalizers_are_told_as_before():
    found = ran(OTHERS)
    assert found.returncode == 0
    assert "ZeroDivisionError" in found.stderr
