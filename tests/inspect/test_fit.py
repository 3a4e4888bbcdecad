"""fit(): verdicts, what is left out and said, and what a smaller type would change."""

import json
import lzma
from pathlib import Path

import pytest

from diffquant.core.errors import UsageError
from diffquant.core.report import to_json
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.fit import CONTEXT_NBYTES, fit
from diffquant.inspect.subject import open_subject, subject_of

GIB = 1 << 30
DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
MANIFESTS = json.loads(lzma.decompress(DATA.read_bytes()))


class Header:
    """A source of which nothing can be read."""

    container, path, metadata, configs = "safetensors", Path("header"), {}, {}

    def __init__(self, shapes, dtype):
        self.specs = {key: TensorSpec(key, dtype, tuple(shape)) for key, shape in shapes.items()}


def subject(name, dtype="BF16"):
    return subject_of(Header(MANIFESTS[name], dtype), name)


def test_a_large_device_holds_everything_and_needs_no_advice():
    report = fit(subject("sdxl-base.checkpoint.ldm"), vram=24 * GIB)
    assert report.level == "none"
    assert report.advice == ()
    assert (report.width, report.height) == (1024, 1024)


def test_levels_are_tried_from_the_fastest():
    one = subject("sdxl-base.checkpoint.ldm")
    at = {gib: fit(one, vram=gib * GIB).level for gib in (12, 8, 6, 3)}
    assert at == {12: "none", 8: "none + decoding in strips", 6: "model", 3: "blocks"}


def test_the_smallest_budget_of_a_level_fits_and_a_byte_less_does_not():
    one = subject("flux-dev.transformer.original")
    for level in fit(one, vram=GIB).levels:
        exact = fit(one, vram=level.nbytes)
        assert next(row for row in exact.levels if row.name == level.name).fits
        less = fit(one, vram=level.nbytes - 1)
        assert not next(row for row in less.levels if row.name == level.name).fits


def test_a_budget_counts_what_the_device_takes_for_itself():
    report = fit(subject("flux.vae.original"), width=1024, height=1024)
    (stage,) = report.stages
    assert report.levels[0].nbytes == stage.peak_nbytes + CONTEXT_NBYTES
    assert report.context_nbytes == CONTEXT_NBYTES


def test_smaller_types_are_sized_by_the_planner():
    report = fit(subject("flux-dev.transformer.original"), vram=12 * GIB)
    sizes = {one.type: one.nbytes for one in report.advice}
    assert list(sizes) == ["q8_0", "q6_k", "q5_k_s", "q4_k_s"]
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert 11.5 * GIB < sizes["q8_0"] < 12 * GIB
    assert {one.type: one.level for one in report.advice}["q4_k_s"] == "model"


def test_types_of_a_packed_file_are_left_out_with_the_reason():
    report = fit(subject("flux-dev.transformer.original", "F8_E4M3"), vram=4 * GIB)
    assert report.advice == ()
    assert any("already fp8_e4m3" in note for note in report.notes)


def test_sizes_without_a_budget_give_no_verdict():
    report = fit(subject("sd15.unet.ldm"), width=512, height=768)
    assert report.level == ""
    assert report.vram_nbytes is None
    assert {one.fits for one in report.levels} == {None}


def test_nothing_fits_is_said_and_not_an_error():
    report = fit(subject("flux-dev.transformer.original"), vram=GIB // 2)
    assert report.level == ""
    assert not any(one.fits for one in report.levels)


def test_blocks_that_stay_are_counted_for_a_budget():
    report = fit(subject("flux-dev.transformer.original"), vram=8 * GIB)
    level = next(one for one in report.levels if one.level == "blocks")
    assert 0 < level.blocks < 57


def test_a_denoiser_of_single_blocks_has_none_to_stream(examples):
    with open_subject(examples / "flux1-shapes") as one:
        report = fit(one, vram=1)
    assert report.level == ""
    assert next(stage for stage in report.stages if stage.name == "denoise").blocks == 0


def test_a_text_encoder_that_decides_is_named():
    report = fit(subject("sd3-medium.transformer.original"), vram=6 * GIB)
    assert any("T5-XXL encoder keeps level model" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "word"),
    [("lora.sdxl-kohya-r16", "LoRA"), ("unknown", "not known")],
)
def test_what_makes_no_picture_says_why(name, word):
    shapes = MANIFESTS.get(name, {"a.weight": [4, 4]})
    report = fit(subject_of(Header(shapes, "BF16"), name), vram=8 * GIB)
    assert word in report.reason
    assert report.stages == report.levels == ()


def test_an_encoder_of_a_tiny_autoencoder_decodes_nothing():
    report = fit(subject("taesd.encoder.original"), vram=8 * GIB)
    assert "decodes nothing" in report.reason


@pytest.mark.parametrize("name", ["t5-xxl-encoder.hf", "flux.vae.original"])
def test_a_part_alone_has_the_stage_of_that_part(name):
    report = fit(subject(name), vram=24 * GIB)
    assert len(report.stages) == 1
    assert report.stages[0].in_file


@pytest.mark.parametrize(
    "asked",
    [
        {"width": 0, "height": 64},
        {"width": 64, "height": 1 << 20},
        {"batch": 0},
        {"batch": 1 << 20},
        {"vram": 0},
        {"vram": -1},
    ],
)
def test_absurd_requests_are_refused(asked):
    with pytest.raises(UsageError):
        fit(subject("sd15.unet.ldm"), **asked)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("sd15-shapes", 128),
        ("sdxl-shapes", 128),
        ("flux1-shapes", 128),
        ("qwen-image-shapes", 1328),
    ],
)
def test_the_demo_checkpoints_are_asked_at_the_size_their_configs_state(examples, name, side):
    with open_subject(examples / name) as one:
        report = fit(one, vram=2 * GIB)
    assert (report.width, report.height) == (side, side)
    assert report.level == "none"
    assert [stage.name for stage in report.stages if stage.in_file][-2:] == ["denoise", "decode"]
    json.dumps(to_json(report))


def test_every_manifest_gets_a_report():
    for name in MANIFESTS:
        report = fit(subject(name), width=1024, height=1024)
        assert bool(report.reason) != bool(report.stages), name
