"""Comparisons: rows, floor and control, what is refused, and what broken files come to."""

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import ArchitectureError, MappingError, UsageError
from diffquant.quant.types import type_named
from diffquant.runtime.compare_files import compare_files
from diffquant.runtime.compare_rows import unseen
from diffquant.runtime.compare_settings import (
    DEFAULT_METRICS,
    CompareSettings,
    default_metrics,
    row_names,
)
from diffquant.runtime.comparison import METRICS, PairValues, Row, Value
from diffquant.runtime.engines import EngineFiles, bundled
from diffquant.runtime.gates import GATES, judge_gate
from diffquant.runtime.judges import Pooled
from diffquant.runtime.memory.budget import Asked
from diffquant.runtime.memory.rungs import Rung
from diffquant.runtime.metrics.values import value_of
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.scorers import DEMO_PROMPTS
from diffquant.runtime.verify import verify
from diffquant.runtime.weight_errors import weigh

EXAMPLES = Path(__file__).parents[2] / "examples"
FLUX, SD15 = EXAMPLES / "flux1-shapes", EXAMPLES / "sd15-shapes"
SETTINGS = CompareSettings(
    DEMO_PROMPTS[1:3], (5,), 2, size=(64, 64), metrics=("psnr", "ssim", "flip", "prompt")
)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """flux1-shapes as q8_0 and q4_0 GGUF, and everything as fp8."""
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for name, suffix, part in (
        ("q8_0", ".gguf", {}), ("q4_0", ".gguf", {}), ("fp8_scaled", ".safetensors", {}),
    ):  # fmt: skip
        out = folder / f"flux-{name}{suffix}"
        run_job(FLUX, out, Request(container_for(out), type=type_named(name), **part))
        made[name] = out
    out = folder / "t5.gguf"
    run_job(FLUX, out, Request("gguf", type=type_named("q4_0"), parts=("text_encoder_2",)))
    made["t5"] = out
    return made


@pytest.fixture(scope="module")
def compared(files):
    return compare_files(FLUX, [files["q8_0"], files["q4_0"]], SETTINGS)


def test_rows_are_the_files_in_order_then_floor_and_control(compared):
    comparison, pictures = compared
    assert [(row.name, row.kind) for row in comparison.rows] == [
        ("flux-q8_0.gguf", "candidate"),
        ("flux-q4_0.gguf", "candidate"),
        ("noise floor", "floor"),
        ("control", "control"),
    ]
    assert [row.type for row in comparison.candidates] == ["q8_0", "q4_0"]
    assert list(pictures.rows) == ["noise floor", "flux-q8_0.gguf", "control", "flux-q4_0.gguf"]
    assert all(len(found) == 2 for found in (pictures.reference, *pictures.rows.values()))
    assert pictures.reference[0].shape == (64, 64, 3)


def test_finer_types_are_nearer_by_every_metric_and_the_control_is_further(compared):
    comparison, _ = compared
    fine, coarse, _, control = comparison.rows
    for name in ("psnr", "ssim", "flip"):
        sign = 1 if METRICS[name].better == "up" else -1
        found = [sign * row.values[name].mean for row in (fine, coarse, control)]
        assert found == sorted(found, reverse=True), name
    assert fine.weight_error < coarse.weight_error
    assert fine.latent_error < coarse.latent_error < control.latent_error
    assert not comparison.warnings


def test_a_row_tells_size_bits_layers_memory_and_seconds(compared, files):
    row = compared[0].candidates[0]
    weighed = weigh(files["q8_0"], FLUX)
    assert row.nbytes == weighed.nbytes > 0
    assert row.weight_error == weighed.tensors.error
    assert len(row.layers) == weighed.tensors.compared == 52
    assert {layer.part for layer in row.layers} == {"denoiser"}
    assert sum(layer.nbytes for layer in row.layers) <= files["q8_0"].stat().st_size
    assert 8.5 < row.bits_per_weight < 16
    assert row.stored.startswith("q8_0 8")
    assert row.seconds > 0
    assert row.peak_mib > 50
    assert compared[0].part == "denoiser"
    assert compared[0].reference_peak_mib > 50
    assert not row.verdict  # without gates nothing is judged


def test_numbers_are_those_of_verify(compared, files):
    from diffquant.runtime.compare import ImageSettings

    row = compared[0].candidates[1]
    settings = ImageSettings(SETTINGS.prompts, (5,), 2, size=(64, 64), min_psnr=5)
    image = verify(files["q4_0"], FLUX, settings=settings).image
    assert row.values["psnr"].mean == pytest.approx(image.psnr_db, rel=1e-12)
    assert row.values["ssim"].mean == pytest.approx(image.ssim, rel=1e-12)
    assert (row.values["psnr"].low, row.values["psnr"].high) == pytest.approx(image.interval_db)
    floor = compared[0].rows[2].values["psnr"].mean
    assert floor == pytest.approx(image.noise_floor_psnr_db, rel=1e-12)


def test_the_same_weights_under_another_name_are_identical(tmp_path):
    out = tmp_path / "same.safetensors"
    run_job(FLUX, out, Request("safetensors", dtype="f32"))
    comparison, _ = compare_files(FLUX, [out], replace(SETTINGS, prompts=SETTINGS.prompts[:1]))
    row = comparison.candidates[0]
    assert row.identical
    assert row.values["psnr"] == Value(None)
    assert row.values["ssim"].mean == 1.0
    assert row.latent_error == 0


def test_one_part_alone_is_taken_from_the_candidate(files):
    settings = replace(SETTINGS, prompts=SETTINGS.prompts[:1], only="text_encoder_2")
    comparison, _ = compare_files(FLUX, [files["t5"], files["fp8_scaled"]], settings)
    packed, same = comparison.candidates
    assert comparison.part == "text_encoder_2"
    assert {layer.part for layer in packed.layers} == {"text_encoder_2"}
    assert not packed.identical
    assert packed.weight_error > 0.05
    assert same.identical  # fp8 in the denoiser alone: its own text encoder is the source's
    assert "text_encoder_2" in comparison.rows[-1].problems[0]


def test_the_denoiser_alone_leaves_other_parts_to_the_reference(files, tmp_path):
    broken = tmp_path / "fp8.safetensors"
    tensors = load_file(files["fp8_scaled"])
    key = next(one for one in tensors if one.endswith("decoder.conv_out.bias"))
    tensors[key] = tensors[key] * 0 + 9
    with safe_open(files["fp8_scaled"], "pt") as opened:
        save_file(tensors, broken, opened.metadata())
    one = replace(SETTINGS, prompts=SETTINGS.prompts[:1])
    alone, _ = compare_files(FLUX, [broken], replace(one, only="denoiser"))
    whole, _ = compare_files(FLUX, [broken], one)
    assert alone.candidates[0].values["psnr"].mean > 30
    assert whole.candidates[0].values["psnr"].mean < 15
    assert whole.part == "denoiser, vae"
    assert whole.candidates[0].verdict == "fail"


def test_a_file_that_draws_nothing_has_a_row_that_says_so(files, tmp_path):
    import gguf

    broken = tmp_path / "nan.gguf"
    broken.write_bytes(files["q8_0"].read_bytes())
    reader = gguf.GGUFReader(broken, "r+")
    tensor = next(one for one in reader.tensors if one.name == "final_layer.linear.bias")
    tensor.data[:] = np.nan if tensor.data.dtype == np.float32 else 255
    reader.data.flush()
    one = replace(SETTINGS, prompts=SETTINGS.prompts[:1])
    comparison, pictures = compare_files(FLUX, [files["q8_0"], broken], one)
    whole, row = comparison.candidates
    assert not whole.verdict
    assert row.verdict == "fail"
    assert all(math.isnan(value.mean) for value in row.values.values())
    assert "not finite" in row.problems[0]
    assert "latents are not finite after step 1 of 2" in row.pairs[0].defects[1]
    assert np.isnan(pictures.rows["nan.gguf"][0]).all()


def test_one_model_is_in_memory_at_a_time(files, monkeypatch):
    from diffquant.runtime.engines import bundled

    alive = []
    own = bundled.open_side

    def open_side(given):
        gc.collect()
        assert [one for one in alive if one() is not None] == []
        side = own(given)
        alive.append(weakref.ref(side.opened.pipeline.parts.denoiser))
        return side

    monkeypatch.setattr(bundled, "open_side", open_side)
    one = replace(SETTINGS, prompts=SETTINGS.prompts[:1], metrics=("psnr",))
    settings = replace(one, keep_pictures=False)
    _, pictures = compare_files(FLUX, [files["q8_0"], files["q4_0"]], settings)
    assert (len(pictures.reference), pictures.rows) == (1, {})
    assert len(alive) == 4  # reference, floor, two candidates


def test_gates_pass_fail_and_prove_themselves(files):
    one = replace(SETTINGS, prompts=SETTINGS.prompts[:1])
    candidates = [files["q8_0"], files["q4_0"]]
    limits = {"min_psnr": 45.0, "max_flip": 0.3, "max_rel_error": 0.05, "min_ssim": 0.5}
    comparison, _ = compare_files(FLUX, candidates, replace(one, limits=limits))
    fine, coarse = comparison.candidates
    assert (fine.verdict, fine.problems) == ("pass", ())
    assert coarse.verdict == "fail"
    assert any("below the gate of 45 dB" in text for text in coarse.problems)
    assert any("weight error" in text for text in coarse.problems)
    assert comparison.gates == {"psnr": 45, "flip": 0.3, "weight_error": 0.05, "ssim": 0.5}
    limits = {"min_psnr": 1.0, "max_lpips": 0.9}
    loose, _ = compare_files(FLUX, candidates[:1], replace(one, limits=limits))
    assert loose.candidates[0].verdict == "fail"
    assert "this gate cannot fail" in loose.candidates[0].problems[0]
    assert "--max-lpips is not kept" in loose.candidates[0].problems[1]
    assert loose.metrics == (*one.metrics, "lpips")


@pytest.mark.parametrize(
    ("change", "candidates", "told"),
    [
        ({}, [], "at least one"),
        ({}, [FLUX], "is the reference itself"),
        ({}, [SD15, EXAMPLES / "." / "sd15-shapes"], "is given twice"),
        ({"prompts": ("a", "a")}, [SD15], "'a' comes twice"),
        ({"seeds": (1, 1)}, [SD15], "seed 1 comes twice"),
        ({"only": "vae", "engine": "diffusers"}, [SD15], "--only takes parts apart"),
        ({"limits": {"min_psnr": math.nan}}, [SD15], "--min-psnr nan"),
    ],
)
def test_requests_that_make_no_sense_are_refused_before_a_file_is_opened(
    change, candidates, told, monkeypatch
):
    monkeypatch.setattr("diffquant.runtime.compare_files.opened", None)
    with pytest.raises(UsageError, match=told):
        compare_files(FLUX, candidates, replace(SETTINGS, **change))


def test_files_that_cannot_be_compared_are_refused_before_a_picture_is_drawn(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffquant.runtime.compare_files.Run", None)
    with pytest.raises(ArchitectureError, match=r"expected flux1 as .* found sd15"):
        compare_files(FLUX, [files["q8_0"], SD15], SETTINGS)
    with pytest.raises(UsageError, match="--only vae: no vae in it"):
        compare_files(FLUX, [files["q8_0"]], replace(SETTINGS, only="vae"))
    tensors = load_file(files["fp8_scaled"])
    tensors = {k: v for k, v in tensors.items() if not k.endswith("img_in.bias")}
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises((MappingError, ArchitectureError), match="less"):
        compare_files(FLUX, [tmp_path / "less.safetensors"], SETTINGS)


def test_names_are_as_short_as_tells_files_apart():
    paths = [Path("/m/a/x.gguf"), Path("/m/b/x.gguf"), Path("/m/control"), Path("/m/y.gguf")]
    assert row_names(paths) == ("a/x.gguf", "b/x.gguf", "m/control", "y.gguf")


def test_files_of_a_hubs_cache_are_called_as_their_links_are(tmp_path, monkeypatch):
    blob, snapshot = tmp_path / "blobs" / "0d4f1c2a", tmp_path / "snapshots" / "41"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes(b"")
    (snapshot / "flux-Q8_0.gguf").symlink_to(blob)
    monkeypatch.chdir(snapshot)
    assert row_names([Path("flux-Q8_0.gguf")]) == ("flux-Q8_0.gguf",)
    assert row_names([Path("../41/flux-Q8_0.gguf")]) == ("flux-Q8_0.gguf",)


def test_the_prompt_score_is_a_column_where_all_prompts_are_of_the_demo_grammar():
    assert default_metrics(DEMO_PROMPTS) == (*DEFAULT_METRICS, "prompt")
    assert default_metrics((*DEMO_PROMPTS, "a fox")) == DEFAULT_METRICS


def test_values_are_means_with_bootstrap_intervals_and_psnr_is_pooled():
    found = value_of("flip", [0.1, 0.2, 0.6])
    assert found.mean == pytest.approx(0.3)
    assert found.low < 0.3 < found.high
    assert found.worst == 0.6
    assert value_of("ssim", [0.9, 0.4]).worst == 0.4
    assert value_of("ssim", [0.5]) == Value(0.5, worst=0.5)
    assert value_of("psnr", [None, None]) == Value(None)
    assert math.isnan(value_of("flip", [0.1, math.nan]).mean)
    rng = np.random.default_rng(3)
    pooled, each = Pooled(), []
    for amount in (0.01, 0.1, 0.03):
        one = rng.random((8, 8, 3), dtype=np.float32)
        other = one + np.float32(amount)
        each.append(-10 * math.log10(pooled.add(one, other)))
    value = value_of("psnr", each)
    assert value.mean == pytest.approx(pooled.psnr_db)
    assert (value.low, value.high) == pytest.approx(pooled.interval_db())
    assert value.worst == min(each)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_fails_on_bad_values_missing_ones_and_controls_that_keep_it(name):
    good, bad = (0.9, 0.1) if GATES[name].least else (0.1, 0.9)
    rows = {"control": Value(bad), "damage": "d"}
    assert judge_gate(name, 0.5, Value(good), **rows).verdict == "pass"
    assert judge_gate(name, 0.5, Value(None), **rows).verdict == "pass"  # identical
    assert judge_gate(name, 0.5, Value(bad), **rows).verdict == "fail"
    assert judge_gate(name, 0.5, Value(math.nan), **rows).verdict == "fail"
    lost = judge_gate(name, 0.5, None, missing="no weights", **rows)
    assert (lost.verdict, lost.why.endswith("is not kept: no weights")) == ("fail", True)
    for kept in (Value(good), Value(None)):
        found = judge_gate(name, 0.5, Value(good), control=kept, damage="d")
        assert found.verdict == "fail"
        assert "cannot fail" in found.why
    assert judge_gate(name, 0.5, Value(good), control=None, damage="none").verdict == "warn"


def test_a_metric_that_does_not_tell_the_control_from_the_file_is_named():
    values = {"psnr": Value(30.0), "flip": Value(0.1), "prompt": Value(0.5)}
    whole = Row("a", "candidate", values=values)
    assert unseen(Row("c", "control", values=values), whole) == ("psnr", "flip")
    worse = {"psnr": Value(5.0), "flip": Value(0.9), "prompt": Value(1.0)}
    assert unseen(Row("c", "control", values=worse), whole) == ()
    assert unseen(Row("c", "control", values={"psnr": Value(None)}), whole) == ("psnr",)


def test_pair_values_name_prompt_seed_and_metrics(compared):
    pairs = compared[0].candidates[0].pairs
    assert all(isinstance(pair, PairValues) for pair in pairs)
    assert [(pair.prompt, pair.seed) for pair in pairs] == [(p, 5) for p in SETTINGS.prompts]
    assert list(pairs[0].values) == list(SETTINGS.metrics)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_pictures_are_the_same_wherever_weights_live(files, compared, offload):
    """One model is there at a time: reference, floor, candidate and its damaged copy take turns."""
    wanted, pictures = compared
    settings = replace(SETTINGS, memory=Asked(offload=offload))
    found, there = compare_files(FLUX, [files["q8_0"], files["q4_0"]], settings)
    assert there.rows.keys() == pictures.rows.keys()
    for name, row in pictures.rows.items():
        assert all(np.array_equal(*pair) for pair in zip(row, there.rows[name], strict=True))
    assert [row.values for row in found.rows] == [row.values for row in wanted.rows]


def test_a_side_that_draws_takes_the_place_of_the_other(files):
    memory = Asked(offload="none")
    one = bundled.open_side(EngineFiles(FLUX, memory=memory))
    two = bundled.open_side(EngineFiles(files["q8_0"], base=FLUX, memory=memory))
    request = PictureRequest("a red circle", steps=1, width=64, height=64)

    def there(side):
        layers = side.opened.pipeline.parts.denoiser.modules()
        kinds = {one.packed.device.type for one in layers if getattr(one, "stored", None)}
        return kinds == {"cpu"}

    first = one.draw(request)
    assert (there(one), there(two)) == (True, False)
    one.opened.placement.settle(Rung("sequential", "whole", pinned=False))  # memory ran out
    assert np.array_equal(one.draw(request), first)
    assert one.opened.placement.rung.level == "sequential"
    two.draw(request)
    assert (there(one), there(two)) == (False, True)
    assert np.array_equal(one.draw(request), first)
    assert "offload none, " in one.how
    with one.rough() as rough:
        rough.draw(request)
        assert (there(one), there(rough)) == (False, True)
    assert not there(rough)


def test_memory_that_ran_out_is_told(files, monkeypatch):
    """The picture is the same, one way down; who reads the row hears of it."""
    plain = bundled.Graphs

    def out_of_memory_once(*args, **more):
        side.opened.placement.steps.append("denoise: out of memory at none, went on at model")
        return plain(*args, **more)

    side = bundled.open_side(EngineFiles(files["q8_0"], base=FLUX, memory=Asked(offload="none")))
    before = side.warnings
    monkeypatch.setattr(bundled, "Graphs", out_of_memory_once)
    side.draw(PictureRequest("a red circle", steps=1, width=64, height=64))
    assert side.warnings == (*before, "denoise: out of memory at none, went on at model")
