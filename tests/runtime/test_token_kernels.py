"""Kernels between matrix products: their numbers in Triton's interpreter, and where they serve."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffquant.runtime.kernels import rows, tokens
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
    "gelu",
    "gelu behind",
    "gelu gated",
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
    assert interpreted.keys() == {*CASES, "rows"}
    assert interpreted[case] < 4e-6  # float32, sums in another order


def test_rows_are_those_of_what_comes_before(interpreted):
    """fp8 has steps of 32 at its top; codes differ where sums differ in their last bits."""
    assert len(interpreted["rows"]) == 20
    for case, (scale, different, gap) in interpreted["rows"].items():
        assert scale < 1e-5, case
        assert different < 0.002, case
        assert gap < (32.1 if "fp8" in case else 1.1), case


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
        lambda: fast.rotated_heads((x, x, x), (x[0, 0, 0],) * 2, tables, (1e-6, 1e-5), (x, x, x)),
        lambda: fast.gelu_behind(wide, wide),
        lambda: fast.gelu_gated(wide, wide),
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


def test_without_a_card_nothing_is_served_and_models_do_it_themselves():
    first, wide = torch.randn(2, 3, 4), torch.randn(2, 3, 9)
    assert tokens.gelu_behind(first, wide[..., 3:]) is None
    assert tokens.activated(wide, rows.RowKind("int8", 0)) is None
    assert tokens.modulated(wide, wide, wide, 1e-6, rows.RowKind("int8", 0)) is None


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
