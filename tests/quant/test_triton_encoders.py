"""Encoders for cards, without a card: their bytes in the interpreter, their code as compiled."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffquant.quant.backends import BACKENDS, backend
from diffquant.quant.formats import FORMATS

pytest.importorskip("triton")

from compiled_encoders import compiled

CODECS = [codec for codec, _, device in BACKENDS if device == "cuda"]
NAMES = [name for name, row in FORMATS.items() if row.codec in CODECS]
UNDIVIDED = ("mxfp4",)  # its scales are powers of two


def interpret(*arguments, script="encoders_interpreter.py"):
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted():
    return interpret()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_cpus(name, interpreted):
    assert interpreted[name] == {}


@pytest.mark.slow
def test_bytes_of_every_case_are_the_cpus():
    assert interpret("all") == {name: {} for name in NAMES}


def test_scales_are_the_cpus_near_every_power_of_two():
    found = interpret(script="scale_bits.py")
    assert len(found) == 4
    assert not any(found.values()), found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Compiled here and now, whatever the user's cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


# An approximation, a subnormal taken for zero, a product and sum rounded as one.
INEXACT = re.compile(r"\S*(?:approx|\.full|\.ftz|\bfma\.)\S*")


@pytest.mark.parametrize(
    "codec",
    [
        "q5_1",
        "q6_k",
        "nf4",
        pytest.param("q4_k", marks=pytest.mark.slow),
        "convrot_w4a4._rows",
        "asym_w4a8_int8._fit",
        "asym_w4a8_int8._codes",
        "q3_k._search",
        "q3_k._fit",
        pytest.param("q3_k._finish", marks=pytest.mark.slow),
        "mxfp4",
        "mxfp8",
        "nvfp4_comfy",
        "fp4_bnb",
        "double_quant._again",
    ],
)
def test_arithmetic_is_exact_on_a_card(codec, cache, monkeypatch):
    weigh = {"importance": torch.ones(512)} if codec.startswith("q3_k.") else {}
    found = compiled(monkeypatch, codec, torch.zeros(16, 512), **weigh).asm["ptx"]
    assert ("div.rn.f32" in found) == (codec not in UNDIVIDED)
    assert not INEXACT.findall(found)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "kernel",
    [
        "iq2_s._prepare",
        "iq2_xxs._fit",
        "iq3_xxs._try",
        "iq2_xxs._try",
        "iq3_s._best",
        "iq2_xs._place",
        "iq3_s._store",
    ],
)
def test_kernels_of_grid_searches_are_exact_on_a_card(kernel, capability, cache, monkeypatch):
    found = compiled(monkeypatch, kernel, torch.zeros(16, 512), capability=capability)
    assert "div.rn.f32" in found.asm["ptx"]
    assert not INEXACT.findall(found.asm["ptx"])


@pytest.mark.parametrize("codec", ["mxfp8", "nvfp4_comfy"])
def test_kernels_compile_for_cards_without_8_bit_floats(codec, cache, monkeypatch):
    found = compiled(monkeypatch, codec, torch.zeros(16, 512), capability=80).asm["ptx"]
    assert ".target sm_80" in found


def test_a_fused_product_would_show(cache, monkeypatch):
    found = compiled(monkeypatch, "q5_1", torch.zeros(16, 512), enable_fp_fusion=True)
    assert re.search(r"\bfma\.", found.asm["ptx"])


def test_a_codec_without_an_encoder_for_cards_is_not_served():
    assert ("cast", "encode", "cuda") not in BACKENDS
    assert not [key for key in BACKENDS if key[2] == "cuda" and key[1] != "encode"]


@pytest.mark.parametrize("codec", CODECS)
def test_every_row_loads(codec):
    assert callable(backend(codec, "encode", "cuda"))
