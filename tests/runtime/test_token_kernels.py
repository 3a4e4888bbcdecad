"""Kernels between matrix products: their numbers in Triton's interpreter, and where they serve."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffquant.runtime.kernels import tokens
from diffquant.runtime.models import attention

CASES = (
    "one stream",
    "two streams, batch",
    "torch's norms, tables of four",
    "tables that broadcast",
    "nine heads",
    "modulated",
    "modulated by token",
    "modulated, cut",
)


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("token_interpreter.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_give_what_torchs_operations_give(case, interpreted):
    assert interpreted.keys() == set(CASES)
    assert interpreted[case] < 4e-6  # float32, sums in another order


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_cards_with_wide_loads(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from triton_compiled import compiled_call

    from diffquant.runtime.kernels.triton import tokens as fast

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(1, 24, 32, 128, dtype=torch.bfloat16)
    tables = (torch.zeros(32, 64),) * 2
    wide = torch.zeros(1, 32, 3072, dtype=torch.bfloat16)
    row = wide[:, :1]
    for call in (
        lambda: fast.rotated_heads(x, x[0, 0, 0], tables, 1e-6, x),
        lambda: fast.modulated(wide, row, row, 1e-6),
    ):
        with monkeypatch.context() as patch:
            found = compiled_call(patch, fast, call, capability=capability)
        assert re.search(r"ld\.global\.v[24]\.b32", found.asm["ptx"])
        assert re.search(r"st\.global\.v[24]\.b32", found.asm["ptx"])


def test_a_processor_has_no_token_kernels():
    x = torch.zeros(1, 2, 4, 8)
    assert not tokens.serves(x)
    assert not tokens.rotated_heads(x, torch.ones(8), (x[0, 0, :, :4],) * 2, 1e-6, x)
    assert tokens.modulated(x[0], x[0, :1], x[0, :1], 1e-6) is None


def test_where_kernels_do_not_serve_the_models_own_operations_do(monkeypatch):
    q = torch.randn(1, 2, 3, 6)  # head width 6 is no power of two
    norm = attention.RmsNorm(6, 1e-6)
    positions = (torch.ones(3, 3), torch.zeros(3, 3))
    one = attention.Stream(q, q, q, norm, norm)
    wanted = attention.attend((one,), positions)
    monkeypatch.setattr(tokens, "serves", lambda _x: True)
    assert torch.equal(attention.attend((one,), positions), wanted)


def test_an_activation_is_written_behind_what_stands_before_it(monkeypatch):
    first, wide = torch.randn(2, 3, 4), torch.randn(2, 3, 9)
    assert tokens.gelu_behind(first, wide[..., 3:]) is None
    monkeypatch.setattr(tokens, "serves", lambda _x: True)
    found = tokens.gelu_behind(first, wide[..., 3:])
    gelu = torch.nn.functional.gelu(wide[..., 3:], approximate="tanh")
    assert torch.allclose(found, torch.cat((first, gelu), dim=-1), atol=1e-6)


def test_tables_of_the_same_positions_are_made_once_and_may_have_gradients_through_them():
    ids = torch.rand(5, 2)
    with torch.inference_mode():
        cos, _ = attention.rotary(ids, (4, 4), 100.0)
    again, _ = attention.rotary(ids.clone(), (4, 4), 100.0)
    assert again is cos
    assert not cos.is_inference()
    other, _ = attention.rotary(ids + 1, (4, 4), 100.0)
    assert not torch.equal(other, cos)


def test_a_gate_adds_what_it_lets_through():
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gate = torch.randn(2, 1, 4)
    assert torch.allclose(attention.gated(x, gate, y), x + gate * y, atol=1e-6)
