"""Candidates of benchmarks/ on a card: decoders bit for bit the reference, products of few rows.

Run by `scripts/test --gpu`; imports only what that machine has.
"""

import pytest
import torch
from packed_parts import difference, random_parts

from diffquant.runtime.kernels import KERNELS

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytest.importorskip("triton")
from candidates import blocks_32, blocks_k, few, few_tiles

pytestmark = pytest.mark.gpu
DECODERS = {**blocks_32.KERNELS, **blocks_k.KERNELS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def on_card(parts):
    return {key: part.cuda() for key, part in parts.items()}


def finite_parts(name, shape):
    parts = random_parts(name, shape)
    for key, part in parts.items():
        if part.dtype.is_floating_point and part.dtype.itemsize == 1:
            parts[key] = part.float().nan_to_num(1, 1, 1).to(part.dtype)
    return on_card(parts)


@pytest.mark.parametrize("odd", [False, True], ids=["ordinary", "odd scales"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_references_bits(name, odd):
    shape = (1031, 1280)
    parts = random_parts(name, shape, odd=odd)
    wanted, there = KERNELS[name](parts, shape, torch.float32), on_card(parts)
    for dtype in DTYPES:
        found = DECODERS[name](there, shape, dtype).cpu()
        assert difference(found, wanted.to(dtype)) == "", dtype


@pytest.mark.parametrize("count", [1, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(few.FORMATS_SERVED))
def test_few_rows_are_as_decoded_and_multiplied(name, dtype, count):
    """Float32 sums in another order: relative to the sums of magnitudes, one rounding at most."""
    shape = (1031, 1280)
    parts = finite_parts(name, shape)
    assert few.serves(name, parts, shape)
    x = normal(count, shape[1], dtype=dtype) * 0.01
    weight = KERNELS[name](parts, shape, dtype).double()
    found = few.few_rows(x, name, parts, shape, None).double()
    wanted = x.double() @ weight.t()
    within = wanted.abs() < 6e4 if dtype == torch.float16 else wanted.isfinite()
    least = 2**-25 if dtype == torch.float16 else 0  # half a step of its subnormal numbers
    gap = (((found - wanted).abs() - least) / (x.double().abs() @ weight.abs().t() + 1e-9))[within]
    # one rounding of the result: 2**-9 for bfloat16, 2**-11 for float16
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-9, torch.float32: 2**-18}[dtype]
    assert not gap.numel() or float(gap.max()) < limit


@pytest.mark.parametrize("rows", sorted(few_tiles.CANDIDATES))
@pytest.mark.parametrize("name", ["q6_k", "nf4", "int8_rowwise"])
def test_every_tile_gives_the_same_and_repeats_bit_for_bit(name, rows):
    shape = (1031, 3072)
    parts, x = finite_parts(name, shape), normal(rows, 3072)
    wanted = x.double() @ KERNELS[name](parts, shape, torch.bfloat16).double().t()
    for tile in few_tiles.CANDIDATES[rows]:
        found = few.few_rows(x, name, parts, shape, None, tile=tile)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2**-8, tile
        assert torch.equal(found, few.few_rows(x, name, parts, shape, None, tile=tile)), tile
