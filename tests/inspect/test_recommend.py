"""recommend(): ranked by what was measured, judged by the header that would be written."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.sensitivity import Sensitivity
from diffquant.core.errors import PlanMismatch, UnknownFormat, UsageError
from diffquant.core.report import to_json
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.loaders import judge
from diffquant.inspect.planned import planned_subject
from diffquant.inspect.recommend import recommend
from diffquant.inspect.speeds import CARDS, SPEEDS, speed_class
from diffquant.inspect.subject import open_subject, subject_of
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, type_named

GIB = 1 << 30
DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"


class Header:
    """A source of which no weight can be read."""

    container, metadata, configs = "safetensors", {}, {}

    def __init__(self, shapes, dtype="BF16"):
        self.path = Path("flux.safetensors")
        self.specs = {key: TensorSpec(key, dtype, tuple(shape)) for key, shape in shapes.items()}

    nbytes = 0

    def read(self, *_):
        raise AssertionError("a weight was read")


@pytest.fixture(scope="module")
def flux():
    shapes = json.loads(lzma.decompress(DATA.read_bytes()))["flux-dev.transformer.original"]
    return subject_of(Header(shapes), "flux.safetensors")


@pytest.fixture(scope="module")
def at_8_gib(flux):
    return recommend(flux, vram=8 * GIB, loader="comfyui-gguf")


def test_what_stays_on_the_device_comes_first_by_error(at_8_gib):
    stays = [row for row in at_8_gib.rows if row.resident]
    streamed = [row for row in at_8_gib.rows if not row.resident]
    assert at_8_gib.rows == (*stays, *streamed)
    assert [row.error for row in stays] == sorted(row.error for row in stays)
    assert [row.nbytes for row in streamed] == sorted(row.nbytes for row in streamed)
    assert stays[0].type == "q4_k_m"
    assert all(row.peak_nbytes <= 8 * GIB for row in stays)
    assert all(row.peak_nbytes > 8 * GIB for row in streamed)
    assert {"q8_0", "bf16"} <= {row.type for row in streamed}


def test_every_type_is_ranked_or_has_a_reason(examples):
    with open_subject(examples / "flux1-shapes") as subject:
        report = recommend(subject, vram=24 * GIB)
    offered = {(kind.name, one) for kind in TYPES.values() for one in kind.dialects}
    rows = [*report.rows, *report.others]
    assert {(row.type, row.container) for row in rows} == {x for x in offered if x[0] != "f32"}
    assert len(rows) == len({(row.type, row.container) for row in rows})
    assert all(not row.reason for row in report.rows)
    assert all(row.reason for row in report.others)
    assert {row.type for row in report.others} >= {"iq2_xs", "fp8_e4m3_blockwise"}


def test_another_part_that_is_too_large_is_named(at_8_gib, flux):
    assert any("T5-XXL encoder takes" in note for note in at_8_gib.notes)
    assert not any("T5" in note for note in recommend(flux, vram=24 * GIB, loader="forge").notes)


def test_rows_for_a_program_are_those_it_reads(at_8_gib):
    assert all("comfyui-gguf" in row.loaders for row in at_8_gib.rows)
    assert {row.container for row in (*at_8_gib.rows, *at_8_gib.others)} == {"gguf"}
    (iq3,) = (row for row in at_8_gib.others if row.type == "iq3_s")
    assert "no kernel" in iq3.reason


def test_sizes_are_those_of_plans_and_errors_those_of_formats(at_8_gib):
    (q8,) = (row for row in at_8_gib.rows if row.type == "q8_0")
    assert 11.5 * GIB < q8.nbytes < 12 * GIB
    assert q8.error == pytest.approx(FORMATS["q8_0"].gaussian_error, rel=0.01)
    (bf16,) = (row for row in at_8_gib.rows if row.type == "bf16")
    assert bf16.error < 1e-4  # its bytes are copied; vectors go to f32


@pytest.mark.parametrize(
    ("name", "container", "suffix"),
    [("q4_k_s", "gguf", ".gguf"), ("int8_convrot", "safetensors", ".safetensors"),
     ("nf4_dq", "safetensors", ".safetensors"), ("nf4", "folder", "")],
)  # fmt: skip
def test_verdicts_on_a_planned_file_are_those_on_the_written_one(
    examples, tmp_path, name, container, suffix
):
    """The oracle is the file itself."""
    out = tmp_path / f"planned{suffix}"
    run_job(examples / "flux1-shapes", out, Request(container, type=type_named(name)))
    written = {one.loader: one.verdict for one in judge(out)}
    with open_subject(examples / "flux1-shapes") as subject:
        report = recommend(subject, vram=GIB)
    (row,) = (
        one for one in (*report.rows, *report.others)
        if (one.type, one.container) == (name, container)
    )  # fmt: skip
    reads = {name for name, verdict in written.items() if verdict in ("accepts", "caveat")}
    assert set(row.loaders) == reads
    assert set(row.conditional) == {n for n, verdict in written.items() if verdict == "caveat"}


def test_a_sensitivity_ranks_by_its_own_errors(flux, at_8_gib):
    keys = [key for key in flux.specs if key.endswith(".weight")]
    odd = {"q4_k": 5.0, "q5_k": 5.0, "q6_k": 5.0, "q3_k": 1.0, "q2_k": 9.0, "q4_0": 2.0}
    known = Sensitivity("flux1", "outputs", "made up", "", dict.fromkeys(keys, odd), {})
    report = recommend(flux, vram=8 * GIB, loader="comfyui-gguf", sensitivity=known)
    assert report.errors == "made up"
    stays = [row for row in report.rows if row.resident]
    assert stays[0].type == "q3_k_s"
    assert stays[-1].error is None  # iq4: not in the file
    wrong = Sensitivity("sdxl", "outputs", "", "", {"x": {"q4_k": 1.0}}, {})
    with pytest.raises(UsageError, match="is of sdxl, the source is flux1"):
        recommend(flux, vram=8 * GIB, sensitivity=wrong)
    wrong = Sensitivity("flux1", "outputs", "", "", {"x": {"q4_k": 1.0}}, {})
    with pytest.raises(UsageError, match="knows none of the tensors"):
        recommend(flux, vram=8 * GIB, sensitivity=wrong)


def test_speeds_are_told_for_the_card_that_was_measured_alone():
    assert set(SPEEDS) == set(CARDS) == {"hopper"}
    assert speed_class("hopper", [("q4_k", 10), ("bf16", 90)]) == "fast"
    assert speed_class("hopper", [("q4_1", 10)]) == "fast"
    assert speed_class("hopper", [("q3_k", 10)]) == "medium"
    assert speed_class("hopper", [("convrot_w4a4", 10), ("q4_k", 1)]) == "slow"
    assert speed_class("hopper", [("bf16", 10)]) == "nothing to decode"
    assert speed_class("ada", [("q4_k", 10)]) == "not measured"


def test_what_cannot_be_recommended_is_refused(flux, examples, tmp_path, write):
    with pytest.raises(UnknownFormat, match="did you mean 'comfyui'"):
        recommend(flux, vram=GIB, loader="comfyuii")
    vae = examples / "flux1-shapes" / "vae" / "diffusion_pytorch_model.safetensors"
    with open_subject(vae) as subject, pytest.raises(UsageError, match="no model to recommend"):
        recommend(subject, vram=GIB)


def test_a_packed_source_has_reasons_and_no_rows(flux):
    shapes = {key: spec.shape for key, spec in flux.specs.items()}
    packed = subject_of(Header(shapes, "F8_E4M3"), "packed.safetensors")
    report = recommend(packed, vram=24 * GIB, loader="comfyui-gguf")
    reasons = {row.type: row.reason for row in report.others}
    assert "already fp8_e4m3" in reasons["q4_k_s"]
    assert all(row.type in ("bf16", "f16") for row in report.rows)


def test_the_report_is_json(at_8_gib):
    text = json.dumps(to_json(at_8_gib))
    assert json.loads(text)["rows"][0]["type"] == "q4_k_m"


def test_weights_of_a_planned_file_cannot_be_read(flux):
    plan = make_plan(flux.logical, flux.match, Request("safetensors", type=type_named("nf4")))
    source = planned_subject(plan, flux.match, flux.source, "x").source
    with pytest.raises(PlanMismatch, match="only planned"):
        source.read("double_blocks.0.img_attn.qkv.weight")
    state = "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"
    assert json.loads(source.read(state).tobytes())["quant_type"] == "nf4"


@pytest.mark.parametrize(("name", "container"), [("q8_0", "gguf"), ("fp8_scaled", "safetensors")])
def test_a_planned_header_is_the_written_one(examples, tmp_path, name, container):
    """Of a folder, whose components' header pairs lose their folder; the oracle is the file."""
    request = Request(container, type=type_named(name))
    out = tmp_path / f"written.{container}"
    run_job(examples / "flux1-shapes", out, request)
    with open_subject(examples / "flux1-shapes") as subject, open_subject(out) as written:
        plan = make_plan(subject.logical, subject.match, request)
        planned = planned_subject(plan, subject.match, subject.source, "written").source
        unknown = {key: None for key in planned.metadata if key.endswith(".fingerprint")}
        assert {**planned.metadata, **unknown} == {**written.source.metadata, **unknown}
        assert planned.specs == written.source.specs
