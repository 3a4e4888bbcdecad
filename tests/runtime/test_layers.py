"""Packed weights and the layers around them."""

import pytest
import torch
from torch.nn import functional

from diffquant.core.errors import PlanMismatch, UnknownFormat, UnsupportedDtype, UnsupportedShape
from diffquant.runtime.kernels import KERNELS, best
from diffquant.runtime.layers import (
    LowRank,
    PackedWeight,
    QuantConv2d,
    QuantEmbedding,
    QuantLinear,
    Segment,
)


def int8(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) / 127
    return Segment("int8_rowwise", (rows, columns), {"weight": weight, "scale": scale})


def test_segments_of_different_formats_stack_along_rows():
    plain = torch.randn(2, 4).half()
    both = PackedWeight((int8(3, 4), Segment("f16", (2, 4), {"weight": plain})))
    assert both.shape == (5, 4)
    assert both.formats == ("int8_rowwise", "f16")
    assert both.nbytes == 3 * 4 + 3 * 4 + 2 * 4 * 2
    decoded = both.dequantize(torch.float32)
    assert torch.equal(decoded[:3], int8(3, 4).dequantize(torch.float32))
    assert torch.equal(decoded[3:], plain.float())


def test_weights_large_enough_for_a_fast_kernel_are_the_references():
    segments = (int8(256, 256), int8(192, 256, seed=1))
    assert best("int8_rowwise", "cpu", torch.bfloat16).backend == "numba"
    decoded = PackedWeight(segments).dequantize(torch.bfloat16)
    wanted = [KERNELS[one.format](one.parts, one.shape, torch.bfloat16) for one in segments]
    assert torch.equal(decoded, torch.cat(wanted))


def test_a_decoded_weight_survives_the_next_layers():
    first, second = QuantLinear(256, 256), QuantLinear(256, 256)
    first.bind(PackedWeight((int8(256, 256),)))
    second.bind(PackedWeight((int8(256, 256, seed=1),)))
    weight = first.weight(torch.float32)
    other = second.weight(torch.float32)
    assert torch.equal(
        weight, KERNELS["int8_rowwise"](int8(256, 256).parts, (256, 256), torch.float32)
    )
    assert not torch.equal(weight, other)


def test_segments_of_different_widths_are_refused():
    with pytest.raises(UnsupportedShape, match="cannot be stacked"):
        PackedWeight((int8(3, 4), int8(3, 5)))


def test_unknown_format_names_the_closest():
    with pytest.raises(UnknownFormat, match="did you mean 'q4_k'"):
        Segment("q4k", (1, 256), {})


def test_plain_weight_of_a_foreign_dtype_is_refused():
    with pytest.raises(UnsupportedDtype, match="int64"):
        PackedWeight.of(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_decodes_to_the_dtype_of_its_input(dtype):
    layer = QuantLinear(4, 3).to(dtype)
    layer.bind(PackedWeight((int8(3, 4),)))
    torch.nn.init.ones_(layer.bias)
    x = torch.randn(2, 5, 4).to(dtype)
    weight = int8(3, 4).dequantize(dtype)
    assert torch.equal(layer(x), functional.linear(x, weight, layer.bias))
    assert layer(x).dtype == dtype


def test_linear_takes_a_1x1_kernel_but_no_other_shape():
    layer = QuantLinear(4, 3, bias=False)
    layer.bind(PackedWeight.of(torch.ones(3, 4, 1, 1)))
    assert layer(torch.ones(1, 4)).tolist() == [[4.0, 4.0, 4.0]]
    for shape in [(4, 3), (3, 4, 2, 1), (3,)]:
        with pytest.raises(UnsupportedShape, match=r"expected a weight of shape \(3, 4\)"):
            layer.bind(PackedWeight.of(torch.ones(shape)))


def test_changing_dtype_leaves_packed_bytes_alone():
    layer = QuantLinear(4, 3)
    layer.bind(PackedWeight((int8(3, 4),)))
    layer.half()
    parts = layer.bound().segments[0].parts
    assert parts["scale"].dtype == torch.float32
    assert layer.bias.dtype == torch.float16


def test_moving_takes_packed_bytes_and_adapters_along():
    layer = QuantLinear(4, 3)
    layer.bind(PackedWeight((int8(3, 4),)))
    layer.adapters.append(LowRank(torch.ones(1, 4), torch.ones(3, 1), 1.0))
    layer.to("meta")
    assert layer.bound().device.type == "meta"
    assert layer.adapters[0].down.device.type == "meta"


def test_calling_an_unbound_layer_is_our_bug():
    with pytest.raises(PlanMismatch):
        QuantLinear(4, 3)(torch.ones(1, 4))


def test_linear_adapters_add_up_and_can_reach_some_rows_only():
    layer = QuantLinear(4, 6, bias=False)
    base = torch.randn(6, 4)
    layer.bind(PackedWeight.of(base))
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    part_down, part_up = torch.randn(1, 4), torch.randn(2, 1)
    layer.adapters = [LowRank(down, up, 0.5), LowRank(part_down, part_up, 2.0, rows=(2, 4))]
    merged = base + 0.5 * up @ down
    merged[2:4] += 2.0 * part_up @ part_down
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), x @ merged.T)
    assert torch.equal(layer.weight(torch.float32), base)


@pytest.mark.parametrize("up_rank", [2, 4])
def test_convolution_adapters_equal_the_merged_kernel(up_rank):
    layer = QuantConv2d(4, 6, 3, stride=2, padding=1)
    base = torch.randn(6, 4, 3, 3)
    layer.bind(PackedWeight.of(base))
    torch.nn.init.zeros_(layer.bias)
    down, up = torch.randn(2, 4, 3, 3), torch.randn(6, 2)
    merged = base + 0.7 * torch.einsum("or,rchw->ochw", up, down)
    layer.adapters.append(LowRank(down, up if up_rank == 2 else up[:, :, None, None], 0.7))
    x = torch.randn(1, 4, 8, 8)
    wanted = functional.conv2d(x, merged, None, 2, 1)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format_name", ["int8_rowwise", "fp8_e4m3_scaled", "nf4", "stacked"])
def test_embedding_rows_equal_the_decoded_table(format_name):
    if format_name == "nf4":
        packed = torch.randint(0, 256, (6 * 10 // 2,), dtype=torch.uint8)
        segment = Segment("nf4", (6, 10), {"weight": packed, "absmax": torch.rand(1)})
        weight = PackedWeight((segment,))
    elif format_name == "fp8_e4m3_scaled":
        qdata = torch.randn(6, 10).to(torch.float8_e4m3fn)
        parts = {"weight": qdata, "scale": torch.tensor(0.25)}
        weight = PackedWeight((Segment(format_name, (6, 10), parts),))
    elif format_name == "stacked":
        weight = PackedWeight((int8(2, 10), int8(4, 10, seed=1)))
    else:
        weight = PackedWeight((int8(6, 10),))
    layer = QuantEmbedding(6, 10)
    layer.bind(weight)
    ids = torch.tensor([[5, 0, 0], [3, 2, 5]])
    assert torch.equal(layer(ids, torch.float32), weight.dequantize(torch.float32)[ids])
