"""Kernels between matrix products on a card, to the same operations by torch in float32."""

import pytest
import torch

from diffquant.runtime.kernels import rows, tokens
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


@pytest.mark.parametrize("width", [0, 3072])
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_an_activation_stands_behind_what_is_copied(dtype, width):
    torch.manual_seed(0)
    both = (torch.randn(2, 130, 3072 + 5000, device="cuda") * 2).to(dtype)
    first, x = both[..., :width], both[..., 3072:]
    found = tokens.gelu_behind(first, x)
    assert torch.equal(found[..., :width], first)
    wanted = torch.nn.functional.gelu(x.float(), approximate="tanh")
    assert float((found[..., width:].float() - wanted).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kind", "rotation"), [("fp8", 0), ("int8", 0), ("int8", 256), ("int8", 64)]
)
@pytest.mark.parametrize("width", [3072, 15360])
@pytest.mark.parametrize("name", ["modulated", "normed", "gated", "behind", "alone"])
@torch.no_grad()
def test_rows_are_those_of_what_comes_before(name, width, kind, rotation):
    """To the reference of the same numbers in float32, some of which lie between two codes; and
    as near to those numbers as it is."""
    torch.manual_seed(0)
    x = (torch.randn(2, 300, width, device="cuda") * 2 + 1).bfloat16()
    asked = rows.RowKind(kind, rotation)
    if name == "modulated":
        shift, scale = torch.randn(2, 1, 2 * width, device="cuda").bfloat16().chunk(2, dim=-1)
        found = tokens.modulated(x, shift, scale, 1e-6, asked)
        normed = torch.nn.functional.layer_norm(x.float(), (width,), eps=1e-6)
        wanted = normed * (1 + scale.float()) + shift.float()
    elif name == "normed":
        norm = torch.nn.LayerNorm(width, device="cuda", dtype=torch.bfloat16)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        found = tokens.normed(x, norm, asked)
        wanted = norm.float()(x.float())
    elif name == "gated":
        gate = (torch.randn(2, 300, width, device="cuda") * 2).bfloat16()
        found = tokens.gelu_gated(x, gate, asked)
        wanted = x.float() * torch.nn.functional.gelu(gate.float())
    else:
        cut = 1024 if name == "behind" else 0
        found = tokens.gelu_behind(x[..., :cut], x[..., cut:], asked)
        active = torch.nn.functional.gelu(x[..., cut:].float(), approximate="tanh")
        wanted = torch.cat((x[..., :cut].float(), active), dim=-1)
    assert found.shape == x.shape
    q, size = rows.quantize_rows(wanted.flatten(0, 1), kind, rotation=rotation)
    rounded = name in ("gated", "behind", "alone") and not rotation  # to bfloat16, where held
    assert torch.allclose(found.scale, size, rtol=2**-8 if rounded else 4e-5)
    decoded, exact = found.q.float() * found.scale, q.float() * size
    noise = (exact - wanted.flatten(0, 1)).norm()  # of quantizing itself, not rotated
    if rotation:
        assert float((found.q.float() != q.float()).float().mean()) < 0.005
    else:
        assert (decoded - wanted.flatten(0, 1)).norm() < noise * 1.1


def test_gradients_and_graphs_are_left_to_torch():
    x = torch.randn(1, 8, 4, 64, device="cuda")
    assert tokens.serves(x)
    assert not tokens.serves(x.requires_grad_())
