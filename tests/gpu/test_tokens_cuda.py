"""Kernels between matrix products on a card, to the same operations by torch in float32."""

import pytest
import torch

from diffquant.runtime.kernels import tokens
from diffquant.runtime.models import attention

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytest.importorskip("diffquant.runtime.kernels.triton")

pytestmark = pytest.mark.gpu
# Rounded once where torch rounds several times: to the exact numbers, half an ulp of the largest.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.035, torch.float16: 0.005}


def streams(dtype, lengths, heads=24, width=128):
    found = []
    for length in lengths:
        qkv = torch.randn(2, length, 3, heads, width, device="cuda").to(dtype)
        norms = [attention.RmsNorm(width, 1e-6).to("cuda", dtype) for _ in range(2)]
        for norm in norms:
            torch.nn.init.uniform_(norm.scale, 0.5, 1.5)
        found.append(attention.Stream(*qkv.permute(2, 0, 3, 1, 4), *norms))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_heads_are_normed_and_rotated(dtype):
    torch.manual_seed(0)
    made = streams(dtype, (77, 1031))
    angle = torch.rand(1108, 64, device="cuda") * 6
    found = attention._together(made, (angle.cos(), angle.sin()))
    assert found is not None
    exact = [
        attention.Stream(*(x.float() for x in one[:3]), *(norm.float() for norm in one[3:]))
        for one in made
    ]
    wanted = attention._separate(exact, (angle.cos(), angle.sin()))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert float((a.float() - b).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [3072, 2432, 96])
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_tokens_are_modulated(dtype, width):
    torch.manual_seed(0)
    x = (torch.randn(2, 300, width, device="cuda") * 3 + 1).to(dtype)
    shift, scale = torch.randn(2, 1, 2 * width, device="cuda").to(dtype).chunk(2, dim=-1)
    found = tokens.modulated(x, shift, scale, 1e-6)
    assert found is not None
    normed = torch.nn.functional.layer_norm(x.float(), (width,), eps=1e-6)
    wanted = normed * (1 + scale.float()) + shift.float()
    assert float((found.float() - wanted).abs().max()) < 2 * TOLERANCE[dtype]


def test_gradients_and_graphs_are_left_to_torch():
    x = torch.randn(1, 8, 4, 64, device="cuda")
    assert tokens.serves(x)
    assert not tokens.serves(x.requires_grad_())
