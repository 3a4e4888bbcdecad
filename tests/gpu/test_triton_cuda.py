"""Triton decoders on a card, bit for bit the torch reference; run by `scripts/test --gpu`.

Imports only what that machine has; formats with grids need gguf there.
"""

import pytest
import torch
from packed_parts import difference, random_parts

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS, best, decode
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
fast = pytest.importorskip("diffquant.runtime.kernels.triton")

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = ("iq1", "iq2", "iq3")


def shape_of(name):
    """Some megabytes; rows and columns that no tile divides where the format allows it."""
    row = FORMATS[name]
    if row.is_tiled:
        return (1280, 1152) if row.codec == "blocks_128" else (1100, 1230)
    if row.rotation or (row.block_size and not row.flat_block):
        return (1031, 1280)
    return (1031, 1283)


def on_card(parts):
    return {key: part.cuda() for key, part in parts.items()}


@pytest.mark.parametrize("odd", [False, True], ids=["ordinary", "odd scales"])
@pytest.mark.parametrize("name", fast.KERNELS)
def test_numbers_are_the_references_bit_for_bit(name, odd):
    if name.startswith(GRIDS):
        pytest.importorskip("gguf")
    shape = shape_of(name)
    parts = random_parts(name, shape, odd=odd)
    wanted, there = KERNELS[name](parts, shape, torch.float32), on_card(parts)
    for dtype in DTYPES:
        service = best(name, "cuda", dtype)
        assert service.backend == "triton", service.reason
        found = decode(name, there, shape, dtype).cpu()
        assert difference(found, wanted.to(dtype)) == "", dtype


@pytest.mark.parametrize("name", sorted(fast.CASTS - {"f32"}))
def test_casts_are_torchs(name):
    parts = random_parts(name, (64, 65))
    found = decode(name, on_card(parts), (64, 65), torch.float32).cpu()
    assert difference(found, KERNELS[name](parts, (64, 65), torch.float32)) == ""


def test_weights_beyond_2_gib_are_addressed():
    rows, columns = 1 << 16, (1 << 15) + 256  # 2.16e9 weights
    scale = torch.rand(rows, 1)
    weight = torch.randint(-128, 128, (8, columns), dtype=torch.int8, device="cuda")
    parts = {"weight": weight.repeat(rows // 8, 1), "scale": scale.cuda()}
    found = decode("int8_rowwise", parts, (rows, columns), torch.float16)
    wanted = (weight[-1].float() * scale[-1, 0].item()).half()
    assert torch.equal(found[-1], wanted)
    blocks = random_parts("q4_0", (8, columns))["weight"].cuda()
    found = decode("q4_0", {"weight": blocks.repeat(rows // 8, 1)}, (rows, columns), torch.float16)
    last = KERNELS["q4_0"]({"weight": blocks[-1:]}, (1, columns), torch.float16)
    assert difference(found[-1:], last) == ""


@pytest.mark.parametrize("name", ["q4_k", "nf4_dq", "fp8_e4m3_scaled", "int8_convrot", "f16"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch itself
def test_a_compiled_layer_is_one_graph_and_equal(name):
    shape = (256, 512)
    layer = QuantLinear(shape[1], shape[0], bias=False)
    layer.bind(PackedWeight((Segment(name, shape, on_card(random_parts(name, shape))),)))
    x = torch.randn(8, shape[1], dtype=torch.bfloat16, device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert difference(compiled(x), layer(x)) == ""


def test_kernels_run_in_stream_order_and_inside_cuda_graphs():
    shape = (512, 1024)
    parts = on_card(random_parts("q5_k", shape))
    wanted = decode("q5_k", parts, shape, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode("q5_k", parts, shape, torch.bfloat16)
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)
