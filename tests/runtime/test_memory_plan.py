"""The planner: arithmetic over every family's real names and shapes, no model and no torch."""

import functools
import itertools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from diffquant.convert.binding import bind
from diffquant.convert.footprint import CONTEXT_NBYTES, Picture, footprint, with_denoiser
from diffquant.convert.footprint.levels import DECODERS, LEVELS
from diffquant.convert.footprint.moments import Buffer, Moment
from diffquant.convert.footprint.stages import Footprint, Stage
from diffquant.convert.footprint.weights import PartWeights, plan_weights
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.recognise import recognise
from diffquant.core.errors import ResourceError, UsageError
from diffquant.core.tensors import TensorSpec
from diffquant.quant.types import type_named
from diffquant.runtime.memory.plan import Budget, Rung, plan_memory
from diffquant.runtime.memory.rungs import (
    DECODED_KEPT_NBYTES,
    candidates,
    host_nbytes,
    next_rung,
    stage_peaks,
)

DATA = Path(__file__).parents[1] / "data"
MIB, GIB = 1 << 20, 1 << 30
FAMILIES = (
    "sd15.checkpoint.ldm-pruned-emaonly",
    "sd21.unet.ldm",
    "sdxl-base.checkpoint.ldm",
    "sdxl-refiner.unet.ldm",
    "flux-dev.transformer.original",
    "flux2-dev.transformer.original",
    "qwen-image.transformer.comfy",
    "z-image.transformer.comfy",
)


class Header:
    """A source of which nothing can be read."""

    container, path, metadata, configs = "safetensors", Path("header"), {}, {}

    def __init__(self, shapes):
        self.specs = {key: TensorSpec(key, "BF16", tuple(shape)) for key, shape in shapes.items()}


@functools.cache
def manifests():
    return json.loads(lzma.decompress((DATA / "manifests.json.xz").read_bytes()))


@functools.cache
def found_for(name, quantized=""):
    logical = bind(Header(manifests()[name]))
    match = recognise(logical.specs())
    found = footprint(logical, match, Picture(1024, 1024), ours=True)
    if quantized:
        plan = make_plan(logical, match, Request("gguf", type=type_named(quantized)))
        steps = plan.part_steps("denoiser")
        found = with_denoiser(found, plan_weights(steps, compute="BF16"))
    return found


CASES = [(name, "") for name in FAMILIES] + [
    ("flux-dev.transformer.original", "q4_k_s"),
    ("sdxl-base.checkpoint.ldm", "q8_0"),
]
DEVICES = ("cpu", "cuda")  # mps is planned like cuda, without page-locked memory


def budgets(found, device):
    """What each rung takes, exactly and a byte less, the largest first."""
    peaks = {
        max(one.total for one in stage_peaks(found, rung, device=device)) + CONTEXT_NBYTES[device]
        for rung in candidates(found, None, device=device)
    }
    return sorted({peak - less for peak in peaks for less in (0, 1)}, reverse=True)


def planned(found, device, **asked):
    for nbytes in budgets(found, device):
        try:
            yield nbytes, plan_memory(found, Budget(nbytes), device=device, **asked)
        except ResourceError:
            return


def speed(plan):
    """Lower is faster."""
    rung = plan.rung
    return (
        list(LEVELS).index(rung.level),
        -sum(rung.resident.values()),
        DECODERS.index(rung.decoder),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "quantized"), CASES)
def test_what_fits_is_within_the_budget_and_a_smaller_one_is_never_faster(name, quantized, device):
    found = found_for(name, quantized)
    plans = list(planned(found, device))
    assert len({plan.rung.level for _, plan in plans}) == len(LEVELS)
    for nbytes, plan in plans:
        assert plan.fits
        assert plan.peak_nbytes <= nbytes
        assert plan.peak_nbytes == max(one.total for one in plan.peaks) + CONTEXT_NBYTES[device]
        assert plan.why
    for (_, larger), (_, smaller) in itertools.pairwise(plans):
        assert speed(larger)[0] <= speed(smaller)[0]
        if larger.rung.level == smaller.rung.level:
            kept = {part: larger.rung.resident.get(part, 0) for part in smaller.rung.resident}
            assert all(count <= kept[part] for part, count in smaller.rung.resident.items())
        if larger.rung.level == smaller.rung.level != "blocks":
            assert speed(larger) <= speed(smaller)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "quantized"), CASES[::3])
def test_a_rung_further_down_takes_no_more_at_any_stage_and_less_at_one(name, quantized, device):
    found = found_for(name, quantized)
    for _, plan in list(planned(found, device))[::6]:
        before = [one.total for one in plan.peaks]
        for rung in plan.ladder:
            after = [one.total for one in stage_peaks(found, rung, device=device)]
            assert all(a <= b for a, b in zip(after, before, strict=True))
            assert after != before
            before = after
    top = plan_memory(found, Budget(), device=device)
    assert top.rung == Rung("none", "whole", pinned=False)
    assert top.ladder[-1].level == "sequential"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_next_block_would_not_fit(name):
    found = found_for(name)
    streamed = [(n, plan) for n, plan in planned(found, "cuda") if plan.rung.level == "blocks"]
    assert streamed
    denoise = next(one for one in found.stages if one.name == "denoise")
    for nbytes, plan in streamed:
        kept = plan.rung.resident.get("denoiser", 0)
        for more in range(kept + 1, len(denoise.weights.blocks) + 1):
            resident = {**plan.rung.resident, "denoiser": more}
            peaks = stage_peaks(
                found, Rung("blocks", "strips", pinned=True, resident=resident), device="cuda"
            )
            at = next(one for one in peaks if one.stage == "denoise")
            assert at.total + CONTEXT_NBYTES["cuda"] > nbytes


@pytest.mark.parametrize("level", LEVELS)
def test_a_byte_less_than_a_rung_takes_is_too_little(level):
    found = found_for("sdxl-base.checkpoint.ldm")
    asked = {"device": "cuda", "level": level, "decoder": "strips"}
    least = min(
        max(one.total for one in stage_peaks(found, rung, device="cuda"))
        for rung in candidates(found, 0, device="cuda")
        if (rung.level, rung.decoder) == (level, "strips")
    )
    exact = least + CONTEXT_NBYTES["cuda"]
    assert plan_memory(found, Budget(exact), **asked).peak_nbytes == exact
    with pytest.raises(ResourceError):
        plan_memory(found, Budget(exact - 1), **asked)


def test_the_promises_of_the_command_line_hold_in_the_arithmetic():
    def level(name, gib, quantized=""):
        return plan_memory(found_for(name, quantized), Budget(int(gib * GIB)), device="cuda").rung

    assert level("sdxl-base.checkpoint.ldm", 4).level in ("model", "blocks")
    assert level("sd15.checkpoint.ldm-pruned-emaonly", 4).level in ("none", "model")
    assert level("flux-dev.transformer.original", 6, "q4_k_s").level == "blocks"


def test_page_locked_memory_is_taken_where_ram_has_it():
    found = found_for("flux-dev.transformer.original")
    rich = plan_memory(found, Budget(6 * GIB), device="cuda", level="blocks")
    assert rich.rung.pinned
    assert rich.host_nbytes > 10 * GIB
    poor = plan_memory(found, Budget(6 * GIB, 4 * GIB), device="cuda", level="blocks")
    assert not poor.rung.pinned
    assert poor.host_nbytes <= 4 * GIB
    assert poor.rung.resident == rich.rung.resident
    largest = max(max(one.weights.blocks, default=0) for one in found.stages)
    assert 2 * largest <= poor.host_nbytes
    assert not any(rung.pinned for rung in poor.ladder)


def test_the_cpu_has_one_memory():
    found = found_for("sdxl-base.checkpoint.ldm")
    by_ram = plan_memory(found, Budget(None, 6 * GIB), device="cpu")
    by_both = plan_memory(found, Budget(64 * GIB, 6 * GIB), device="cpu")
    assert by_ram.rung == by_both.rung
    assert by_ram.peak_nbytes <= 6 * GIB
    assert by_ram.host_nbytes == 0
    assert not by_ram.rung.pinned
    assert {rung.decoder for rung in by_ram.ladder} <= {"whole", "strips"}


def test_a_tensor_being_read_counts_on_the_cpu_alone():
    found = found_for("flux-dev.transformer.original")
    rung = Rung("sequential", "strips", pinned=False)
    at = {
        device: next(p for p in stage_peaks(found, rung, device=device) if p.stage == "denoise")
        for device in ("cpu", "cuda")
    }
    layer = next(one for one in found.stages if one.name == "denoise").weights.layer.nbytes
    assert at["cpu"].weights - at["cuda"].weights == layer


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_that_was_asked_for_is_kept_or_refused(level):
    found = found_for("sdxl-base.checkpoint.ldm")
    plan = plan_memory(found, Budget(64 * GIB), device="cuda", level=level)
    assert plan.rung.level == level
    assert {rung.level for rung in plan.ladder} <= {level}
    if level in ("none", "model"):
        with pytest.raises(ResourceError, match=f"offload {level}.*too much.*what fits is") as info:
            plan_memory(found, Budget(4 * GIB), device="cuda", level=level)
        assert info.value.exit_code == 6


def test_nothing_fits_names_the_least_and_what_decides():
    found = found_for("qwen-image.transformer.comfy")
    with pytest.raises(ResourceError, match=r"needs \d.*too much \(decided by.*smaller type"):
        plan_memory(found, Budget(512 * MIB), device="cuda")


@pytest.mark.parametrize("asked", [{"level": "some"}, {"decoder": "some"}, {"device": "tpu"}])
def test_unknown_words_are_refused(asked):
    with pytest.raises(UsageError, match="known"):
        plan_memory(found_for("sdxl-base.checkpoint.ldm"), Budget(), **{"device": "cuda", **asked})


def small(part, stage, activations, *, tiled=None, host=None, blocks=(10,) * 8):
    def moment(nbytes):
        return None if nbytes is None else Moment("m", (Buffer("b", nbytes * MIB),))

    sizes = tuple(size * MIB for size in blocks)
    nbytes = sum(sizes) + 4 * MIB
    weights = PartWeights(nbytes, MIB, 0, sizes, Buffer("l", 2 * MIB), Buffer("d", 0))
    return Stage(
        stage, part, part, True, "", weights, moment(activations), Buffer("b", 0),
        moment(tiled), moment(host),
    )  # fmt: skip


def toy():
    stages = (
        small("text_encoder", "encode", 5),
        small("denoiser", "denoise", 20, blocks=(10, 20) * 5),
        small("vae", "decode", 400, tiled=50, host=10, blocks=()),
    )
    return Footprint("toy", "", Picture(8, 8), False, stages, ())


def test_the_way_to_decode_is_chosen_per_need():
    found, context = toy(), CONTEXT_NBYTES["cuda"]

    def rung(mib):
        plan = plan_memory(found, Budget(context + mib * MIB), device="cuda")
        return plan.rung.level, plan.rung.decoder

    assert rung(1000) == rung(642) == ("none", "whole")
    assert rung(400) == ("none", "strips")
    assert rung(262) == ("none", "host")
    assert rung(220) == ("model", "strips")
    assert rung(176) == ("model", "strips")
    assert rung(175)[0] == "blocks"
    assert rung(160)[0] == "blocks"
    assert rung(30)[0] == "sequential"


def test_maps_that_lie_in_host_memory_are_counted_there():
    found = toy()
    whole, host = (
        host_nbytes(found, Rung("none", decoder, pinned=False), device="cuda")
        for decoder in ("whole", "host")
    )
    assert host - whole == 400 * MIB


def test_memory_that_ran_out_in_a_step_changes_the_level_and_in_decoding_the_way_to_decode():
    plan = plan_memory(toy(), Budget(), device="cuda")
    assert [(one.level, one.decoder) for one in plan.ladder[:3]] == [
        ("none", "strips"),
        ("none", "host"),
        ("model", "strips"),
    ]
    step, below = next_rung(plan.rung, plan.ladder, autoencoder=False)
    assert (step.level, step.decoder) == ("model", "whole")
    decoding, after = next_rung(step, below, autoencoder=True)
    assert decoding == plan.ladder[2]
    assert after == plan.ladder[3:]
    assert next_rung(plan.ladder[-1], (), autoencoder=False) is None


def test_the_cpu_keeps_a_buffer_of_decoded_weights_through_every_stage():
    from diffquant.runtime.kernels.scratch import KEPT_NBYTES

    assert DECODED_KEPT_NBYTES == KEPT_NBYTES
    found = found_for("sdxl-base.checkpoint.ldm", "q8_0")
    rung = Rung("sequential", "whole", pinned=False)
    widest = max(stage.scratch for stage in found.stages)
    for stage, peak in zip(found.stages, stage_peaks(found, rung, device="cpu"), strict=True):
        assert peak.scratch == max(stage.scratch, min(widest, KEPT_NBYTES)) > 0
    gpu = stage_peaks(found, rung, device="cuda")
    assert [peak.scratch for peak in gpu] == [stage.scratch for stage in found.stages]


def test_planning_needs_no_torch():
    code = "import sys, diffquant.runtime.memory.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
