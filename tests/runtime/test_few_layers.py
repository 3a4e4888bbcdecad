"""Layers called with few rows: which take the kernel that decodes on the way, and which do not."""

import pytest
import torch
from test_compiling import tiny_flux
from test_low_bit import HOPPER, layer_of, relative
from torch import nn

from diffquant.runtime import few_rows, low_bit
from diffquant.runtime.compiling import compiled
from diffquant.runtime.compute import Card
from diffquant.runtime.kernels import KERNELS
from diffquant.runtime.layers import QuantLinear
from diffquant.runtime.low_bit import LowBitLayer


@pytest.fixture(autouse=True)
def three(monkeypatch):
    """More than three rows are many."""
    monkeypatch.setattr(few_rows, "FEW", 3)


@pytest.fixture
def asked(monkeypatch):
    """A kernel of few rows as a card has; formats it was called with."""
    formats = []

    def few(rows, fmt, parts, shape, bias):
        formats.append(fmt)
        return rows @ KERNELS[fmt](parts, shape, rows.dtype).T + bias

    monkeypatch.setattr(few_rows.products, "few_rows_serve", lambda *_given: 64)
    monkeypatch.setattr(few_rows.products, "few_rows", few)
    return formats


def test_few_rows_of_a_rotated_weight_are_rotated_instead_of_it(asked):
    """What a card's kernel is given is a plain weight of 8 bits and rows that were rotated."""
    layer, x = layer_of("int8_convrot"), torch.randn(1, 3, 512)
    wanted = layer(x)
    layer.product = LowBitLayer("int8", "", (torch.float32,))
    assert relative(layer(x), wanted) < 1e-6
    assert asked == ["int8_rowwise"]


def test_exact_layers_take_few_rows_by_the_kernel_on_a_card(asked):
    """But not rotated ones: rotating rows in 16 bits rounds as decoding does not."""
    model = nn.ModuleList([layer_of("q4_k"), layer_of("int8_convrot")])
    few, many = torch.randn(1, 3, 512), torch.randn(1, 4, 512)
    wanted = [[layer(x) for layer in model] for x in (few, many)]
    for card in (Card("cpu"), Card("cuda", 90, "no compiler")):
        assert low_bit.apply(model, "exact", card).layers == {}
        assert [layer.product for layer in model] == [None, None]
    found = low_bit.apply(model, "exact", HOPPER)
    assert (found.layers, found.said, found.nbytes) == ({}, (), 0)
    assert asked == []
    assert relative(model[0](few), wanted[0][0]) < 1e-6
    assert asked == ["q4_k"]
    assert torch.equal(model[0](many), wanted[1][0])
    for x, (_, right) in zip((few, many), wanted, strict=True):
        assert torch.equal(model[1](x), right)
    assert asked == ["q4_k"]
    assert model[0].takes(many) is None
    assert (model[0].product.key, model[1].product.key) == (64, 0)


def test_no_rows_are_multiplied_as_ever(asked):
    layer, x = layer_of("q4_k"), torch.randn(1, 0, 512)
    few_rows.serve_few_rows(layer, HOPPER)
    assert layer(x).shape == (1, 0, 48)
    assert asked == []


@torch.no_grad()
def test_compiled_blocks_take_the_kernel_too(asked):
    """It is asked for before: while a block is compiled nothing is."""
    denoiser, call = tiny_flux()
    wanted = call()
    few_rows.serve_few_rows(denoiser, HOPPER)
    layers = [one for one in denoiser.modules() if isinstance(one, QuantLinear)]
    with compiled(denoiser, backend="eager") as state:
        assert {one.product.key for one in layers} == {64}
        found = call()
    assert (state.blocks, state.failed) == (3, "")
    assert relative(found, wanted) < 1e-5
    assert asked.count("q8_0") >= 3  # a modulation in each block


def test_a_weight_that_the_kernel_does_not_serve_is_decoded_first():
    layer, x = layer_of("q4_k"), torch.randn(1, 3, 512)
    wanted = layer(x)
    few_rows.serve_few_rows(layer, HOPPER)
    assert torch.equal(layer(x), wanted)
    assert layer.product.key == 0  # no card here
