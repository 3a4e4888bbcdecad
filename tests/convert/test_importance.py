"""Importance in a plan: names, reasons, refusals, what the encoder and the header get."""

from dataclasses import replace

import numpy as np
import pytest

from diffquant.convert import chunk_work
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.core.errors import ImportanceRequired, UnsupportedShape, UsageError
from diffquant.io import open_source
from diffquant.io.imatrix import Entry, ImportanceMatrix
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named

QKV = "double_blocks.0.img_attn.qkv.weight"
LINEAR1 = "single_blocks.0.linear1.weight"


def matrix_of(columns, **fields):
    entries = {
        name: Entry(np.arange(1.0, width + 1).reshape(1, -1), np.array([2]))
        for name, width in columns.items()
    }
    return ImportanceMatrix(entries, files=("m.gguf",), **fields)


@pytest.fixture
def weigh(monkeypatch):
    """Let q8_0 weigh errors: "optional" or "required"."""

    def set_importance(kind):
        monkeypatch.setitem(FORMATS, "q8_0", replace(FORMATS["q8_0"], importance=kind))

    return set_importance


def plan_of(source, matrix, rules=()):
    with opened(source) as (_, logical, match):
        request = Request("gguf", type=type_named("q8_0"), rules=rules)
        return make_plan(logical, match, request, matrix=matrix)


def reasons(plan):
    return {step.key: step.decision.reason for step in plan.steps}


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model."], ids=["bare", "sd.cpp", "short"]
)
def test_entries_are_found_under_every_prefix(examples, weigh, prefix):
    weigh("optional")
    plan = plan_of(examples / "flux1-shapes", matrix_of({prefix + QKV: 256, prefix + LINEAR1: 256}))
    assert set(plan.importance) == {QKV, LINEAR1}
    expected = np.arange(1, 257, dtype=np.float32) / 2
    assert np.array_equal(plan.importance[QKV], expected)
    assert reasons(plan)[QKV] == "type's base; with importance"


@pytest.mark.parametrize("lead", ["transformer/", ""])
def test_names_of_the_source_reach_the_fused_weight(examples, weigh, lead):
    weigh("optional")
    name = f"{lead}transformer_blocks.0.attn.to_k.weight"
    plan = plan_of(examples / "flux1-shapes", matrix_of({name: 256}))
    assert set(plan.importance) == {QKV}
    assert not [text for text in plan.warnings if "belong to no tensor" in text]


def test_what_the_matrix_lacks_and_what_the_model_lacks_is_said(examples, weigh):
    weigh("optional")
    plan = plan_of(examples / "flux1-shapes", matrix_of({QKV: 256, "blk.0.weight": 4}))
    assert reasons(plan)[LINEAR1] == "type's base; no importance for it in the matrix"
    kept = {step.key for step in plan.steps if step.decision.format != "q8_0"}
    assert not [key for key in kept if "importance" in reasons(plan)[key]]
    told = [text for text in plan.warnings if "m.gguf" in text]
    assert "1 of 2 entries belong to no tensor written here: blk.0.weight" in told[0]
    lacking = sum(step.decision.format == "q8_0" for step in plan.steps) - 1
    assert f"nothing on {lacking} tensors" in told[1]


def test_without_a_matrix_nothing_is_said_of_importance(examples, weigh):
    weigh("optional")
    plan = plan_of(examples / "flux1-shapes", None)
    assert plan.importance == {}
    assert not [text for text in (*reasons(plan).values(), *plan.warnings) if "importance" in text]


def test_a_matrix_that_no_format_uses_is_said_to_change_nothing(examples):
    plan = plan_of(examples / "flux1-shapes", matrix_of({QKV: 256}))
    assert plan.importance == {}
    assert any("importance matrix changes nothing" in text for text in plan.warnings)


def test_a_wrong_length_names_both_numbers(examples, weigh):
    weigh("optional")
    with pytest.raises(UnsupportedShape, match=f"'{QKV}' has 255 values, the weight has 256"):
        plan_of(examples / "flux1-shapes", matrix_of({QKV: 255}))


def test_a_matrix_of_another_model_is_refused(examples, weigh):
    weigh("optional")
    with pytest.raises(UsageError, match="no entry belongs to this flux1 model"):
        plan_of(examples / "flux1-shapes", matrix_of({"blk.0.attn_q.weight": 256}))


def test_a_format_that_needs_importance_is_refused_without(examples, weigh):
    weigh("required")
    with pytest.raises(ImportanceRequired, match=r"\(q8_0: single_blocks.* --imatrix FILE"):
        plan_of(examples / "flux1-shapes", None)
    with pytest.raises(ImportanceRequired, match=r"m\.gguf has no entry .*--tensor-type 'single"):
        plan_of(examples / "flux1-shapes", matrix_of({LINEAR1: 256}))


def test_a_format_that_needs_importance_is_planned_with_it(examples, weigh):
    weigh("required")
    others = Rule(f"^(?!{QKV})", "f16", "others")
    plan = plan_of(examples / "flux1-shapes", matrix_of({QKV: 256}), rules=(others,))
    assert reasons(plan)[QKV] == "type's base; with importance"


def test_the_encoder_gets_the_values_and_the_header_names_the_matrix(
    examples, tmp_path, weigh, monkeypatch
):
    weigh("optional")
    given = []

    def spy(codec, operation):
        found = backend(codec, operation)

        def encode(weight, stats, *, importance, fmt):
            given.append(importance)
            return found(weight, stats, fmt=fmt)

        return encode if (codec, operation) == ("q8_0", "encode") else found

    backend = chunk_work.backend
    monkeypatch.setattr(chunk_work, "backend", spy)
    matrix = matrix_of({QKV: 256}, datasets=("/home/me/p.txt", "C:\\me\\q.txt"), chunk_count=12)
    out = tmp_path / "out.gguf"
    run_job(examples / "flux1-shapes", out, Request("gguf", type=type_named("q8_0")), matrix=matrix)
    weighed = [one for one in given if one is not None]
    assert len(weighed) == 1
    assert len(given) > 1
    assert np.array_equal(weighed[0], np.arange(1, 257, dtype=np.float32) / 2)
    with open_source(out) as source:
        found = {k: v for k, v in source.metadata.items() if k.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": "m.gguf",
        "quantize.imatrix.dataset": "p.txt, q.txt",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 12,
    }


def test_a_matrix_that_is_not_used_leaves_no_trace(examples, tmp_path):
    digests = []
    for name, matrix in (("a.gguf", None), ("b.gguf", matrix_of({QKV: 256}))):
        request = Request("gguf", type=type_named("q8_0"))
        run_job(examples / "flux1-shapes", tmp_path / name, request, matrix=matrix)
        digests.append((tmp_path / name).read_bytes())
    assert digests[0] == digests[1]


def test_rows_stored_flat_are_encoded_without_importance_and_say_so(examples, tmp_path):
    source = examples / "sd15-shapes"
    request = Request("gguf", type=type_named("q4_k_s"), target="comfyui-gguf")
    with opened(source) as (_, logical, match):
        flat = next(
            step
            for step in make_plan(logical, match, request).steps
            if step.flat and len(step.assignment.shape) == 2
        )
        columns = flat.assignment.shape[1]
        plan = make_plan(logical, match, request, matrix=matrix_of({flat.key: columns}))
    assert "cut across its columns" in reasons(plan)[flat.key]
    assert flat.key not in plan.importance
    run_job(source, tmp_path / "out.gguf", request, matrix=matrix_of({flat.key: columns}))
