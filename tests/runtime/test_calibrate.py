"""Calibration against independent oracles: float64 sums, torch's unfold, diffusers' own layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffquant.core.errors import VerificationError
from diffquant.runtime.calibrate import Collector, calibrate, column_squares, layers_of
from diffquant.runtime.layers import PackedWeight, QuantConv2d, QuantLinear
from diffquant.runtime.opening import open_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
SD15, FLUX = EXAMPLES / "sd15-shapes", EXAMPLES / "flux1-shapes"
PROMPTS = ("a red circle on a blue background", "a green square")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_linear_layer_sums_over_every_token():
    x = randn(2, 5, 7)
    sums, rows = column_squares(QuantLinear(7, 3), x)
    assert rows == 10
    assert sums.tolist() == pytest.approx((x.double() ** 2).sum((0, 1)).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0)]
)
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_a_convolution_sums_over_every_patch(kernel, stride, padding, size):
    x = randn(2, 4, *size)
    layer = QuantConv2d(4, 6, kernel, stride=stride, padding=padding)
    sums, rows = column_squares(layer, x)
    patches = functional.unfold(x.double(), kernel, padding=padding, stride=stride)  # (2, K, L)
    assert rows == 2 * patches.shape[2]
    assert sums.tolist() == pytest.approx((patches**2).sum((0, 2)).tolist(), rel=1e-6)


def test_hooks_go_and_leave_the_output_alone():
    layer = QuantLinear(4, 2, bias=False)
    layer.bind(PackedWeight.of(torch.ones(2, 4)))
    model = torch.nn.Sequential(layer)
    collector = Collector()
    x = randn(3, 4)
    before = model(x)
    with collector.hooked(model):
        assert torch.equal(model(x), before)
    model(x)  # not counted
    matrix = collector.matrix(("d",))
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (1, 3, ("d",))
    assert list(matrix.entries) == ["0.weight"]
    expected = (x**2).mean(0)
    assert matrix.entries["0.weight"].values() == pytest.approx(expected.numpy(), rel=1e-6)


def test_an_input_that_is_not_finite_is_refused():
    layer = QuantLinear(2, 1, bias=False)
    layer.bind(PackedWeight.of(torch.ones(1, 2)))
    collector = Collector()
    with collector.hooked(layer):
        layer(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(VerificationError, match="not finite"):
        collector.flush()


@pytest.mark.parametrize(("source", "cfg"), [(SD15, 3.0), (FLUX, None)], ids=["sd15", "flux1"])
def test_every_layer_is_measured_under_its_canonical_key(source, cfg):
    found = calibrate(source, PROMPTS, steps=2, size=(64, 64), cfg=cfg, seed=5)
    keys = {key for key, _ in layers_of(open_pipeline(source).pipeline.parts.denoiser)}
    assert set(found.matrix.entries) == keys
    assert found.layers == len(keys)
    assert found.pictures == 2
    assert found.matrix.chunk_count == found.calls >= 4
    again = calibrate(source, PROMPTS[1:], steps=2, size=(64, 64), cfg=cfg, seed=6)
    first = calibrate(source, PROMPTS[:1], steps=2, size=(64, 64), cfg=cfg, seed=5)
    for key, entry in found.matrix.entries.items():  # pictures add up, each from its own seed
        parts = [one.matrix.entries[key] for one in (first, again)]
        assert entry.counts == sum(one.counts for one in parts)
        assert np.allclose(entry.sums, sum(one.sums for one in parts), rtol=1e-5)


_SAME = {  # canonical key -> modules of diffusers that see the same input
    "double_blocks.0.img_attn.qkv.weight": "transformer_blocks.0.attn.to_k",
    "double_blocks.0.txt_attn.qkv.weight": "transformer_blocks.0.attn.add_v_proj",
    "double_blocks.0.img_attn.proj.weight": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.0.txt_mlp.2.weight": "transformer_blocks.0.ff_context.net.2",
    "double_blocks.0.img_mod.lin.weight": "transformer_blocks.0.norm1.linear",
    "single_blocks.0.linear1.weight": "single_transformer_blocks.0.attn.to_q",
    "single_blocks.0.linear2.weight": "single_transformer_blocks.0.proj_out",
    "final_layer.linear.weight": "proj_out",
    "img_in.weight": "x_embedder",
}


@pytest.mark.oracle
def test_diffusers_sees_the_same_inputs():
    """The pipeline of diffusers, hooked in its own layers, on the same noise and prompt."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.FluxPipeline.from_pretrained(FLUX, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sums: dict[str, list[torch.Tensor]] = {}
    modules = dict(pipeline.transformer.named_modules())

    def watch(name):
        def hook(_module, inputs):
            sums.setdefault(name, []).append(inputs[0].double().flatten(0, -2) ** 2)

        modules[name].register_forward_pre_hook(hook)

    for name in _SAME.values():
        watch(name)
    pipeline(
        PROMPTS[0],
        num_inference_steps=3,
        width=64,
        height=64,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )
    found = calibrate(FLUX, PROMPTS[:1], steps=3, size=(64, 64), seed=3).matrix
    for key, name in _SAME.items():
        expected = torch.cat(sums[name])
        assert found.entries[key].counts.tolist() == [len(expected)], key
        values = found.entries[key].values()
        assert np.allclose(values, expected.mean(0).numpy(), rtol=2e-3, atol=1e-6), key
