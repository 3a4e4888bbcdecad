"""Allocations meet their budget to the byte they count, and leave alone what is not theirs."""

from __future__ import annotations

import json
import lzma
import random
from math import exp, prod
from pathlib import Path

import pytest

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.allocation_options import among_from
from diffquant.convert.budgets import Budget
from diffquant.convert.footprint import CONTEXT_NBYTES
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.convert.sensitivity import Sensitivity, write_sensitivity
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.inspect.fit import fit
from diffquant.inspect.subject import open_subject
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named

MODELS = ("sd15-shapes", "sdxl-shapes", "flux1-shapes", "qwen-image-shapes")
DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
GIB = 1 << 30


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))


def by_size(nbytes, *among):
    return Budget("file", nbytes, f"--max-size {nbytes}", among)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("suffix", "share", "among"),
    [
        (".gguf", 0.3, ()),
        (".safetensors", 0.7, ("fp8_scaled", "int8_rowwise", "w4a8", "bf16", "f16")),
    ],
)
def test_files_are_within_a_percent_of_the_size_asked_for_and_never_over(
    examples, tmp_path, model, suffix, share, among
):
    src, container = examples / model, suffix[1:]
    first = allocate_bits(src, Request(container), by_size(1 << 40, *among)).report
    assert any("all is finest" in note for note in first.notes)
    assert first.nbytes == first.largest_nbytes
    largest_type = max(row.nbytes for row in first.published)  # above it formats lie far apart
    limit = int(first.smallest_nbytes + share * (largest_type - first.smallest_nbytes))
    found = allocate_bits(src, Request(container), by_size(limit, *among))
    out = tmp_path / f"{share}{suffix}"
    report = run_job(src, out, found.request)
    assert out.stat().st_size == found.report.nbytes
    assert 0.99 * limit <= out.stat().st_size <= limit
    assert report.policy == "allocated"
    assert report.verdict == "pass"
    assert report.type == f"{report.bits_per_weight:.2f}bpw"
    rows = {row.key: row for row in report.tensors if row.part == "denoiser"}
    assert {one.key: one.format for one in found.report.tensors} == {
        one.key: rows[one.key].stored for one in found.report.tensors
    }
    assert not report.warnings


def test_what_types_keep_is_kept_and_the_rest_is_chosen(examples):
    src = examples / "flux1-shapes"
    plain = run_job(
        src, Path("x.gguf"), Request("gguf", type=type_named("q4_0")), dry_run=True
    ).tensors
    found = allocate_bits(src, Request("gguf"), by_size(3_000_000))
    mixed = run_job(src, Path("x.gguf"), found.request, dry_run=True).tensors
    chosen = {one.key for one in found.report.tensors}
    assert chosen == {row.key for row in plain if row.stored == "q4_0"}
    assert [row.stored for row in plain if row.key not in chosen] == [
        row.stored for row in mixed if row.key not in chosen
    ]
    assert {row.reason for row in mixed if row.key in chosen} == {"allocated"}


def test_user_rules_and_targets_hold(examples):
    rules = (
        Rule("img_mod", None, "--exclude img_mod"),
        Rule("linear1", "q5_0", "--tensor-type linear1=q5_0"),
    )
    request = Request("gguf", rules=rules, target="comfyui-gguf")
    found = allocate_bits(examples / "flux1-shapes", request, by_size(3_300_000))
    rows = run_job(examples / "flux1-shapes", Path("x.gguf"), found.request, dry_run=True)
    assert rows.nbytes <= 3_300_000
    assert rows.target == "comfyui-gguf"
    stored = {row.key: row for row in rows.tensors}
    assert stored["double_blocks.0.img_mod.lin.weight"].stored == "bf16"
    assert stored["single_blocks.0.linear1.weight"].stored == "q5_0"
    assert {one.key for one in found.report.tensors}.isdisjoint(
        key for key in stored if "img_mod" in key or "linear1" in key
    )


def test_convolutions_that_a_target_reshapes_are_chosen_for_too(examples):
    src = examples / "sd15-shapes"
    for target, packed in (("universal", False), ("comfyui-gguf", True)):
        request = Request("gguf", target=target)
        found = allocate_bits(src, request, Budget("denoiser", 12.0, "--bpw 12"))
        convs = [one.key for one in found.report.tensors if "in_layers" in one.key]
        assert bool(convs) is packed


def test_bits_per_weight_are_those_of_the_report(examples):
    found = allocate_bits(
        examples / "flux1-shapes", Request("gguf"), Budget("denoiser", 6.0, "--bpw 6")
    )
    rows = run_job(examples / "flux1-shapes", Path("x.gguf"), found.request, dry_run=True)
    assert 5.94 <= rows.bits_per_weight <= 6.0


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (by_size(2_000_000), r"takes 2,3\d\d,\d{3} to 7,9\d\d,\d{3} bytes \(for universal\)"),
        (Budget("denoiser", 4.0, "--bpw 4"), r"takes 4\.7\d+ to 16\.\d+ bits per weight"),
        (Budget("device", 1 << 20, "--vram 1MiB"), "the denoiser's step on a device takes"),
        (by_size(3_000_000, "nf4"), "no reader of it has nf4"),
        (by_size(3_000_000, "bf16"), "nothing quantized to choose"),
        (by_size(3_000_000, "int8_convrot_64"), "a format of no type"),
    ],
)
def test_what_cannot_be_met_is_told_with_the_range(examples, budget, message):
    with pytest.raises(UsageError, match=message):
        allocate_bits(examples / "flux1-shapes", Request("gguf"), budget)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("folder"), "single files"),
        (Request("safetensors", all_parts=True), "leave out --all"),
        (Request("safetensors", parts=("denoiser", "vae")), "leave out --all, and write parts one"),
        (Request("safetensors", parts=("vae",)), "vae is a vae_kl: quantize it by type"),
        (Request("safetensors", parts=("nothing",)), "no part nothing in this flux1 source"),
        (Request("gguf", rules=(Rule("", None, "--exclude ."),)), "rules and shapes decide all"),
    ],
)
def test_requests_that_leave_nothing_to_choose_are_refused(examples, request_, message):
    with pytest.raises(UsageError, match=message):
        allocate_bits(examples / "flux1-shapes", request_, by_size(3_000_000))


def test_names_may_be_types_or_formats_and_one_reader_has_them_all():
    assert among_from(("Q4_K_M", "q4_k", "q8_0"), "gguf", "").packed == ("q4_k", "q8_0")
    assert among_from(("nvfp4", "fp8_scaled"), "safetensors", "").names == (
        "nvfp4_comfy", "fp8_e4m3_scaled",
    )  # fmt: skip
    assert among_from(("nf4", "bf16"), "safetensors", "").target.name == "forge"
    assert among_from((), "safetensors", "forge").packed == ("nf4",)
    assert "iq4_xs" in among_from((), "gguf", "comfyui-gguf").packed
    assert "iq4_xs" not in among_from((), "gguf", "").packed
    assert among_from(("iq3_s",), "gguf", "").target.name == "sdcpp"
    with pytest.raises(UsageError, match="no one reader has them all"):
        among_from(("nf4", "fp8_scaled"), "safetensors", "")
    with pytest.raises(UnknownFormat, match="did you mean 'q4_k'"):
        among_from(("q4_q",), "gguf", "")


def sensitivity_file(path, keys, source="", architecture="flux1"):
    """Errors as formats have them, on tensors that matter differently."""
    rng = random.Random(0)
    errors = {}
    for key in keys:
        weight = exp(rng.gauss(0, 1.5))
        errors[key] = {
            row.name: weight * row.gaussian_error**2 * rng.uniform(0.8, 1.25)
            for row in FORMATS.values()
            if row.encodes
        }
    write_sensitivity(path, Sensitivity(architecture, "outputs", "made up", source, errors, {}))
    return path


@pytest.fixture(scope="module")
def full_flux(tmp_path_factory):
    """Flux.1 of full size, 23.8 GB of which none are on the disk, and a sensitivity of it."""
    shapes = json.loads(lzma.decompress(DATA.read_bytes()))["flux-dev.transformer.original"]
    folder, header, at = tmp_path_factory.mktemp("full"), {}, 0
    for key, shape in shapes.items():
        size = prod(shape) * 2
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "flux.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    keys = [key for key, shape in shapes.items() if len(shape) > 1]
    return folder / "flux.safetensors", sensitivity_file(folder / "s.json", keys)


@pytest.mark.parametrize(
    ("container", "budget"),
    [
        ("gguf", by_size(6_000_000_000)),
        ("gguf", by_size(4_200_000_000)),
        ("gguf", Budget("denoiser", 4.6, "--bpw 4.6")),
        ("safetensors", by_size(9_000_000_000, "fp8_scaled", "int8_rowwise", "w4a8")),
    ],
)
def test_full_size_flux_meets_budgets_within_a_thousandth(full_flux, container, budget):
    path, sensitivity = full_flux
    found = allocate_bits(path, Request(container), budget, sensitivity=sensitivity)
    report = found.report
    assert 0.999 * report.limit_nbytes <= report.nbytes <= report.limit_nbytes
    assert report.exact
    assert report.error <= 1.002 * report.bound
    for row in report.published:
        assert row.error is None or row.allocated <= row.error


def test_a_device_is_filled_as_the_fit_counts_it(full_flux):
    """The oracle is `inspect --vram` on the file that the plan would write."""
    path, sensitivity = full_flux
    budget = Budget("device", 8 * GIB, "--vram 8GiB")
    found = allocate_bits(path, Request("gguf"), budget, sensitivity=sensitivity)
    assert 0.99 * 8 * GIB <= found.report.nbytes <= 8 * GIB
    with open_subject(path) as subject:
        stage = next(one for one in fit(subject).stages if one.name == "denoise")
    weights = run_job(path, Path("x.gguf"), found.request, dry_run=True, verify="none").nbytes
    least = weights + stage.activations_nbytes + CONTEXT_NBYTES["cuda"]
    assert least <= found.report.nbytes <= least + 0.2 * GIB  # and one weight decoded
    assert any("T5-XXL" in note for note in found.report.notes)


def test_a_named_sensitivity_decides_and_what_it_lacks_is_said(examples, tmp_path):
    src = examples / "flux1-shapes"
    first = allocate_bits(src, Request("gguf"), by_size(3_000_000)).report
    keys = [one.key for one in first.tensors]
    loud = keys[3]
    errors = {
        key: {name: (1e3 if key == loud else 1e-3) * 4**-bits for name, bits in _BITS.items()}
        for key in keys[:-1]
    }
    path = tmp_path / "s.json"
    write_sensitivity(path, Sensitivity("flux1", "outputs", "u", "", errors, {}))
    found = allocate_bits(src, Request("gguf"), by_size(3_800_000), sensitivity=path).report
    formats = {one.key: one.format for one in found.tensors}
    assert formats[loud] in ("bf16", "q8_0")
    assert set(formats.values()) - {"bf16"} <= _BITS.keys()
    assert formats[keys[-1]] == "bf16"
    assert any("1 tensors were not measured" in note for note in found.notes)
    assert any("not offered" in note and "q4_0" in note for note in found.notes)
    assert found.method == "outputs"
    other = sensitivity_file(tmp_path / "sdxl.json", keys, architecture="sdxl")
    with pytest.raises(UsageError, match="is of sdxl, the source is flux1"):
        allocate_bits(src, Request("gguf"), by_size(3_000_000), sensitivity=other)
    strange = sensitivity_file(tmp_path / "strange.json", ["a.weight"])
    with pytest.raises(UsageError, match="knows none of the tensors"):
        allocate_bits(src, Request("gguf"), by_size(3_000_000), sensitivity=strange)


_BITS = {"q2_k": 2.6, "q4_k": 4.5, "q8_0": 8.5}


def test_an_importance_matrix_weighs_errors_and_is_named(examples, matrix_for):
    from diffquant.convert.jobs import opened

    src = examples / "flux1-shapes"
    with opened(src) as (_, logical, match):
        matrix = matrix_for("iq2_xs", logical, match)
    found = allocate_bits(src, Request("gguf"), by_size(3_000_000), matrix=matrix)
    assert "weights and importance" in found.report.sensitivity
    report = run_job(src, Path("x.gguf"), found.request, dry_run=True, matrix=matrix)
    assert any(row.reason == "allocated; with importance" for row in report.tensors)
