"""Predicted errors against pictures that are really made with one tensor rounded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS
from diffquant.runtime.calibrate import layers_of
from diffquant.runtime.differentiate import differentiate_pictures, gradient_importance
from diffquant.runtime.gradients import Power
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.pricing import SAMPLE, check_among, format_errors
from diffquant.runtime.sensitivity import measure_sensitivity

EXAMPLES = Path(__file__).parents[2] / "examples"
QWEN = EXAMPLES / "qwen-image-shapes"
PROMPTS = (
    "a small red circle on a blue background at the left",
    "a large yellow star on a black background in the center",
    "a large green square on a white background at the right",
    "a small white triangle on a purple background at the top",
)
SIZE = (64, 64)
UNUSED = {
    f"transformer_blocks.0.{name}.weight"
    for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
}
FORMS = ("q4_0", "q2_k", "f32")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def priced():
    return measure_sensitivity(QWEN, PROMPTS, among=FORMS, steps=2, seed=50, size=SIZE)


def rounded(weight, name):
    rows = np.ascontiguousarray(weight.reshape(len(weight), -1))
    parts = backend(FORMATS[name].codec, "encode")(rows, None, fmt=name)
    return backend(FORMATS[name].codec, "decode")(parts, rows.shape, fmt=name).reshape(weight.shape)


def test_ranks_tensors_and_formats_as_pictures_do(priced):
    opened = open_pipeline(QWEN)

    def draw():
        made = opened.pipeline.generate(
            PROMPTS[:2], seed=70, steps=2, width=SIZE[0], height=SIZE[1]
        )
        return made.images

    exact = draw()
    predicted, measured = [], []
    for key, layer in layers_of(opened.pipeline.parts.denoiser)[6:]:
        before = layer.packed
        for name in ("q4_0", "q2_k"):
            weight = rounded(layer.weight(torch.float32).numpy(), name)
            layer.packed = PackedWeight.of(torch.from_numpy(weight))
            predicted.append(priced.sensitivity.errors[key][name])
            measured.append(float((draw() - exact).square().mean()))
            layer.packed = before
    assert len(measured) == 28
    assert spearmanr(predicted, measured).statistic > 0.9
    used = np.array(measured) > 0
    ratio = np.log2(np.array(predicted)[used] / np.array(measured)[used])
    assert abs(np.median(ratio)) < 1.5  # the unit is that of pictures


def test_what_no_picture_depends_on_is_priced_nothing_and_named(priced):
    # the only block is the last one: nobody reads what it makes of the text
    assert set(priced.unused) == UNUSED
    for key in UNUSED:
        assert set(priced.sensitivity.errors[key].values()) == {0.0}
    assert "change no picture" in priced.warnings[-1]


def test_every_layer_has_its_errors(priced):
    found = priced.sensitivity
    keys = {key for key, _ in layers_of(open_pipeline(QWEN).pipeline.parts.denoiser)}
    assert set(found.errors) == keys
    assert (found.architecture, found.method, len(found.source)) == ("qwen_image", "outputs", 64)
    for errors in found.errors.values():
        assert errors["f32"] == 0
        assert errors["q2_k"] >= errors["q4_0"] >= 0
    assert found.context["steps"] == "2"
    assert "mean squared error of pixels" in found.unit


def test_the_model_with_guidance_and_convolutions_is_measured():
    found = measure_sensitivity(
        EXAMPLES / "sd15-shapes",
        PROMPTS[:1],
        among=("q4_0",),
        steps=1,
        cfg=3.0,
        level="latents",
        size=SIZE,
    )
    # convolutions do not divide into blocks by rows of their last dimension: rows of 256
    assert any(".in_layers.2." in key for key in found.sensitivity.errors)
    # at 64 pixels the middle block's attention sees one token: what it asks changes nothing
    middle = "middle_block.1.transformer_blocks.0.attn1"
    assert set(found.unused) == {f"{middle}.to_q.weight", f"{middle}.to_k.weight"}
    assert "latents" in found.sensitivity.unit


def test_formats_are_checked_before_anything_runs():
    assert check_among(("q4_k", "q8_0", "q4_k"), matrix=False) == ("q4_k", "q8_0")
    with pytest.raises(UnknownFormat, match="did you mean"):
        check_among(("q4_9",), matrix=False)
    with pytest.raises(UsageError, match="iq2_xxs cannot be encoded without"):
        check_among(("iq2_xxs",), matrix=False)
    assert check_among(("iq2_xxs",), matrix=True) == ("iq2_xxs",)
    with pytest.raises(UsageError, match="no formats"):
        check_among((), matrix=True)
    with pytest.raises(UsageError, match="no prompts"):
        measure_sensitivity(Path("nowhere"), ())


def flat_power(n, k):
    return Power(np.full(n, float(k)), np.full(k, float(n)))


def test_with_flat_power_the_error_is_that_of_the_weights():
    weight = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    found = format_errors(weight, ("q4_0", "f32"), flat_power(8, 256))
    assert found["q4_0"] == pytest.approx(float(((rounded(weight, "q4_0") - weight) ** 2).sum()))
    assert found["f32"] == 0


def test_a_large_weight_is_judged_by_some_of_its_rows():
    rows, columns = 2 * SAMPLE // 256, 256
    weight = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    power = Power(np.linspace(1, 3, rows) * columns, np.full(columns, 2.0 * rows))
    found = format_errors(weight, ("q4_0",), power)["q4_0"]
    assert found == pytest.approx(power.weigh((rounded(weight, "q4_0") - weight) ** 2), rel=0.01)


def test_rows_that_do_not_divide_are_judged_as_they_are_stored():
    weight = np.random.default_rng(2).standard_normal((16, 64)).astype(np.float32)
    found = format_errors(weight, ("q4_k",), flat_power(16, 64))
    stored = rounded(weight.reshape(4, 256), "q4_k").reshape(16, 64)
    assert found["q4_k"] == pytest.approx(float(((stored - weight) ** 2).sum()), rel=1e-6)
    assert format_errors(weight[:3, :7], ("q4_k",), flat_power(3, 7)) == {}


def test_formats_that_overflow_or_lack_importance_are_left_out():
    weight = np.full((4, 256), 1e30, np.float32)
    assert format_errors(weight, ("f16", "f32"), flat_power(4, 256)).keys() == {"f32"}
    small = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    assert format_errors(small, ("iq2_xxs",), flat_power(4, 256)) == {}


def test_importance_changes_what_is_priced_where_it_is_asked_for():
    matrix = ImportanceMatrix(
        {
            key: Entry(
                np.geomspace(1e-6, 1e6, layer.logical_shape[1])[None], np.array([1], np.int64)
            )
            for key, layer in layers_of(open_pipeline(QWEN).pipeline.parts.denoiser)
        }
    )
    common = {"among": ("q2_k",), "steps": 1, "size": SIZE}
    plain = measure_sensitivity(QWEN, PROMPTS[:1], **common).sensitivity
    needed = measure_sensitivity(QWEN, PROMPTS[:1], matrix=matrix, **common).sensitivity
    assert needed.errors == plain.errors  # q2_k can do without
    weighed = measure_sensitivity(
        QWEN, PROMPTS[:1], matrix=matrix, everywhere=True, **common
    ).sensitivity
    key = "transformer_blocks.0.attn.to_out.0.weight"
    assert weighed.errors[key] != plain.errors[key]
    assert weighed.errors["img_in.weight"] == plain.errors["img_in.weight"]  # its rows are cut
    assert weighed.context["importance"] != plain.context["importance"]


def test_errors_along_what_pictures_depend_on_are_priced_as_they_cost():
    found = differentiate_pictures(QWEN, PROMPTS, steps=2, seed=50, size=SIZE)
    key = "transformer_blocks.0.img_mlp.net.0.proj.weight"
    power = found.power[key]
    error = np.outer(power.row_sketch[:, 0], power.column_sketch[0])
    error *= 1e-4 / np.abs(error).mean()
    opened = open_pipeline(QWEN)
    layer = dict(layers_of(opened.pipeline.parts.denoiser))[key]

    def draw():
        return opened.pipeline.generate(
            PROMPTS[:2], seed=70, steps=2, width=SIZE[0], height=SIZE[1]
        ).images

    exact = draw()
    wrong = layer.weight(torch.float32) + torch.from_numpy(error.astype(np.float32))
    layer.packed = PackedWeight.of(wrong)
    measured = float((draw() - exact).square().mean())
    alone = power.weigh(error**2) / found.elements
    assert alone < measured / 5  # as independent errors of single weights
    assert 0.3 < alone * power.coherence(error) / measured < 3


def test_importance_of_gradients_is_their_power_by_column():
    found = differentiate_pictures(QWEN, PROMPTS[:1], steps=1, size=SIZE)
    key, idle = "transformer_blocks.0.attn.to_out.0.weight", min(UNUSED)
    values = {key: np.geomspace(1, 2, 256), idle: np.geomspace(1, 4, 256)}
    inputs = ImportanceMatrix(
        {name: Entry(one[None] * 7, np.array([7])) for name, one in values.items()}
    )
    made = gradient_importance(found, inputs, dataset="prompts.txt")
    assert (made.datasets, made.chunk_count) == (("prompts.txt",), 1)
    columns = found.power[key].columns
    assert made.entries[key].values() == pytest.approx(columns / columns.mean(), rel=1e-6)
    # no picture depends on it, so inputs are all there is
    assert made.entries[idle].values() == pytest.approx(values[idle] / values[idle].mean())
