"""Budgets beyond the layers that types pack: what types keep, and text encoders on their own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.budgets import Budget, budget_of
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.convert.sensitivity import Sensitivity, write_sensitivity
from diffquant.core.errors import UsageError
from diffquant.inspect.loaders import judge
from diffquant.io import open_source
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named

MODELS = ("sd15-shapes", "sdxl-shapes", "flux1-shapes", "qwen-image-shapes")
# What `--free-kept` may choose for, written down apart from the tables that say so.
FREED = {
    "sd15-shapes": {"time_embed.0", "time_embed.2"},
    "sdxl-shapes": {"time_embed.0", "time_embed.2"},
    "flux1-shapes": {
        "time_in.in_layer", "time_in.out_layer", "guidance_in.in_layer", "guidance_in.out_layer",
        "final_layer.linear", "final_layer.adaLN_modulation.1",
    },
    "qwen-image-shapes": {
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear", "proj_out",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))


def free(nbytes, *among):
    return Budget("file", nbytes, f"--max-size {nbytes}", among, free_kept=True)


def of_size(src, kind):
    return run_job(src, Path("x.gguf"), Request("gguf", type=type_named(kind)), dry_run=True)


@pytest.mark.parametrize("model", MODELS)
def test_freed_layers_are_named_with_their_reason_in_plan_report_and_header(
    examples, tmp_path, model
):
    src, out = examples / model, tmp_path / "freed.gguf"
    plain = {row.key: row for row in of_size(src, "q8_0").tensors}
    budget = free(
        allocate_bits(src, Request("gguf"), free(1 << 40)).report.smallest_nbytes * 5 // 4
    )
    found = allocate_bits(src, Request("gguf"), budget)
    assert {one.key.removesuffix(".weight") for one in found.report.freed} == FREED[model]
    report = run_job(src, out, found.request)
    assert (report.verdict, report.warnings) == ("pass", ())
    assert out.stat().st_size == found.report.nbytes <= budget.value
    rows = {row.key: row for row in report.tensors}
    freed = [one for one in found.report.freed if one.format != one.kept_as]
    assert freed
    for one in found.report.freed:
        kept = plain[one.key]
        assert kept.stored == one.kept_as in ("bf16", "f16")
        assert kept.reason.removesuffix(f"; already {kept.stored}") == one.reason
        assert rows[one.key].stored == one.format
        assert rows[one.key].reason == (
            f"allocated; freed, types keep it {one.kept_as}: {one.reason}"
            if one in freed
            else kept.reason
        )
        assert one.saves_nbytes >= 0
    assert report.policy == f"allocated, freed: {len(freed)}"
    with open_source(out) as source:
        header = source.metadata
        stored = {key: spec.dtype.lower() for key, spec in source.specs.items()}
    assert header["diffquant.policy"] == report.policy
    assert "; with --free-kept; among: " in header["diffquant.allocation"]
    assert {stored[rows[one.key].target] for one in freed} == {one.format for one in freed}


@pytest.mark.parametrize("model", MODELS)
def test_what_loaders_do_not_unpack_stays_and_every_gguf_reader_takes_the_file(
    examples, tmp_path, model
):
    src, out = examples / model, tmp_path / "freed.gguf"
    small = allocate_bits(src, Request("gguf"), free(1 << 40)).report.smallest_nbytes
    found = allocate_bits(src, Request("gguf"), free(small))
    report = run_job(src, out, found.request)
    published = tmp_path / "published.gguf"
    run_job(src, published, Request("gguf", type=type_named("q4_k_s")))
    chosen = {one.key for one in found.report.tensors}
    for row in report.tensors:
        if row.key not in chosen:
            assert row.stored in ("f32", "f16", "bf16")
    verdicts = [[(one.loader, one.verdict) for one in judge(path)] for path in (published, out)]
    assert verdicts[0] == verdicts[1]


def test_only_linear_layers_whose_width_no_loader_reads_are_marked():
    marked = {
        row.pattern: row
        for architecture in ARCHITECTURES.values()
        for row in (*architecture.keep, *architecture.tuned_keep)
        if row.frees
    }
    assert marked
    assert not [one for one in marked.values() if one.table or "detection" in one.reason]
    assert not [one for one in marked.values() if "convolution" in one.reason]


@pytest.mark.parametrize(("dtype", "kept"), [("", "bf16"), ("f32", "f16")])
def test_the_formats_that_were_named_do_not_force_a_kept_layer_down(
    examples, tmp_path, dtype, kept
):
    """Kept as types have it: where a measurement knows nothing of a layer, or only its worst."""
    src = examples / "flux1-shapes"
    if dtype:
        src = tmp_path / "wide.safetensors"
        asked = Request("safetensors", dtype=dtype, parts=("denoiser",))
        run_job(examples / "flux1-shapes", src, asked)
    first = allocate_bits(src, Request("gguf"), free(3_000_000, "q4_k", "q8_0")).report
    freed = {one.key for one in first.freed}
    errors = {
        one.key: {"q4_k": 0.1, "q8_0": 0.001} for one in first.tensors if one.key not in freed
    }
    errors["time_in.in_layer.weight"] = {"q4_k": 100.0, "q8_0": 50.0}
    write_sensitivity(tmp_path / "s.json", Sensitivity("flux1", "outputs", "u", "", errors, {}))
    found = allocate_bits(
        src,
        Request("gguf"),
        free(first.smallest_nbytes * 3 // 2, "q4_k", "q8_0"),
        sensitivity=tmp_path / "s.json",
    ).report
    assert {one.format for one in found.freed} == {kept}
    assert {one.key for one in found.freed} == freed


def test_a_rule_of_the_user_holds_for_freed_layers_too(examples):
    rules = (
        Rule("time_in", None, "--exclude time_in"),
        Rule("guidance_in", "q8_0", "--tensor-type guidance_in=q8_0"),
    )
    found = allocate_bits(examples / "flux1-shapes", Request("gguf", rules=rules), free(3_000_000))
    assert {one.key.partition(".")[0] for one in found.report.freed} == {"final_layer"}
    report = run_job(examples / "flux1-shapes", Path("x.gguf"), found.request, dry_run=True)
    stored = {row.key: row.stored for row in report.tensors}
    assert stored["time_in.in_layer.weight"] == "bf16"
    assert stored["guidance_in.in_layer.weight"] == "q8_0"


def test_without_the_option_nothing_is_freed(examples):
    budget = replace(free(3_000_000), free_kept=False)
    found = allocate_bits(examples / "flux1-shapes", Request("gguf"), budget)
    assert found.report.freed == ()
    assert not {one.key for one in found.report.tensors} & {
        f"{key}.weight" for key in FREED["flux1-shapes"]
    }
    assert found.request.recipe.reasons == {}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("safetensors"), "--free-kept is for .gguf files"),
        (Request("gguf", parts=("text_encoder_2",)), "of no layer that types keep of this"),
    ],
)
def test_freeing_is_refused_where_readers_are_not_known(examples, request_, message):
    with pytest.raises(UsageError, match=message):
        allocate_bits(examples / "flux1-shapes", request_, free(3_000_000))


@pytest.fixture(scope="module")
def t5(examples, tmp_path_factory):
    """A text encoder in a file of its own."""
    path = tmp_path_factory.mktemp("t5") / "t5.safetensors"
    shutil.copy(examples / "flux1-shapes" / "text_encoder_2" / "model.safetensors", path)
    return path


@pytest.mark.parametrize(
    ("suffix", "nbytes", "target"),
    [(".gguf", 250_000, "comfyui-gguf"), (".safetensors", 300_000, "comfyui")],
)
def test_a_text_encoder_alone_meets_a_size(t5, tmp_path, suffix, nbytes, target):
    out = tmp_path / f"t5{suffix}"
    budget = budget_of("--max-size", f"{nbytes}")
    among = () if suffix == ".gguf" else ("fp8_scaled", "w4a8", "bf16")
    found = allocate_bits(t5, Request(suffix[1:]), replace(budget, among=among))
    report = run_job(t5, out, found.request)
    assert 0.95 * nbytes <= out.stat().st_size == found.report.nbytes <= nbytes
    assert (report.verdict, report.target) == ("pass", target)
    assert report.policy == "allocated"
    assert found.report.part == "text_encoder_3"
    assert "weights alone" in found.report.sensitivity
    assert "against a named type of the size this is no safe gain" in found.report.notes[0]
    vectors = {row.stored for row in report.tensors if "layer_norm" in row.key}
    assert vectors
    assert vectors <= {"f32", "bf16"}


@pytest.mark.parametrize("among", [(), ("q3_k", "q4_k")])
def test_a_token_embedding_is_never_below_q6_k(t5, among):
    budget = budget_of("--bpw", 5.0, among)
    found = allocate_bits(t5, Request("gguf"), budget)
    report = run_job(t5, Path("x.gguf"), found.request, dry_run=True)
    stored = {row.key: row.stored for row in report.tensors}
    assert stored["shared.weight"] == "q6_k"
    assert "q4_k" in stored.values()
    assert report.bits_per_weight <= 5.0


def test_one_part_of_a_pipeline_is_chosen_for_and_the_header_of_base_counts(examples, tmp_path):
    src, out = examples / "flux1-shapes", tmp_path / "t5.gguf"
    request = Request("gguf", parts=("text_encoder_2",))
    found = allocate_bits(src, request, budget_of("--max-size", "250kB"))
    run_job(src, out, found.request)
    assert out.stat().st_size == found.report.nbytes <= 250_000
    # The tokenizer of another folder goes into the header, and takes bytes of the budget.
    alone = examples / "flux1-shapes" / "text_encoder_2" / "model.safetensors"
    sizes = []
    for base in (None, src):
        found = allocate_bits(alone, Request("gguf"), budget_of("--max-size", "250kB"), base=base)
        run_job(alone, out, found.request, base=base, force=True)
        assert out.stat().st_size == found.report.nbytes <= 250_000
        with open_source(out) as source:
            sizes.append(len(source.metadata))
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": Path("s.json")}, "s.json: sensitivities are measured of denoisers"),
        ({"option": "--vram"}, "counts the memory of a denoiser's step"),
        ({"nbytes": "10kB"}, r"takes 1\d\d,\d{3} to 7\d\d,\d{3} bytes \(for comfyui-gguf\)"),
    ],
)
def test_what_makes_no_sense_for_a_text_encoder_is_refused(t5, options, message):
    budget = budget_of(options.pop("option", "--max-size"), options.pop("nbytes", "250kB"))
    with pytest.raises(UsageError, match=message):
        allocate_bits(t5, Request("gguf"), budget, **options)
