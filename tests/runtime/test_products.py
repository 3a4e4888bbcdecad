"""Products in 8 bits without a card: the reference, Triton's interpreter, operators in a graph."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_parts import random_parts

from diffquant.core.errors import UnsupportedShape
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS, products, rows
from diffquant.runtime.kernels.rotated import rotated

KINDS = ("fp8", "int8")
PACKED = [one.name for one in FORMATS.values() if one.codec in ("convrot_w4a4", "asym_w4a8_int8")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_reaches_the_top_and_is_off_by_half_a_step_at_most(kind):
    x = normal(16, 320) * torch.logspace(-8, 8, 16)[:, None]
    q, scale = rows.quantize_rows(x, kind)
    assert torch.equal(q.float().abs().amax(dim=1), torch.full((16,), rows.KINDS[kind].top))
    gap, decoded = (q.float() * scale - x).abs(), (x / scale).abs()
    # e4m3: three bits after the leading one, and steps of 2**-9 below 2**-6
    step = 2.0 ** (decoded.log2().floor().clamp(min=-6) - 3) if kind == "fp8" else 1.0
    assert bool((gap <= scale * step * 0.5001).all())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_ordinary(kind):
    x = torch.zeros(4, 8)
    x[1, 2], x[2, 3], x[3] = float("nan"), float("inf"), 1e-44
    q, scale = rows.quantize_rows(x, kind)
    assert not q[0].float().any()
    assert scale[:, 0].isfinite().tolist() == [True, False, False, True]
    assert float(scale[3]) == rows.LEAST_SCALE
    b, b_scale = rows.quantize_rows(normal(3, 8), kind)
    y = rows.multiply_rows(q, scale, b, b_scale, torch.ones(3), torch.float32)
    assert torch.equal(y[0], torch.ones(3))
    assert bool(y[1:3].isnan().all())
    assert bool(y[3].isfinite().all())


def test_rows_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(UnsupportedShape, match="rows of 100 cannot be rotated in groups of 64"):
        rows.quantize_rows(normal(2, 100), "int8", rotation=64)


def test_rotating_both_sides_changes_no_product():
    x, weight = normal(9, 512), normal(7, 512, seed=1)
    assert relative(rotated(x, 256) @ rotated(weight, 256).T, x @ weight.T) < 1e-6


# Gaussian operands, 3072 long, both quantized per row. The steps of e4m3 are a sixteenth of the
# number, so each side's error is 0.026; of int8 an amax of 3.6 sigma over 127, uniform: 0.0082.
@pytest.mark.parametrize(("kind", "least", "most"), [("fp8", 0.033, 0.042), ("int8", 0.009, 0.014)])
def test_the_error_of_a_product_is_that_of_its_operands(kind, least, most):
    x, weight = normal(64, 3072), normal(48, 3072, seed=1)
    a, b = rows.quantize_rows(x, kind), rows.quantize_rows(weight, kind)
    y = rows.multiply_rows(*a, *b, None, torch.float32)
    assert least < relative(y, x @ weight.T) < most


@pytest.mark.parametrize("kind", KINDS)
def test_torch_itself_gives_the_references_products(kind):
    """torch._scaled_mm and torch._int_mm are the second opinion; bfloat16 results, as on a card."""
    a, b = (
        rows.quantize_rows(normal(48, 96), kind),
        rows.quantize_rows(normal(32, 96, seed=1), kind),
    )
    bias = normal(32, seed=2).bfloat16()
    routine = products.scaled_mm if kind == "fp8" else products.int_mm
    found = routine(*a, *b, bias, torch.bfloat16).float()
    wanted = rows.multiply_rows(*a, *b, bias, torch.float32)
    assert float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max()) < 2**-7


@pytest.mark.parametrize("name", PACKED)
def test_levels_times_their_scale_are_the_decoded_weight(name):
    row, shape = FORMATS[name], (6, 512)
    parts = random_parts(name, shape)
    if "s_rel" in parts:  # no NaN: as levels they are zeros
        parts["s_rel"] = parts["s_rel"].view(torch.uint8) & 0x77
    scale = parts["s_channel" if "s_channel" in parts else "scale"].float().reshape(-1, 1)
    found = rotated(rows.levels(name, parts, shape).float() * scale, row.rotation)
    wanted = KERNELS[name](parts, shape, torch.float32)
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("products_interpreter.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["rows", "long", "strided", "levels"])
def test_triton_gives_the_references_codes_and_scales(what, interpreted):
    assert interpreted[what]
    assert {case: said for case, said in interpreted[what].items() if said} == {}


def test_triton_gives_the_references_products(interpreted):
    """int8 exactly; fp8 to the order of float32 sums: 2**-20 of the sum of magnitudes."""
    for case, gap in interpreted["products"].items():
        assert gap == 0 if case.startswith("int8") else gap < 2**-20, case


def test_few_rows_are_as_decoded_and_multiplied(interpreted):
    """float32 sums in another order, and one rounding to float16."""
    limits = {"float32": 2**-20, "float16": 2**-10}
    main = {"q8_0", "q4_k", "q5_k", "q6_k", "q4_0", "fp8_e4m3_scaled", "int8_rowwise", "nf4"}
    assert main <= interpreted["few"].keys()
    for name, worst in interpreted["few"].items():
        assert worst != "not served", name
        assert worst.get("float32", 1) < limits["float32"], name
        assert all(gap < limits[kind] for kind, gap in worst.items()), (name, worst)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotation", [0, 64])
def test_operators_stay_in_one_graph(kind, rotation):
    weight = rows.quantize_rows(normal(32, 64), kind)

    def both(x):
        q, scale = products.quantize_rows(x * 2, kind, rotation=rotation)
        return products.multiply_rows(q, scale, *weight, None, torch.float32)

    x = normal(80, 64)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), both(x))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("quantize_rows", (normal(5, 64), "fp8", 0)),
        ("quantize_rows", (normal(5, 64), "int8", 64)),
        (
            "multiply_rows",
            (
                *rows.quantize_rows(normal(5, 64), "int8"),
                *rows.quantize_rows(normal(3, 64), "int8"),
                normal(3),
                torch.bfloat16,
            ),
        ),
    ],
)
def test_outlines_are_what_operators_return(name, args):
    operator = getattr(torch.ops.diffquant, name).default
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Kernels are compiled here and now, for cards that are not here."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("kind", "word"), [("int8", "s8"), ("fp8", "e4m3")])
def test_hopper_multiplies_with_its_own_instructions(kind, word, descriptors, cache, monkeypatch):
    from triton_compiled import compiled_call

    from diffquant.runtime.kernels.triton import gemm

    a, b = (rows.quantize_rows(torch.zeros(256, 512), kind) for _ in range(2))
    tile, bias = gemm.GemmTile(descriptors=descriptors), torch.zeros(256, dtype=torch.bfloat16)
    found = compiled_call(
        monkeypatch,
        gemm,
        lambda: gemm.multiply_rows(*a, *b, bias, torch.bfloat16, tile=tile),
        capability=90,
        direct=("_pointers", "_descriptors"),
    )
    assert re.search(rf"wgmma\.mma_async\.\S*\.{word}\.{word}", found.asm["ptx"])
    assert ("cp.async.bulk.tensor" in found.asm["ptx"]) == descriptors
    assert found.metadata.shared <= 227 << 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotation", [0, 256])
def test_activations_are_quantized_on_the_oldest_cards(kind, rotation, cache, monkeypatch):
    from triton_compiled import compiled_call

    from diffquant.runtime.kernels.triton import rows as fast

    x = torch.zeros(4, 3072, dtype=torch.bfloat16)
    found = compiled_call(
        monkeypatch,
        fast,
        lambda: fast.quantize_rows(x, kind, rotation=rotation),
        capability=80,
    )
    assert "div.rn.f32" in found.asm["ptx"]  # IEEE division, as the reference's
    assert ("mma.sync" in found.asm["ptx"]) == bool(rotation)
    assert rotation or not re.search(r"\bfma\.", found.asm["ptx"])
