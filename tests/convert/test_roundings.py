"""Rounding in a plan and a file: reasons, refusals, same sizes, same bytes for any workers."""

import numpy as np
import pytest

from diffquant.convert import cutting, engine
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.roundings import feedback_nbytes
from diffquant.core.errors import UnsupportedShape, UsageError
from diffquant.io import open_source
from diffquant.io.inputs import LayerInputs, open_inputs, write_inputs
from diffquant.quant.types import type_named

QKV = "double_blocks.0.img_attn.qkv.weight"
DOWN = "double_blocks.0.img_mlp.2.weight"


def measured(path, widths, architecture="flux1", seed=0):
    """Statistics of strongly correlated inputs for some layers."""
    layers = {}
    for key, width in widths.items():
        rng = np.random.default_rng(seed + width)
        rows = (rng.normal(size=(900, width)) @ rng.normal(size=(width, width))).astype(np.float32)
        layers[key] = LayerInputs(rows.mean(0), rows.T @ rows / np.float32(900), 900)
    write_inputs(path, layers, {"diffquant.architecture": architecture}, force=True)
    return path


@pytest.fixture
def flux(examples):
    return examples / "flux1-shapes"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "in.safetensors"
    with open_inputs(measured(path, {QKV: 256, DOWN: 1024})) as found:
        yield found


def request(rounding, name="nf4", container="safetensors"):
    return Request(container, type=type_named(name), rounding=rounding)


def plan_of(source, asked, inputs=None):
    with opened(source) as (_, logical, match):
        return make_plan(logical, match, asked, inputs=inputs)


def of(plan):
    return {step.key: (step.rounding, step.decision.reason) for step in plan.steps}


def test_nearest_is_the_default_and_says_nothing(flux):
    plan = plan_of(flux, Request("safetensors", type=type_named("nf4")))
    assert of(plan)[QKV] == ("nearest", "type's base")
    assert plan.inputs is None


def test_feedback_says_what_was_done_with_every_weight(flux, inputs):
    plan = plan_of(flux, request("feedback"), inputs)
    found = of(plan)
    assert found[QKV] == ("feedback", "type's base; rounded by feedback")
    other = found["single_blocks.0.linear1.weight"]
    assert other == ("search", "type's base; scales searched: no inputs known")
    assert any("no statistics of inputs" in text for text in plan.warnings)
    kept = [why for rounding, why in found.values() if rounding == "nearest"]
    assert kept
    assert not any("round" in why for why in kept)  # what is not quantized is not rounded


def test_a_format_with_one_scale_is_left_to_the_nearest(flux, inputs):
    found = of(plan_of(flux, request("search", "fp8_scaled")))
    assert found[QKV][0] == "nearest"
    assert "scales from extremes" in found[QKV][1]
    plan = plan_of(flux, request("feedback", "fp8_scaled"), inputs)
    assert of(plan)[QKV][0] == "feedback"


def test_ggml_formats_are_named_as_unserved(flux, inputs):
    plan = plan_of(flux, request("feedback", "q8_0", "gguf"), inputs)
    assert "q8_0 allows nothing else" in of(plan)[QKV][1]
    assert any("changes nothing" in text for text in plan.warnings)


def test_wide_layers_say_that_they_are_cut(flux, tmp_path, monkeypatch):
    monkeypatch.setattr("diffquant.io.inputs.LARGEST_BLOCK", 512)
    with open_inputs(measured_blocks(tmp_path / "b.safetensors")) as found:
        plan = plan_of(flux, request("feedback"), found)
        assert of(plan)[DOWN][1].endswith("rounded by feedback in 2 blocks of 512 columns")
        run_job(flux, tmp_path / "o.safetensors", request("feedback"), inputs=found)


def measured_blocks(path):
    blocks = np.stack([np.eye(512, dtype=np.float32)] * 2)
    write_inputs(path, {DOWN: LayerInputs(np.zeros(1024, np.float32), blocks, 3)}, {})
    return path


def test_what_does_not_fit_is_refused(flux, tmp_path, inputs):
    with pytest.raises(UsageError, match="diffquant calibrate MODEL --inputs"):
        plan_of(flux, request("feedback"))
    with pytest.raises(UsageError, match="--rounding feedback"):
        plan_of(flux, request("nearest"), inputs)
    other = measured(tmp_path / "sd.safetensors", {QKV: 256}, "sd15")
    with open_inputs(other) as found, pytest.raises(UsageError, match="sd15 model"):
        plan_of(flux, request("feedback"), found)
    narrow = measured(tmp_path / "n.safetensors", {QKV: 128})
    with open_inputs(narrow) as found, pytest.raises(UnsupportedShape, match="128 columns"):
        plan_of(flux, request("feedback"), found)


@pytest.mark.parametrize("name", ["nf4", "nf4_dq", "nvfp4", "int8_rowwise", "fp8_scaled"])
def test_files_have_the_same_layout_and_lower_errors(flux, tmp_path, load, inputs, name):
    plain, fed = tmp_path / "plain.safetensors", tmp_path / "fed.safetensors"
    run_job(flux, plain, request("nearest", name))
    report = run_job(flux, fed, request("feedback", name), inputs=inputs)
    before, (after, metadata) = load(plain)[0], load(fed)
    assert {k: v[:2] for k, v in before.items()} == {k: v[:2] for k, v in after.items()}
    assert metadata["diffquant.rounding"] == "feedback"
    assert metadata["diffquant.rounding.inputs"] == "in.safetensors"
    assert len(metadata["diffquant.rounding.inputs.fingerprint"]) == 64
    row = next(row for row in report.tensors if row.key == QKV)
    assert row.rounding == "feedback"
    assert row.weighted_error < row.error
    assert row.verdict == "pass"
    with open_source(plain) as source:
        assert "diffquant.rounding" not in source.metadata


# nf4_dq is nf4 with its scales packed once more.
@pytest.mark.parametrize("name", [pytest.param("nf4", marks=pytest.mark.slow), "nf4_dq", "nvfp4"])
def test_bytes_do_not_depend_on_workers(flux, tmp_path, inputs, name, monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 1 << 15)
    made = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.safetensors"
        run_job(flux, out, request("feedback", name), inputs=inputs, workers=workers)
        made.append(out.read_bytes())
    assert made[0] == made[1]


def test_the_covariance_counts_in_the_plans_memory(flux, inputs):
    plain = engine.peak_nbytes(plan_of(flux, request("nearest")), 2)
    fed = engine.peak_nbytes(plan_of(flux, request("feedback"), inputs), 2)
    assert fed > plain
    assert fed > 2 * feedback_nbytes(1024) > 2 * 6 * 8 * 1024**2


def test_an_interrupted_run_goes_on_with_its_errors(flux, tmp_path, inputs):
    whole = tmp_path / "whole.safetensors"
    expected = run_job(flux, whole, request("feedback"), inputs=inputs)
    out = tmp_path / "out.safetensors"

    class Stop:
        """Interrupt after some progress."""

        def __init__(self):
            self.left = 60

        def start(self, *_a, **_k): ...
        def stop(self): ...
        def advance(self, *_a):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(
            flux, out, request("feedback"), inputs=inputs, resume=True, workers=1, progress=Stop()
        )
    found = run_job(flux, out, request("feedback"), inputs=inputs, resume=True)
    assert found.continued > 0
    assert out.read_bytes() == whole.read_bytes()
    assert [r.weighted_error for r in found.tensors] == [r.weighted_error for r in expected.tensors]


def test_search_is_weighted_by_inputs_where_they_are_known(flux, tmp_path, inputs):
    plan = plan_of(flux, request("search"), inputs)
    assert of(plan)[QKV] == ("search", "type's base; scales searched, weighted by inputs")
    assert plan.importance[QKV].shape == (256,)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    run_job(flux, a, request("search"), inputs=inputs)
    run_job(flux, b, request("search"))
    assert a.read_bytes() != b.read_bytes()
