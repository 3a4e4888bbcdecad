"""Products in 8 bits on a card, to the torch reference; run by `scripts/test --gpu`.

Imports only what that machine has. Codes, scales and int8 products are the reference's bit for bit;
fp8 products differ by the order of their sums, and on Hopper by its narrower accumulators.
"""

import pytest
import torch
from packed_parts import random_parts

from diffquant.quant.formats import FORMATS
from diffquant.runtime import low_bit
from diffquant.runtime.compute import Card, card_of, engine_for
from diffquant.runtime.kernels import KERNELS, decode, products
from diffquant.runtime.kernels import rows as reference
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytest.importorskip("triton")
from diffquant.runtime.kernels.triton import few, few_tiles, gemm, levels, rows

pytestmark = pytest.mark.gpu
KINDS = ("fp8", "int8")
CAPABILITY = card_of("cuda").capability
NO_FP8 = pytest.mark.skipif(CAPABILITY < 89, reason="this card multiplies no fp8")
PACKED = [one.name for one in FORMATS.values() if one.codec in ("convrot_w4a4", "asym_w4a8_int8")]


def normal(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def relative(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("columns", "rotation"), [(3072, 0), (1283, 0), (20000, 0), (3072, 256), (1280, 64), (48, 16)]
)
def test_codes_and_scales_are_the_references(kind, dtype, columns, rotation):
    x = normal(1031, columns, dtype=dtype)
    x[3], x[5, 7] = 0, float("nan")
    q, scale = rows.quantize_rows(x, kind, rotation=rotation)
    wanted_q, wanted = reference.quantize_rows(x.cpu(), kind, rotation=rotation)
    near = 2**-15 if rotation else 0.0  # rotated numbers keep 16 bits
    assert torch.allclose(scale.cpu().nan_to_num(-1), wanted.nan_to_num(-1), rtol=near, atol=0)
    good = wanted.isfinite()[:, 0]
    different = bits(q.cpu()[good]) != bits(wanted_q[good])
    assert float(different.float().mean()) <= (0.005 if rotation else 0)
    gap = (q.cpu()[good].float() - wanted_q[good].float()).abs()
    assert float(gap.max()) <= ((32 if kind == "fp8" else 1) if rotation else 0)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("shape", [(4608, 3072, 3072), (1031, 1040, 2064), (65, 48, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_products_are_exact(shape, dtype, descriptors):
    m, n, k = shape
    a = reference.quantize_rows(normal(m, k), "int8")
    b = reference.quantize_rows(normal(n, k, seed=1), "int8")
    bias = normal(n, seed=2)
    tile = gemm.tile_for(m, (n, k))._replace(descriptors=descriptors)
    found = gemm.multiply_rows(*a, *b, bias, dtype, tile=tile)
    assert torch.equal(found, reference.multiply_rows(*a, *b, bias, dtype))
    assert torch.equal(found, products.multiply_rows(*a, *b, bias, dtype))


@pytest.mark.parametrize("tile", gemm.CANDIDATES, ids=str)
def test_every_tile_of_the_sweep_gives_the_same(tile):
    a = reference.quantize_rows(normal(1000, 1040), "int8")
    b = reference.quantize_rows(normal(528, 1040, seed=1), "int8")
    try:
        found = gemm.multiply_rows(*a, *b, None, torch.bfloat16, tile=tile)
    except Exception as error:
        if "out of resource" in str(error):
            pytest.skip(f"too large for this card: {error}")
        raise
    assert torch.equal(found, reference.multiply_rows(*a, *b, None, torch.bfloat16))


def test_int_mm_is_exact_too():
    a = reference.quantize_rows(normal(128, 1024), "int8")
    b = reference.quantize_rows(normal(256, 1024, seed=1), "int8")
    given = (*a, *b, normal(256, seed=2), torch.bfloat16)
    assert torch.equal(products.int_mm(*given), reference.multiply_rows(*given))


@NO_FP8
@pytest.mark.parametrize("routine", ["torch._scaled_mm", "pointers", "descriptors"])
@pytest.mark.parametrize("one_scale", [False, True])
def test_fp8_products_are_the_references_to_narrow_sums(routine, one_scale):
    """Relative 0.004: bfloat16's rounding (0.0017), and sums of 14 bits on Hopper."""
    a = reference.quantize_rows(normal(1040, 3072), "fp8")
    b, b_scale = reference.quantize_rows(normal(1056, 3072, seed=1), "fp8")
    b_scale = b_scale.amax().reshape(()) if one_scale else b_scale
    given = (*a, b, b_scale, normal(1056, seed=2), torch.bfloat16)
    wanted = reference.multiply_rows(*given[:-1], torch.float32)
    if routine == "torch._scaled_mm":
        found = products.multiply_rows(*given)
    else:
        tile = gemm.tile_for(1040, (1056, 3072))._replace(descriptors=routine == "descriptors")
        found = gemm.multiply_rows(*given, tile=tile)
    assert relative(found, wanted) < 0.004


@pytest.mark.parametrize("name", PACKED)
def test_levels_are_the_references(name):
    parts = random_parts(name, (257, 1280))
    there = {key: part.cuda() for key, part in parts.items()}
    found = levels.levels(name, there, (257, 1280))
    assert torch.equal(found.cpu(), reference.levels(name, parts, (257, 1280)))


def finite_parts(name, shape):
    parts = random_parts(name, shape)
    for key, part in parts.items():
        if part.dtype.is_floating_point and part.dtype.itemsize == 1:
            parts[key] = part.float().nan_to_num(1, 1, 1).to(part.dtype)
    return {key: part.cuda() for key, part in parts.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(few.FORMATS_SERVED))
def test_few_rows_are_as_decoded_and_multiplied(name, dtype):
    """Float32 sums in another order: relative to the sums of magnitudes, one rounding at most."""
    shape = (1031, 1280)
    parts = finite_parts(name, shape)
    assert few.serves(name, parts, shape)
    weight = KERNELS[name](parts, shape, dtype).double()
    # one rounding of the result: 2**-9 for bfloat16, 2**-11 for float16
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-9, torch.float32: 2**-18}[dtype]
    least = 2**-25 if dtype == torch.float16 else 0  # half a step of its subnormal numbers
    for count in (1, 2, 5, 17, 64):
        x = normal(count, shape[1], dtype=dtype) * 0.01
        bias = normal(shape[0], dtype=dtype, seed=1) if count != 5 else None
        found = few.few_rows(x, name, parts, shape, bias).double()
        wanted = x.double() @ weight.t()
        wanted = wanted if bias is None else wanted + bias.double()
        within = wanted.abs() < 6e4 if dtype == torch.float16 else wanted.isfinite()
        sums = x.double().abs() @ weight.abs().t() + (1e-9 if bias is None else bias.double().abs())
        gap = (((found - wanted).abs() - least) / sums)[within]
        assert not gap.numel() or float(gap.max()) < limit, count


@pytest.mark.parametrize(
    ("rows", "tile"),
    [
        pytest.param(rows, tile, id=f"{rows}-{'-'.join(map(str, tile))}")
        for rows, tiles in few_tiles.CANDIDATES.items()
        for tile in dict.fromkeys(tile._replace(programs=0) for tile in tiles)
    ],
)
@pytest.mark.parametrize("name", ["q6_k", "q4_k", "nf4", "int8_rowwise"])
def test_few_rows_by_a_tile_of_the_sweep_are_the_same_and_repeat_bit_for_bit(name, rows, tile):
    if not few_tiles.usable(few.family(name), tile, rows, 2):
        pytest.skip("compiled wrongly, see few_tiles.usable")
    shape = (1031, 3072)
    parts, x = finite_parts(name, shape), normal(rows, 3072)
    wanted = x.double() @ KERNELS[name](parts, shape, torch.bfloat16).double().t()
    for one in few_tiles.CANDIDATES[rows]:
        if one._replace(programs=0) == tile:  # kernels with and without shares of K
            found = few.few_rows(x, name, parts, shape, None, tile=one)
            assert float((found.double() - wanted).norm() / wanted.norm()) < 2**-8, one
            assert torch.equal(found, few.few_rows(x, name, parts, shape, None, tile=one)), one


def layer_of(name, rows_=512, columns=1024):
    layer = QuantLinear(columns, rows_).cuda()
    layer.bias.data = normal(rows_, seed=5)
    shape = (rows_, columns)
    layer.bind(PackedWeight((Segment(name, shape, finite_parts(name, shape)),)))
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("fp8_e4m3_scaled", "fp8", marks=NO_FP8),
        pytest.param("q4_k", "fp8", marks=NO_FP8),
        pytest.param("nf4", "fp8", marks=NO_FP8),
        ("int8_rowwise", "int8"),
        ("int8_convrot", "int8"),
        ("q8_0", "int8"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch itself
def test_a_layer_multiplies_in_8_bits_eagerly_and_compiled(name, kind):
    layer, x = layer_of(name), normal(2, 100, 1024, seed=3)
    wanted, one = layer(x), layer(x[:1, :1])
    dtypes = engine_for(kind, card_of("cuda")).dtypes
    layer.product = low_bit.LowBitLayer(kind, "", dtypes)
    first, second, single = layer(x), layer(x), layer(x[:1, :1])
    assert layer.product.state == "on"
    assert torch.equal(first, second)
    assert 0 < relative(second, wanted) < (0.06 if kind == "fp8" else 0.02)
    assert relative(single, one) < 0.06  # a weight that was quantized again
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    # the compiler's divisions may be off by an ulp, so that a tie gets the other code
    assert relative(compiled(x), second) < 0.005
    assert relative(compiled(x[:1, :1]), single) < 0.005


def test_products_run_inside_cuda_graphs():
    layer, x = layer_of("int8_convrot"), normal(128, 1024)
    layer.product = low_bit.LowBitLayer("int8", "", (torch.bfloat16,))
    layer(x)
    wanted = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(x)
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)


def test_rows_beyond_2_gib_are_addressed():
    x = torch.zeros((1 << 17) + 3, 1 << 14, dtype=torch.bfloat16, device="cuda")
    x[-1] = normal(1 << 14)
    q, scale = rows.quantize_rows(x, "int8")
    wanted = reference.quantize_rows(x[-1:], "int8")
    assert torch.equal(q[-1:], wanted[0])
    assert torch.equal(scale[-1:], wanted[1])


def test_a_decoded_weight_and_few_rows_agree_in_bfloat16():
    parts, shape = finite_parts("q4_k", (256, 3072)), (256, 3072)
    x = normal(1, 3072)
    apart = torch.nn.functional.linear(x, decode("q4_k", parts, shape, torch.bfloat16))
    assert relative(few.few_rows(x, "q4_k", parts, shape, None), apart) < 2**-8


def test_the_table_knows_this_card():
    card = card_of("cuda")
    assert card == Card("cuda", CAPABILITY, "")
    assert engine_for("int8", card).name == "triton"
