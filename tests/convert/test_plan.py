"""A plan knows everything from specs: names, bytes, reasons; it reads no weight."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.detect import detect
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.core.errors import PolicyError, UnsupportedDtype, UsageError
from diffquant.io import open_source
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, type_named

MODELS = ("sd15-shapes", "sdxl-shapes", "flux1-shapes", "qwen-image-shapes")
CASES = [(name, container) for name, row in TYPES.items() for container in row.dialects]


@contextlib.contextmanager
def blind(path):
    """A bound source whose weights cannot be read."""
    with open_source(path) as source:
        logical = bind(source)

        def refuse(*_):
            raise AssertionError("a plan read a weight")

        source.read = refuse
        yield logical, detect(logical.specs(), source.metadata, source.configs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "container"), CASES)
def test_plans_of_every_type_are_pure_and_add_up(examples, matrix_for, model, name, container):
    kind = type_named(name)
    with blind(examples / model) as (logical, match):
        matrix = matrix_for(name, logical, match)
        plan = make_plan(logical, match, Request(container, type=kind), matrix=matrix)
    denoiser = plan.part_steps("denoiser")
    weights = sum(np.prod(shape) for shape in match.part("denoiser").shapes.values())
    assert sum(step.parameters for step in denoiser) == weights
    assert plan.nbytes == sum(spec.nbytes for spec in plan.specs)
    assert len({spec.key for spec in plan.specs}) == len(plan.specs)
    for step in plan.steps:
        assert step.decision.reason
        if step.decision.format:
            assert step.stored == step.decision.format
            held = sum(
                4 if one.constant else one.spec.nbytes for one in step.packed if one.part
            )  # a number in a marker takes up text, and is counted as the float that it is
            assert held == FORMATS[step.stored].nbytes(step.assignment.shape)
    wanted = kind.formats
    got = sum(step.parameters for step in denoiser if step.stored in wanted)
    assert plan.mixed == (not FORMATS[kind.base].is_cast and got * 2 < weights)
    assert plan.mixed == any("MIXED" in text for text in plan.warnings)
    other = {step.decision.reason for step in plan.steps if step.part != "denoiser"}
    assert other <= {"part kept as it is: only the denoiser is quantized"}


def test_f32_gguf_is_f32_throughout(examples):
    with blind(examples / "sd15-shapes") as (logical, match):
        plan = make_plan(logical, match, Request("gguf", type=type_named("f32")))
    assert {step.stored for step in plan.steps} == {"f32"}


def test_gguf_stores_vectors_as_f32_and_convolutions_as_f16(examples):
    with blind(examples / "sd15-shapes") as (logical, match):
        plan = make_plan(logical, match, Request("gguf", type=type_named("q4_k_s")))
    for step in plan.steps:
        if len(step.assignment.shape) < 2:
            assert step.stored == "f32"
        if len(step.assignment.shape) > 2:
            assert step.stored == "f16"
        if step.stored not in ("q4_k", "f32", "f16"):
            assert step.decision.wanted or "mix" in step.decision.reason


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("gguf", parts=("vae",)), "GGUF has no form for vae"),
        (Request("gguf", parts=("clip",)), r"no part clip .*it has: denoiser, vae, text_encoder"),
        (Request("gguf", type=type_named("nf4")), "nf4 cannot go into a .gguf file"),
        (Request("folder", type=type_named("fp8_scaled")), "write it to a .safetensors file"),
    ],
)
def test_requests_that_no_container_holds_are_usage_errors(examples, request_, message):
    with (
        blind(examples / "sd15-shapes") as (logical, match),
        pytest.raises(UsageError, match=message),
    ):
        make_plan(logical, match, request_)


def test_dropped_parts_are_listed_with_a_reason(examples):
    with blind(examples / "sd15-shapes") as (logical, match):
        plan = make_plan(logical, match, Request("gguf", type=type_named("q8_0")))
    others = {part.prefix + key for part in match.parts[1:] for key in part.shapes}
    assert {key for key, _ in plan.dropped} == others
    assert {reason for _, reason in plan.dropped} == {"another part; not asked for"}


@pytest.fixture(scope="module")
def single(examples, tmp_path_factory):
    """sd15-shapes' denoiser as one safetensors file."""
    path = tmp_path_factory.mktemp("single") / "sd.safetensors"
    run_job(examples / "sd15-shapes", path, Request("safetensors", parts=("denoiser",)))
    return path


def plan_of(path, request_):
    with blind(path) as (logical, match):
        return make_plan(logical, match, request_)


def test_leftovers_are_copied_or_dropped_with_their_reason(single, tmp_path, write, load):
    tensors, metadata = load(single)
    rows = {key: (dtype, data, shape) for key, (dtype, shape, data) in tensors.items()}
    rows["model_ema.diffusion_modelout0bias"] = np.zeros(4, np.float32)
    rows["betas"] = np.ones(4, np.float64)
    rows["stray.weight"] = np.ones((2, 64), np.float32)
    path = write(tmp_path / "more.safetensors", rows, metadata)
    plan = plan_of(path, Request("safetensors", type=type_named("nf4")))
    assert dict(plan.dropped) == {"model_ema.diffusion_modelout0bias": "EMA copy of the denoiser"}
    kept = {step.key: step for step in plan.steps if not step.part}
    assert set(kept) == {"betas", "stray.weight"}
    assert kept["betas"].stored == "f64"
    assert kept["betas"].decision.reason.startswith("noise schedule buffer")
    assert all(step.decision.reason.endswith(": copied") for step in kept.values())
    plan = plan_of(path, Request("gguf", type=type_named("q8_0")))
    assert {"betas", "stray.weight"} <= {key for key, _ in plan.dropped}
    out = tmp_path / "out.safetensors"
    run_job(path, out, Request("safetensors"))
    assert np.array_equal(load(out)[0]["betas"][2], np.ones(4).view(np.uint8))


def test_packed_leftovers_are_dropped_not_mangled(single, tmp_path, write, load):
    tensors, metadata = load(single)
    rows = {key: (dtype, data, shape) for key, (dtype, shape, data) in tensors.items()}
    marker = np.frombuffer(b'{"format": "int8_tensorwise"}', np.uint8)
    rows |= {
        "stray.weight": np.ones((2, 64), np.int8),
        "stray.weight_scale": np.ones((2, 1), np.float32),
        "stray.comfy_quant": marker,
    }
    path = write(tmp_path / "more.safetensors", rows, metadata)
    report = run_job(path, tmp_path / "out.safetensors", Request("safetensors"))
    assert "packed" in report.dropped["stray.weight"]


@pytest.fixture(scope="module")
def packed(examples, tmp_path_factory):
    """flux1-shapes' denoiser in every quantized type, by (type, container)."""
    folder = tmp_path_factory.mktemp("packed")
    found = {}
    for name in ("fp8_scaled", "nf4", "int8_rowwise", "fp8_e4m3", "q8_0"):
        ending = ".gguf" if name.startswith("q") else ".safetensors"
        path = folder / f"{name}{ending}"
        wanted = Request(container_for(path), type=type_named(name), parts=("denoiser",))
        run_job(examples / "flux1-shapes", path, wanted)
        found[name] = path
    return found


@pytest.mark.parametrize(
    ("name", "again"), [("nf4", "q8_0"), ("q8_0", "nf4"), ("fp8_scaled", "int8_rowwise")]
)
def test_rounding_twice_needs_the_flag(packed, name, again):
    container = next(iter(TYPES[again].dialects))
    kind = type_named(again)
    with pytest.raises(PolicyError, match=r"is already \w+: .*--allow-requantize"):
        plan_of(packed[name], Request(container, type=kind))
    plan = plan_of(packed[name], Request(container, type=kind, allow_requantize=True))
    twice = [step for step in plan.steps if "requantized from" in step.decision.reason]
    assert twice
    assert {step.stored for step in twice} == {kind.base}


def test_the_same_type_again_is_a_copy(packed):
    plan = plan_of(packed["nf4"], Request("safetensors", type=type_named("nf4")))
    steps = [step for step in plan.steps if step.stored == "nf4"]
    assert steps
    assert all("already nf4" in s.decision.reason and not s.decision.format for s in steps)


@pytest.mark.parametrize(
    ("name", "container", "stays"),
    [
        ("nf4", "safetensors", True),
        ("nf4", "gguf", False),
        ("fp8_scaled", "safetensors", True),
        ("fp8_scaled", "folder", False),
        ("int8_rowwise", "folder", False),
        ("fp8_e4m3", "gguf", False),
        ("q8_0", "gguf", True),
        ("q8_0", "safetensors", False),
        ("q8_0", "folder", False),
    ],
)
def test_packed_weights_stay_packed_or_say_why_not(packed, name, container, stays):
    plan = plan_of(packed[name], Request(container))
    base = TYPES[name].base
    kept = [step for step in plan.steps if step.stored == base]
    cast = [step for step in plan.steps if step.decision.format == "bf16"]
    assert bool(kept) == stays
    assert bool(cast) != stays
    where = f"{base} not storable in {container}: bf16"
    assert all(where in step.decision.reason for step in cast)


def test_scales_that_go_nowhere_are_listed(packed, tmp_path, write, load):
    tensors, metadata = load(packed["fp8_scaled"])
    rows = {key: (dtype, data, shape) for key, (dtype, shape, data) in tensors.items()}
    layer = next(key for key in rows if key.endswith(".comfy_quant")).removesuffix(".comfy_quant")
    rows[f"{layer}.input_scale"] = np.array(2, np.float32)
    path = write(tmp_path / "in.safetensors", rows, metadata)
    assert plan_of(path, Request("safetensors")).dropped == ()  # copied beside its weight
    plan = plan_of(path, Request("safetensors", dtype="bf16"))
    assert plan.dropped == ((f"{layer}.input_scale", plan.dropped[0][1]),)
    assert "it goes with weights that are copied" in plan.dropped[0][1]


def test_weights_in_an_unknown_packing_are_refused_by_name(packed, tmp_path, write, load):
    tensors, metadata = load(packed["int8_rowwise"])
    rows = {key: (dtype, data, shape) for key, (dtype, shape, data) in tensors.items()}
    key = next(key for key in rows if key.endswith(".comfy_quant"))
    marker = json.dumps({"format": "svdquant_w4a4"}).encode()
    rows[key] = np.frombuffer(marker, np.uint8)
    path = write(tmp_path / "in.safetensors", rows, metadata)
    weight = key.replace("comfy_quant", "weight")
    with pytest.raises(UnsupportedDtype, match=f"{weight}.*svdquant.*not supported"):
        plan_of(path, Request("safetensors"))


@pytest.mark.parametrize(
    ("name", "container"),
    [("a.gguf", "gguf"), ("a.safetensors", "safetensors"), ("a", "folder"), ("sd-v1.5", "folder")],
)
def test_containers_follow_the_extension(tmp_path, name, container):
    assert container_for(tmp_path / name) == container


def test_unwritable_extensions_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write \.ckpt"):
        container_for(tmp_path / "a.ckpt")


def test_keys_that_a_layout_has_no_name_for_are_listed(examples):
    from diffquant.convert.jobs import opened
    from diffquant.convert.plan import _without_target

    with opened(examples / "flux1-shapes") as (_, logical, match):
        plan = make_plan(logical, match, Request(container="safetensors"))
        assert _without_target(match.parts, plan.steps) == []
        shorter = [step for step in plan.steps if not step.target.endswith("img_in.weight")]
        assert _without_target(match.parts, shorter) == [
            ("transformer/x_embedder.weight", "no counterpart in the output's layout")
        ]
