"""Triton decoders without a card: their numbers in Triton's interpreter, their code as compiled."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS as REFERENCE
from diffquant.runtime.kernels import best, table

pytest.importorskip("triton")

import triton
from triton_compiled import compiled

from diffquant.runtime.kernels import triton as fast
from diffquant.runtime.kernels.triton import launch

CASES = ("float32", "float16", "bfloat16", "odd scales")


@pytest.fixture(scope="module")
def interpreted():
    script = Path(__file__).with_name("triton_interpreter.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kernel_or_a_cast_for_every_format():
    assert FORMATS.keys() == fast.KERNELS.keys() | fast.CASTS
    assert not fast.KERNELS.keys() & fast.CASTS


@pytest.mark.parametrize("name", fast.KERNELS)
def test_numbers_are_the_references_bit_for_bit(name, interpreted):
    assert interpreted[name] == dict.fromkeys(CASES, "")


def test_unusual_layouts_are_served_too(interpreted):
    assert {case: what for case, what in interpreted["layouts"].items() if what} == {}


def test_parts_that_formats_does_not_describe_go_to_the_reference(monkeypatch):
    weight = torch.zeros(2, 3, dtype=torch.uint8)
    for name in fast.KERNELS:
        module = sys.modules[getattr(fast.KERNELS[name], "func", fast.KERNELS[name]).__module__]
        monkeypatch.setattr(module, "REFERENCE", {name: lambda *_: "the reference"})
        parts = {part.name: weight for part in FORMATS[name].parts}
        assert fast.KERNELS[name](parts, (4, 256), torch.float32) == "the reference", name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Compiled here and now, whatever the user's cache holds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["q4_1", "nf4_dq", "int8_convrot_16"])
def test_products_and_sums_are_not_fused(name, cache, monkeypatch):
    shape = (16, 512)
    found = compiled(monkeypatch, name, shape, torch.bfloat16).asm["ptx"]
    assert not re.search(r"\bfma\.", found)
    fused = compiled(monkeypatch, name, shape, torch.bfloat16, enable_fp_fusion=True).asm["ptx"]
    assert re.search(r"\bfma\.", fused)  # else the option would say nothing


@pytest.mark.parametrize("name", ["q4_k", "nf4", "fp8_e4m3_scaled"])
def test_weights_are_read_and_written_in_wide_pieces_and_stay_in_registers(
    name, cache, monkeypatch
):
    found = compiled(monkeypatch, name, (16, 512), torch.bfloat16)
    assert found.metadata.shared == 0
    assert re.search(r"st\.global\.v4\.b32", found.asm["ptx"])
    assert re.search(r"ld\.global\.(v2\.)?b32", found.asm["ptx"])
    assert "cvt.rn.bf16x2.f32" in found.asm["ptx"]  # nearest, ties to even


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "most"), [("q3_k", 0.6), ("q4_k", 0.7)])
def test_bytes_that_hold_bits_of_several_weights_are_read_once(
    name, most, capability, cache, monkeypatch
):
    """Loads for each weight, those of scales among them: twice as many where runs read alone."""
    found = compiled(monkeypatch, name, (16, 512), torch.bfloat16, capability=capability)
    assert found.metadata.shared == 0
    tile = launch.tile(name)
    assert found.asm["ptx"].count("ld.global") * 32 * tile.warps / tile.weights < most


@pytest.mark.parametrize(
    ("name", "most"), [("int8_convrot", 4), ("convrot_w4a4", 4), ("asym_w4a8_int8_64", 4)]
)
def test_rotated_weights_pass_through_shared_memory_once(name, most, cache, monkeypatch):
    """Bytes that are written there for each weight: 4 for a float32."""
    found = compiled(monkeypatch, name, (16, 1024), torch.bfloat16)
    stored = re.findall(r"st\.shared\.(?:v(\d)\.)?b(\d+)", found.asm["ptx"])
    nbytes = sum(int(count or 1) * int(bits) // 8 for count, bits in stored)
    tile = launch.tile(name)
    assert 0 < nbytes * 32 * tile.warps / tile.weights <= most


def test_rotated_groups_of_16_stay_in_registers(cache, monkeypatch):
    found = compiled(monkeypatch, "int8_convrot_16", (16, 512), torch.bfloat16)
    assert found.metadata.shared == 0
    assert re.search(r"st\.global\.v4\.b32", found.asm["ptx"])


@pytest.mark.parametrize("name", ["fp8_e4m3_rowwise", "q6_k", "int8_convrot", "asym_w4a8_int8"])
def test_oldest_cards_compile(name, cache, monkeypatch):
    assert compiled(monkeypatch, name, (16, 512), torch.float16, capability=80).asm


def test_a_format_may_have_a_tile_of_its_own(monkeypatch):
    monkeypatch.setitem(launch.TILES, "q8_0", launch.Tile(1024, 8))
    assert launch.tile("q8_0") == (1024, 8)
    assert launch.tile("q4_0") == launch.Tile()


@pytest.fixture
def fresh_table():
    table.best.cache_clear()
    table._loaded.cache_clear()
    yield
    table.best.cache_clear()
    table._loaded.cache_clear()


class Target:
    backend = "cuda"

    def __init__(self, arch):
        self.arch = arch


class Driver:
    """Triton's driver on a machine with one card of a capability, or with none."""

    def __init__(self, arch):
        self.arch = arch

    @property
    def active(self):
        if self.arch is None:
            raise RuntimeError("0 active drivers")
        return self

    def get_current_target(self):
        return Target(self.arch)


@pytest.mark.parametrize(
    ("arch", "name", "backend", "reason"),
    [
        (90, "q4_k", "triton", "one kernel"),
        (80, "iq2_xs", "triton", "one kernel"),
        (90, "fp8_e4m3", "torch", "do not know fp8_e4m3"),
        (75, "q4_k", "torch", "needs compute capability 8.0, this card has 7.5"),
        (None, "q4_k", "torch", "cannot reach a card (0 active drivers)"),
    ],
)
def test_cards_are_served_by_triton_where_it_runs(
    arch, name, backend, reason, fresh_table, monkeypatch
):
    monkeypatch.setattr(triton.runtime, "driver", Driver(arch))
    found = best(name, "cuda", torch.bfloat16)
    assert (found.backend, reason in found.reason) == (backend, True)
    assert found.kernel is (fast.KERNELS if backend == "triton" else REFERENCE)[name]


def test_without_triton_the_reference_serves(fresh_table, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffquant.runtime.kernels.triton", None)
    found = best("q8_0", "cuda", torch.bfloat16)
    assert (found.backend, "triton cannot be loaded" in found.reason) == ("torch", True)
