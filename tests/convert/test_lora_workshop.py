"""LoRAs under other names, at other ranks, from differences: the deltas are what is compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.detect import to_canonical
from diffquant.convert.jobs import opened
from diffquant.convert.lora.base import guess_base
from diffquant.convert.lora.conversion import convert_lora
from diffquant.convert.lora.extraction import extract_lora
from diffquant.convert.lora.group import group_adapters
from diffquant.convert.lora.match import match_adapters, match_lora
from diffquant.convert.lora.modules import known_model
from diffquant.convert.lora.pairs import scale_of
from diffquant.convert.lora.parse import parse_lora
from diffquant.convert.lora.ranks import Keep, keep_of
from diffquant.convert.lora.resizing import resize_lora
from diffquant.core.errors import (
    ArchitectureError,
    MalformedFile,
    MappingError,
    PolicyError,
    UsageError,
)
from diffquant.io import open_source

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = sorted(path for path in (SHARED / "real/lora").glob("*") if path.suffix in (".safetensors",))
DOUBLE, SINGLE = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
KOHYA = ["lora_unet_" + name.replace(".", "_") for name in (DOUBLE, SINGLE)]
TO_QKV = [f"transformer.transformer_blocks.0.attn.to_{one}" for one in "qkv"]


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


def kohya(name, shape, rank=4, alpha=2.0, seed=0):
    tail = (1,) * len(shape[2:])
    return {
        f"{name}.lora_down.weight": numbers(seed, rank, *shape[1:]),
        f"{name}.lora_up.weight": numbers(seed + 1, shape[0], rank, *tail),
        f"{name}.alpha": np.array(alpha, np.float32),
    }


def peft(name, shape, rank=4, seed=0):
    return {
        f"{name}.lora_A.weight": numbers(seed, rank, shape[1]),
        f"{name}.lora_B.weight": numbers(seed + 1, shape[0], rank),
    }


@pytest.fixture(scope="module")
def flux(examples):
    return examples / "flux1-shapes"


@pytest.fixture(scope="module")
def shapes_of():
    """Part -> canonical key -> shape of a checkpoint, and its architecture."""

    def of(path):
        with opened(path) as (_, _, match):
            parts = {
                part.name: {one.target: one.shape for one in to_canonical(part)}
                for part in match.parts
            }
        return match.architecture, parts

    return of


def factors_of(path):
    """(part, first canonical key) -> scaled up and down factors, by the published model's names."""
    with open_source(path) as source:
        adapters = group_adapters(source).adapters
        found = {}
        for one in match_adapters(adapters, known_model(guess_base(adapters))).placed:
            up, down = (values(source, one.adapter.parts[role]) for role in ("up", "down"))
            key = one.part, one.module.pieces[0].key
            found[key] = scale_of(one.adapter) * up.squeeze(), down.squeeze()
    return found


def deltas(path, known):
    """(part, canonical key) -> the whole delta, by the matcher that serves `generate --lora`."""
    architecture, parts = known
    found = {}
    with open_source(path) as source:
        match = match_lora(parse_lora(source).layers, ARCHITECTURES[architecture], parts)
        assert not match.unmatched
        assert not match.shape_mismatch
        for target in match.targets:
            layer = target.layer
            shape = parts[target.part][target.key]
            down, up = (values(source, key) for key in (layer.down, layer.up))
            delta = layer.scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))
            delta = delta[slice(*target.up_rows)] if target.up_rows else delta
            whole = found.setdefault(
                (target.part, target.key), np.zeros((shape[0], int(np.prod(shape[1:]))))
            )
            whole[slice(*target.rows) if target.rows else slice(None)] += delta
    return found


def values(source, key):
    spec = source.specs[key]
    kind = {"F32": "<f4", "F16": "<f2"}[spec.dtype]
    return source.read(key).view(kind).reshape(spec.shape).astype(np.float64)


def ranks(path):
    with open_source(path) as source:
        return [layer.rank for layer in parse_lora(source).layers]


def assert_same(one, two, tolerance=1e-6):
    assert one.keys() == two.keys()
    for key, delta in one.items():
        assert np.linalg.norm(delta - two[key]) <= tolerance * np.linalg.norm(delta), key


@pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers", "peft", "bfl"])
def test_fused_layers_keep_their_delta_and_come_back(tmp_path, write, flux, shapes_of, to):
    known = shapes_of(flux)
    denoiser = known[1]["denoiser"]
    tensors = {}
    for name, spelled in zip((DOUBLE, SINGLE), KOHYA, strict=True):
        tensors |= kohya(spelled, denoiser[f"{name}.weight"])
    source = write(tmp_path / "a.safetensors", tensors)
    there = tmp_path / "b.safetensors"
    report = convert_lora(source, there, to=to, base=flux)
    assert report.written == (7 if to in ("diffusers", "peft") else 2)
    before = deltas(source, known)
    assert_same(before, deltas(there, known))
    back = tmp_path / "c.safetensors"
    convert_lora(there, back, to="kohya", base=flux)
    assert_same(before, deltas(back, known))
    assert ranks(back) == [4, 4]  # parts of one layer share its down factor


def test_layers_with_different_down_factors_are_joined_at_the_sum_of_ranks(
    tmp_path, write, flux, shapes_of
):
    known = shapes_of(flux)
    rows, columns = known[1]["denoiser"][f"{DOUBLE}.weight"]
    tensors = {}
    for index, name in enumerate(TO_QKV):
        if index != 1:  # k is not adapted
            tensors |= peft(name, (rows // 3, columns), rank=2 + index, seed=10 * index)
    source = write(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "b.safetensors"
    report = convert_lora(source, out, to="kohya", base=flux)
    assert (report.joined, report.ranks) == (1, {"6": 1})
    assert any("different down factors" in note for note in report.notes)
    before, after = deltas(source, known), deltas(out, known)
    assert_same(before, after)
    key = ("denoiser", f"{DOUBLE}.weight")
    assert not after[key][rows // 3 : 2 * rows // 3].any()


def test_joined_layers_of_several_scales_keep_them(tmp_path, write, flux, shapes_of):
    known = shapes_of(flux)
    rows, columns = known[1]["denoiser"][f"{DOUBLE}.weight"]
    tensors = {}
    for index, name in enumerate(TO_QKV):
        tensors |= kohya(name, (rows // 3, columns), alpha=1.0 + index, seed=10 * index)
    source = write(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "b.safetensors"
    convert_lora(source, out, to="comfy", base=flux)
    assert_same(deltas(source, known), deltas(out, known))


@pytest.mark.skipif(not REAL, reason="needs ../shared/data/real/lora")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_loras_go_to_kohya_and_peft_and_back(tmp_path, path):
    steps = [path]
    for index, to in enumerate(("kohya", "peft", "kohya", "diffusers", "comfy")):
        steps.append(tmp_path / f"{index}.safetensors")
        convert_lora(steps[-2], steps[-1], to=to)
    before = factors_of(path)
    assert len(before) in (128, 192)
    for one in steps[1:]:
        after = factors_of(one)
        assert before.keys() == after.keys()
        for key, pair in before.items():
            assert all(map(np.array_equal, pair, after[key])), key


def test_kohya_names_of_a_unet_are_diffusers_or_original(tmp_path, write, examples):
    sd15 = examples / "sd15-shapes"
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    source = write(tmp_path / "a.safetensors", peft(f"unet.{module}", (64, 64)))
    for original, name in (
        (False, module),
        (True, "input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
    ):
        out = tmp_path / f"{original}.safetensors"
        convert_lora(source, out, to="kohya", base=sd15, original=original)
        with open_source(out) as opened_:
            assert f"lora_unet_{name.replace('.', '_')}.lora_down.weight" in opened_.specs


def test_other_kinds_keep_their_parts_or_are_refused_by_name(tmp_path, write, flux, shapes_of):
    rows, columns = shapes_of(flux)[1]["denoiser"]["double_blocks.0.img_attn.proj.weight"]
    name = "lora_unet_double_blocks_0_img_attn_proj"
    lokr = {
        f"{name}.lokr_w1": numbers(0, 2, 2),
        f"{name}.lokr_w2": numbers(1, rows // 2, columns // 2),
    }
    source = write(tmp_path / "a.safetensors", lokr)
    out = tmp_path / "b.safetensors"
    convert_lora(source, out, to="comfy", base=flux)
    with open_source(out) as found:
        key = "diffusion_model.double_blocks.0.img_attn.proj.lokr_w2"
        assert np.array_equal(values(found, key), lokr[f"{name}.lokr_w2"])
    with pytest.raises(UsageError, match=f"{name}: LoKr has no names in Diffusers files"):
        convert_lora(source, tmp_path / "c.safetensors", to="diffusers", base=flux)
    assert not (tmp_path / "c.safetensors").exists()


def test_a_kind_that_cannot_be_joined_is_refused_by_name(tmp_path, write, flux, shapes_of):
    rows, columns = shapes_of(flux)[1]["denoiser"][f"{DOUBLE}.weight"]
    name = "lycoris_transformer_blocks_0_attn_to_q"
    tensors = {
        f"{name}.lokr_w1": numbers(0, 2, 2),
        f"{name}.lokr_w2": numbers(1, rows // 6, columns // 2),
    }
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MappingError, match=f"{name}: LoKr cannot be cut or joined"):
        convert_lora(source, tmp_path / "b.safetensors", to="kohya", base=flux)


def test_malformed_and_foreign_layers_are_refused_by_name(tmp_path, write, flux):
    half = {f"{KOHYA[0]}.lora_down.weight": numbers(0, 4, 256)}
    source = write(tmp_path / "a.safetensors", half)
    with pytest.raises(MalformedFile, match=f"{KOHYA[0]}: the up factor"):
        convert_lora(source, tmp_path / "b.safetensors", to="comfy", base=flux)
    source = write(tmp_path / "c.safetensors", kohya("lora_unet_nowhere", (8, 8)))
    with pytest.raises(ArchitectureError, match=r"lora_unet_nowhere .*--allow-missing"):
        convert_lora(source, tmp_path / "b.safetensors", to="comfy", base=flux)
    with pytest.raises(UsageError, match="is read"):
        convert_lora(source, source, to="comfy", base=flux, force=True)


def test_a_scale_that_float16_rounds_is_said(tmp_path, write, flux, shapes_of):
    shape = shapes_of(flux)[1]["denoiser"]["double_blocks.0.img_attn.proj.weight"]
    source = write(
        tmp_path / "a.safetensors",
        kohya("lora_unet_double_blocks_0_img_attn_proj", shape, rank=4, alpha=3.0),
    )
    report = convert_lora(source, tmp_path / "b.safetensors", to="peft", base=flux)
    assert any("0.75" in note and "rounds" in note for note in report.notes)


@pytest.mark.parametrize("conv", [False, True])
def test_resizing_is_the_best_there_is(tmp_path, write, examples, shapes_of, conv):
    sd15 = examples / "sd15-shapes"
    known = shapes_of(sd15)
    name, key = (
        ("down_blocks_0_resnets_0_conv1", "input_blocks.1.0.in_layers.2.weight")
        if conv
        else (
            "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        )
    )
    shape = known[1]["denoiser"][key]
    source = write(tmp_path / "a.safetensors", kohya(f"lora_unet_{name}", shape, rank=8, alpha=4.0))
    out = tmp_path / "b.safetensors"
    report = resize_lora(source, out, Keep(3))
    before, after = deltas(source, known)["denoiser", key], deltas(out, known)["denoiser", key]
    singular = np.linalg.svd(before, compute_uv=False)
    least = np.sqrt((singular[3:] ** 2).sum())
    assert np.linalg.norm(before - after) == pytest.approx(least, rel=1e-4)
    assert report.kept == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())
    assert ranks(out) == [3]


def test_measures_keep_what_they_say():
    singular = np.array([8.0, 4.0, 2.0, 1.0])
    total = float((singular**2).sum())  # 85
    assert Keep(None, "energy", 64 / 85).count(singular, total) == 1
    assert Keep(None, "energy", 65 / 85).count(singular, total) == 2
    assert Keep(None, "sv_fro", (80 / 85) ** 0.5).count(singular, total) == 2
    assert Keep(None, "sv_cumulative", 14 / 15).count(singular, total) == 3
    assert Keep(None, "sv_ratio", 4.0).count(singular, total) == 3
    assert Keep(2, "energy", 1.0).count(singular, total) == 2
    assert Keep(9).count(singular, total) == 4
    with pytest.raises(UsageError, match="give one of them"):
        keep_of(None, {"energy": 0.5, "sv_fro": 0.5})
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        keep_of(None, {"energy": 1.5})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, examples, load, write):
    """A checkpoint, and a copy of it in another layout with changes of rank 3 in float32."""
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request

    folder = tmp_path_factory.mktemp("tuned")
    made = {}
    for name in ("sd15-shapes", "flux1-shapes"):
        plain = folder / f"{name}.safetensors"
        run_job(examples / name, plain, Request("safetensors", dtype="f32"))
        tensors, metadata = load(plain)
        changed = {}
        for index, (key, (dtype, shape, raw)) in enumerate(tensors.items()):
            array = raw.view("<f4").reshape(shape) if dtype == "F32" else (dtype, raw, shape)
            layer = dtype == "F32" and len(shape) in (2, 4) and "vae" not in key
            if layer and "embed" not in key and "shared" not in key and "first_stage" not in key:
                flat = numbers(index, shape[0], 3) @ numbers(index + 1, 3, int(np.prod(shape[1:])))
                array = array + flat.reshape(shape)
            changed[key] = array
        made[name] = (
            examples / name,
            write(folder / f"{name}-tuned.safetensors", changed, metadata),
        )
    return made


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", ["sd15-shapes", "flux1-shapes"])
def test_extracting_at_full_rank_reproduces_the_tuned_model(tmp_path, tuned, shapes_of, name, to):
    base, other = tuned[name]
    out = tmp_path / "x.safetensors"
    report = extract_lora(other, base, out, Keep(3), to=to, dtype="f32")
    assert report.kept > 1 - 1e-6
    assert {row.rank for row in report.layers} <= {1, 2, 3}
    found = deltas(out, shapes_of(base))
    with opened(base) as (_, left, one), opened(other) as (_, right, two):
        for part, key in found:
            rows = []
            for logical, match in ((right, two), (left, one)):
                (row,) = (r for r in to_canonical(match.part(part)) if r.target == key)
                pieces = [logical.read(p.key, (p.start, p.stop)) for p in row.pieces]
                rows.append(np.concatenate(pieces).astype(np.float64))
            wanted = rows[0] - rows[1]
            error = np.linalg.norm(found[part, key] - wanted)
            assert error <= 1e-4 * np.linalg.norm(wanted), key


def test_a_share_of_the_energy_decides_the_rank(tmp_path, tuned):
    base, other = tuned["sd15-shapes"]
    report = extract_lora(other, base, tmp_path / "x.safetensors", Keep(None, "energy", 0.999999))
    assert max(row.rank for row in report.layers) == 3
    small = extract_lora(other, base, tmp_path / "y.safetensors", Keep(None, "energy", 0.3))
    assert {row.rank for row in small.layers} == {1}
    assert all(row.kept >= 0.3 for row in small.layers)


def test_a_difference_needs_one_architecture_and_something_that_differs(tmp_path, tuned):
    base, other = tuned["sd15-shapes"]
    out = tmp_path / "x.safetensors"
    with pytest.raises(ArchitectureError, match="one architecture"):
        extract_lora(other, tuned["flux1-shapes"][0], out, Keep(3))
    with pytest.raises(UsageError, match="do not differ"):
        extract_lora(base, base, out, Keep(3))
    assert not out.exists()


@pytest.mark.parametrize("container", ["safetensors", "folder", "gguf"])
def test_a_transfer_onto_the_base_is_the_fine_tune(tmp_path, tuned, container):
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.convert.transfer import Transfer
    from diffquant.inspect.diff import diff

    base, other = tuned["flux1-shapes"]
    out = tmp_path / ("x" if container == "folder" else f"x.{container}")
    request = Request(container, dtype="f32", transfer=Transfer(other, base))
    report = run_job(base, out, request)
    assert any("tensors get 1 x" in note for note in report.notes)
    found = diff(out, other, parts=("denoiser",))
    assert found.same
    # target + (tuned - base) rounds twice in float32; GGUF files keep some tensors as F16
    worst = max((row.error or 0) for row in found.tensors)
    assert worst < (1e-6 if container != "gguf" else 1e-3)


def test_half_a_transfer_is_half_the_difference(tmp_path, tuned):
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.convert.transfer import Transfer

    base, other = tuned["sd15-shapes"]
    out = tmp_path / "x.safetensors"
    run_job(base, out, Request("safetensors", dtype="f32", transfer=Transfer(other, base, 0.5)))
    half = extract_lora(out, base, tmp_path / "h.safetensors", Keep(3))
    whole = extract_lora(other, base, tmp_path / "w.safetensors", Keep(3))
    for one, two in zip(half.layers, whole.layers, strict=True):
        assert one.norm == pytest.approx(two.norm / 2, rel=1e-4)


def test_a_transfer_refuses_packed_targets_and_its_own_inputs(tmp_path, tuned):
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.convert.transfer import Transfer
    from diffquant.quant.types import type_named

    base, other = tuned["flux1-shapes"]
    packed = tmp_path / "q.gguf"
    run_job(base, packed, Request("gguf", type=type_named("q8_0")))
    request = Request("gguf", transfer=Transfer(other, base))
    with pytest.raises(PolicyError, match="is packed"):
        run_job(packed, tmp_path / "x.gguf", request)
    with pytest.raises(UsageError, match="is the source itself"):
        run_job(base, other, Request("safetensors", transfer=Transfer(other, base)), force=True)
