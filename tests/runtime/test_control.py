import numpy as np
import pytest
import torch

from diffquant.core.dtypes import STORAGE
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS
from diffquant.runtime.control import SCALE_BYTES, damaged, shuffle
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment

BLOCKS = {
    name: STORAGE[row.parts[0].dtype]
    for name, row in FORMATS.items()
    if STORAGE[row.parts[0].dtype].is_block
}
ENCODED = tuple(name for name, row in FORMATS.items() if row.encodes)


def segment(name, rows=8, columns=512):
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    weight *= np.linspace(0.1, 4, rows, dtype=np.float32)[:, None]  # scales that differ
    row = FORMATS[name]
    stats = backend(row.codec, "reduce")(weight, fmt=name) if row.passes == 2 else None
    needs = row.importance == "required"
    extra = {"importance": np.ones(columns, np.float32)} if needs else {}
    parts = backend(row.codec, "encode")(weight, stats, fmt=name, **extra)
    tensors = {}
    for part in row.parts:
        data = torch.from_numpy(np.ascontiguousarray(parts[part.name]))
        if part.dtype == "F8_E4M3":
            data = data.view(torch.float8_e4m3fn)
        if part.dtype == "F8_E5M2":
            data = data.view(torch.float8_e5m2)
        if part.dtype == "BF16":
            data = data.view(torch.bfloat16)
        tensors[part.name] = data
    return Segment(name, (rows, columns), tensors)


def error(one, other):
    left, right = one.dequantize(torch.float32), other.dequantize(torch.float32)
    return float((left - right).norm() / left.norm())


@pytest.mark.parametrize("name", ENCODED)
def test_shuffling_damages_every_format(name):
    one = segment(name)
    before = one.dequantize(torch.float32).clone()
    assert error(one, shuffle(one, torch.Generator().manual_seed(0))) > 0.3
    assert torch.equal(one.dequantize(torch.float32), before)  # the original is untouched


@pytest.mark.parametrize("name", ENCODED)
def test_shuffling_rows_damages_every_format(name):
    assert error(segment(name), shuffle(segment(name), torch.Generator(), rows=True)) > 0.3


def test_every_block_format_says_where_its_scales_are():
    assert {name: row.block_nbytes for name, row in BLOCKS.items()} == {
        name: size for name, (size, _, _) in SCALE_BYTES.items()
    }
    assert all(0 <= start < stop <= size for size, start, stop in SCALE_BYTES.values())


@pytest.mark.parametrize("name", [name for name in BLOCKS if FORMATS[name].encodes])
def test_only_scale_bytes_move_in_block_formats(name):
    one = segment(name)
    other = shuffle(one, torch.Generator().manual_seed(0))
    size = one.parts["weight"].numel()
    moved = int((one.parts["weight"] != other.parts["weight"]).sum())
    assert 0 < moved < size // 4


def test_damage_is_undone_even_after_an_error():
    layer = QuantLinear(512, 8, bias=False)
    weight = PackedWeight((segment("q8_0"),))
    layer.bind(weight)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([layer])

    def use():
        with damaged(model) as block:
            assert block == "blocks.0"
            assert layer.packed is not weight
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use()
    assert layer.packed is weight
