"""Bias correction: which biases, by how much, and that nothing else changes."""

import numpy as np
import pytest

from diffquant.convert import cutting
from diffquant.convert.binding import bind
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import UnsupportedShape, UsageError
from diffquant.io import open_source
from diffquant.io.inputs import LayerInputs, open_inputs, write_inputs
from diffquant.quant.types import type_named

QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"


@pytest.fixture
def inputs(tmp_path):
    """Means of two layers, large enough to move their biases."""
    rng = np.random.default_rng(0)
    found = {
        f"{name}.weight": LayerInputs(
            rng.standard_normal(256).astype("f4") * 3, np.eye(256, dtype="f4"), 4
        )
        for name in (QKV, LINEAR1)
    }
    path = tmp_path / "means.safetensors"
    write_inputs(path, found, {"diffquant.architecture": "flux1"})
    with open_inputs(path) as opened:
        yield opened


def request_for(kind, container, *, correct):
    return Request(container, type=type_named(kind), bias_correction=correct)


def read(path):
    """Key without its prefix -> values; and the header."""
    with open_source(path) as source:
        logical = bind(source)
        values = {
            key.removeprefix("model.diffusion_model."): (logical.read(key), tensor.dtype)
            for key, tensor in logical.tensors.items()
            if tensor.is_float
        }
        return values, dict(source.metadata)


@pytest.mark.parametrize(
    ("kind", "container", "suffix"),
    [
        ("nf4", "safetensors", ".safetensors"),
        ("nvfp4", "safetensors", ".safetensors"),
        ("q4_k_s", "gguf", ".gguf"),
    ],
)
def test_a_bias_gets_what_rounding_takes_from_the_mean(
    examples, tmp_path, inputs, kind, container, suffix
):
    source = examples / "flux1-shapes"
    plain, fixed, exact = (tmp_path / f"{name}{suffix}" for name in ("plain", "fixed", "exact"))
    run_job(source, plain, request_for(kind, container, correct=False))
    report = run_job(source, fixed, request_for(kind, container, correct=True), inputs=inputs)
    run_job(source, exact, Request(container, dtype="f32"))
    before, after, wanted = read(plain)[0], read(fixed)[0], read(exact)[0]
    changed = {
        key
        for key in before
        if before[key][0].tobytes() != after[key][0].tobytes()
    }  # fmt: skip
    assert changed == {f"{QKV}.bias", f"{LINEAR1}.bias"}
    for name in (QKV, LINEAR1):
        error = wanted[f"{name}.weight"][0] - before[f"{name}.weight"][0]
        shift = error.astype(np.float64) @ inputs.mean(f"{name}.weight")
        bias, dtype = after[f"{name}.bias"]
        assert dtype == before[f"{name}.bias"][1]
        rounding = 2.0**-8 if dtype == "BF16" else 1e-6
        expected = wanted[f"{name}.bias"][0] + shift
        np.testing.assert_allclose(bias, expected, rtol=rounding, atol=1e-6)
        assert np.abs(shift).max() > 0.05
    reasons = {row.key: row.reason for row in report.tensors}
    assert reasons[f"{QKV}.bias"].endswith("corrected by mean inputs")
    assert "corrected" not in reasons["double_blocks.0.img_attn.proj.bias"]
    assert report.verdict == "pass"


def test_the_plan_and_the_header_name_it(examples, tmp_path, inputs):
    source, out = examples / "flux1-shapes", tmp_path / "a.safetensors"
    request = request_for("nf4", "safetensors", correct=True)
    dry = run_job(source, out, request, inputs=inputs, dry_run=True)
    assert not out.exists()
    note = "biases of 2 layers corrected by the mean inputs of means.safetensors; not: 11 were not"
    assert dry.notes[-1].startswith(note)
    run_job(source, out, request, inputs=inputs)
    found = read(out)[1]["diffquant.bias_correction"]
    assert found == "2 layers, mean inputs of means.safetensors"


def test_layers_without_a_bias_are_named(examples, tmp_path):
    """A UNet's attention has no bias on q, k and v."""
    to_q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    to_out = to_q.replace("to_q", "to_out.0")
    with open_source(examples / "sd15-shapes") as source:
        key = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        width = source.specs[key].shape[1]
    one = LayerInputs(np.ones(width, "f4"), np.eye(width, dtype="f4"), 4)
    path = tmp_path / "means.safetensors"
    write_inputs(path, {to_q: one, to_out: one}, {})
    with open_inputs(path) as inputs:
        report = run_job(
            examples / "sd15-shapes",
            tmp_path / "a.safetensors",
            request_for("nf4", "safetensors", correct=True),
            inputs=inputs,
            dry_run=True,
        )
    assert "have no bias" in report.notes[-1]
    assert report.notes[-1].startswith("biases of 1 layers corrected")


@pytest.mark.parametrize("workers", [1, 3])
def test_chunks_and_threads_do_not_change_the_bytes(
    examples, tmp_path, inputs, monkeypatch, digest, workers
):
    request = request_for("nf4", "safetensors", correct=True)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    run_job(examples / "flux1-shapes", whole, request, inputs=inputs, workers=1)
    monkeypatch.setattr(cutting, "CHUNK", 1 << 14)
    run_job(examples / "flux1-shapes", cut, request, inputs=inputs, workers=workers)
    assert digest(whole) == digest(cut)


def test_a_continued_run_ends_with_the_same_bytes(examples, tmp_path, inputs, monkeypatch, digest):
    """Interrupted between a weight and its bias, both are done again."""
    from diffquant.convert import engine

    source, request = examples / "flux1-shapes", request_for("nf4", "safetensors", correct=True)
    whole, kept = tmp_path / "whole.safetensors", tmp_path / "kept.safetensors"
    run_job(source, whole, request, inputs=inputs)

    def interrupted(self, state):
        if state.step.key == f"{LINEAR1}.weight":
            raise KeyboardInterrupt
        return bias_tasks(self, state)

    bias_tasks = engine._Job._bias_tasks
    with monkeypatch.context() as patched:
        patched.setattr(engine._Job, "_bias_tasks", interrupted)
        with pytest.raises(KeyboardInterrupt, match="are kept"):
            run_job(source, kept, request, inputs=inputs, resume=True, workers=1)
    report = run_job(source, kept, request, inputs=inputs, resume=True, workers=1)
    assert report.continued > 0
    assert not any("damaged" in text for text in report.warnings)
    assert digest(whole) == digest(kept)


def test_other_means_are_another_conversion(examples, tmp_path, inputs, monkeypatch):
    from diffquant.io.atomic import FlatSink

    source, request = examples / "flux1-shapes", request_for("nf4", "safetensors", correct=True)
    out, write = tmp_path / "a.safetensors", FlatSink.write

    def interrupted(self, key, offset, data):
        if key.endswith("img_mlp.0.weight"):
            raise KeyboardInterrupt
        write(self, key, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(FlatSink, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(source, out, request, inputs=inputs, resume=True, workers=1)
    other = tmp_path / "other" / "means.safetensors"
    other.parent.mkdir()
    one = LayerInputs(np.ones(256, "f4"), np.eye(256, dtype="f4"), 4)
    write_inputs(other, {f"{QKV}.weight": one, f"{LINEAR1}.weight": one}, {})
    with open_inputs(other) as means, pytest.raises(UsageError, match="mean inputs"):
        run_job(source, out, request, inputs=means, resume=True, workers=1)


def test_what_cannot_be_corrected_is_refused(examples, tmp_path, inputs):
    source, out = examples / "flux1-shapes", tmp_path / "a.gguf"
    with pytest.raises(UsageError, match="give --inputs"):
        run_job(source, out, request_for("q4_k_s", "gguf", correct=True))
    with pytest.raises(UsageError, match="no bias can be corrected"):
        run_job(source, out, request_for("bf16", "gguf", correct=True), inputs=inputs)
    path = tmp_path / "small.safetensors"
    one = LayerInputs(np.ones(8, "f4"), np.eye(8, dtype="f4"), 4)
    write_inputs(path, {f"{QKV}.weight": one}, {})
    with open_inputs(path) as small, pytest.raises(UnsupportedShape, match="has 8 columns"):
        run_job(source, out, request_for("q4_k_s", "gguf", correct=True), inputs=small)
    assert not out.exists()
