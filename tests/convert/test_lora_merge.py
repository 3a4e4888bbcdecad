"""Merging in the streaming loop: rows of fused weights, layouts, strengths, refusals, reports."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert import cutting
from diffquant.convert.binding import bind
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import MERGED_KEY, LoraInput, merging
from diffquant.convert.match import to_canonical
from diffquant.convert.recognise import recognise
from diffquant.convert.request import Request
from diffquant.core.errors import ArchitectureError, MalformedFile, PolicyError, UsageError
from diffquant.io import open_source
from diffquant.quant.types import type_named

RNG = np.random.default_rng(7)
FLUX_BLOCK = "double_blocks.0.img_attn"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def weights(path):
    """(part, canonical key) -> (rows, columns) float32."""
    with open_source(path) as source:
        logical = bind(source)
        match = recognise(logical.specs(), source.metadata, source.configs)
        found = {}
        for part in match.parts:
            for one in to_canonical(part):
                shape = one.shape
                pieces = [logical.read(p.key, None) for p in one.pieces]
                if len(shape) < 2:
                    pieces = [
                        read.reshape(-1, 1)[p.start : p.stop]
                        for read, p in zip(pieces, one.pieces, strict=True)
                    ]
                else:
                    pieces = [
                        read[p.start : p.stop] for read, p in zip(pieces, one.pieces, strict=True)
                    ]
                found[part.name, one.target] = np.concatenate(pieces)
        return found


def factors(name, rows, columns, rank=3, **rest):
    """A LoRA of one layer in kohya's spelling; alpha is twice the rank."""
    down = RNG.standard_normal((rank, columns)).astype(np.float32) * 0.1
    up = RNG.standard_normal((rows, rank)).astype(np.float32) * 0.1
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return {**tensors, f"{name}.alpha": np.array(2 * rank, np.float32), **rest}, 2 * up @ down


def merge(base, out, *loras, allow_missing=False, **fields):
    given = tuple(one if isinstance(one, LoraInput) else LoraInput(one) for one in loras)
    request = Request(container=container_for(out), **fields)
    with merging(base, given, allow_missing=allow_missing) as found:
        return found.told(run_job(base, out, found.into(request), force=True, beside=found.paths))


@pytest.fixture(scope="module")
def flux(examples, tmp_path_factory):
    """The Flux demo in float32, as a single file: canonical names, fused qkv."""
    out = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    run_job(examples / "flux1-shapes", out, Request(container="safetensors", dtype="f32"))
    return out


@pytest.fixture(scope="module")
def sd15(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("sd15") / "sd15.safetensors"
    run_job(examples / "sd15-shapes", out, Request(container="safetensors", dtype="f32"))
    return out


def changed(before, after):
    return {place for place, one in after.items() if not np.array_equal(one, before[place])}


@pytest.mark.parametrize("chunk", [1 << 20, 1 << 10])
@pytest.mark.parametrize("output", ["out.safetensors", "folder"])
def test_a_layer_of_rows_changes_those_rows_in_any_layout(
    output, chunk, flux, write, tmp_path, monkeypatch
):
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    before = weights(flux)
    rows, columns = before["denoiser", f"{FLUX_BLOCK}.qkv.weight"].shape
    name = "transformer_blocks.0.attn.to_k"
    tensors, delta = factors(f"transformer.{name}", rows // 3, columns)
    lora = write(tmp_path / "lora.safetensors", tensors)
    report = merge(flux, tmp_path / output, LoraInput(lora, 0.5))
    after = weights(tmp_path / output)
    place = ("denoiser", f"{FLUX_BLOCK}.qkv.weight")
    assert changed(before, after) == {place}
    wanted = before[place].copy()
    wanted[rows // 3 : 2 * rows // 3] += 0.5 * delta
    np.testing.assert_allclose(after[place], wanted, atol=1e-6)
    [row], [layer] = report.merged.loras, report.merged.layers
    share = np.linalg.norm(wanted - before[place]) / np.linalg.norm(before[place])
    assert layer.change == pytest.approx(share, rel=1e-4)
    assert (row.merged, row.written, row.largest_key) == (1, 1, place[1])
    with open_source(tmp_path / output) as source:
        if output.endswith("s"):
            assert source.metadata[MERGED_KEY].startswith("lora.safetensors:0.5 ")


def test_rows_in_another_order_are_put_where_they_belong(flux, write, tmp_path):
    """BFL keeps (shift, scale), Diffusers (scale, shift): one layer, two runs of rows."""
    before = weights(flux)
    place = ("denoiser", "final_layer.adaLN_modulation.1.weight")
    rows, columns = before[place].shape
    tensors, delta = factors("transformer.norm_out.linear", rows, columns)
    merge(flux, tmp_path / "out.safetensors", write(tmp_path / "x.safetensors", tensors))
    wanted = before[place] + np.concatenate([delta[rows // 2 :], delta[: rows // 2]])
    np.testing.assert_allclose(weights(tmp_path / "out.safetensors")[place], wanted, atol=1e-6)


def test_xlabs_qkv_of_a_single_block_is_the_first_rows_of_linear1(flux, write, tmp_path):
    before = weights(flux)
    place = ("denoiser", "single_blocks.0.linear1.weight")
    _, columns = before[place].shape
    tensors, delta = factors("x", 3 * columns, columns)
    name = "single_blocks.0.processor.qkv_lora"
    named = {
        f"{name}.down.weight": tensors["x.lora_down.weight"],
        f"{name}.up.weight": tensors["x.lora_up.weight"],
    }
    merge(flux, tmp_path / "out.safetensors", write(tmp_path / "x.safetensors", named))
    after = weights(tmp_path / "out.safetensors")
    wanted = before[place].copy()
    wanted[: 3 * columns] += delta / 2  # no alpha: the scale is one
    np.testing.assert_allclose(after[place], wanted, atol=1e-6)


def test_rows_of_a_fused_bias_are_changed_too(flux, write, tmp_path):
    before = weights(flux)
    rows, columns = before["denoiser", f"{FLUX_BLOCK}.qkv.weight"].shape
    shift = RNG.standard_normal(rows // 3).astype(np.float32)
    name = "transformer.transformer_blocks.0.attn.to_v"
    tensors, _ = factors(name, rows // 3, columns)
    named = {f"{name}.diff_b": shift}
    size = before["denoiser", f"{FLUX_BLOCK}.norm.key_norm.scale"].size
    named[f"{name.replace('to_v', 'norm_k')}.w_norm"] = np.ones(size, np.float32)
    lora = write(tmp_path / "x.safetensors", {**tensors, **named})
    report = merge(flux, tmp_path / "folder", LoraInput(lora, 0.5))
    after = weights(tmp_path / "folder")
    wanted = before["denoiser", f"{FLUX_BLOCK}.qkv.bias"].copy()
    wanted[2 * rows // 3 :, 0] += 0.5 * shift
    np.testing.assert_allclose(after["denoiser", f"{FLUX_BLOCK}.qkv.bias"], wanted, atol=1e-6)
    scale = ("denoiser", f"{FLUX_BLOCK}.norm.key_norm.scale")
    np.testing.assert_allclose(after[scale], before[scale] + 0.5, atol=1e-6)
    assert report.merged.loras[0].kinds == {"LoRA": 1, "norm": 1}


def test_several_files_add_up_and_text_encoders_have_a_strength(sd15, write, tmp_path):
    before = weights(sd15)
    places = {
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (
            "denoiser",
            "middle_block.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (
            "text_encoder",
            "text_model.encoder.layers.0.mlp.fc1.weight",
        ),
    }
    loras, deltas = [], []
    for index in range(2):
        tensors, found = {}, {}
        for name, place in places.items():
            more, found[place] = factors(name, *before[place].shape)
            tensors |= more
        loras.append(write(tmp_path / f"{index}.safetensors", tensors))
        deltas.append(found)
    given = (LoraInput(loras[0], 1.0, 0.25), LoraInput(loras[1], -0.5, 0.0))
    report = merge(sd15, tmp_path / "out.safetensors", *given)
    after = weights(tmp_path / "out.safetensors")
    assert changed(before, after) == set(places.values())
    unet, text = places.values()
    wanted = before[unet] + deltas[0][unet] - 0.5 * deltas[1][unet]
    np.testing.assert_allclose(after[unet], wanted, atol=1e-6)
    np.testing.assert_allclose(after[text], before[text] + 0.25 * deltas[0][text], atol=1e-6)
    assert [row.encoder_weight for row in report.merged.loras] == [0.25, 0.0]


def test_layers_that_do_not_fit_are_an_error_unless_allowed(sd15, write, tmp_path):
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    rows, columns = weights(sd15)[
        "denoiser", "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    ].shape
    good, _ = factors(name, rows, columns)
    wide, _ = factors(name.replace("to_q", "to_k"), rows, 2 * columns)
    alien, _ = factors("lora_unet_no_such_layer", 4, 4)
    lora = write(tmp_path / "x.safetensors", {**good, **wide, **alien})
    with pytest.raises(ArchitectureError, match=r"2 of its 3 layers do not fit .*--allow-missing"):
        merge(sd15, tmp_path / "out.safetensors", lora)
    assert not (tmp_path / "out.safetensors").exists()
    report = merge(sd15, tmp_path / "out.safetensors", lora, allow_missing=True)
    [row] = report.merged.loras
    assert (row.merged, {layer for layer, _ in row.skipped}) == (
        1,
        {name.replace("to_q", "to_k"), "lora_unet_no_such_layer"},
    )
    assert any("2 layers are left out" in text for text in report.warnings)
    lora = write(tmp_path / "y.safetensors", alien)
    with pytest.raises(ArchitectureError, match="none of its 1 layers fits"):
        merge(sd15, tmp_path / "z.safetensors", lora, allow_missing=True)


def test_parts_that_the_output_lacks_are_named(sd15, write, tmp_path):
    before = weights(sd15)
    tensors = {}
    for name, place in (
        ("lora_unet_time_embed_0", ("denoiser", "time_embed.0.weight")),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ),
    ):
        tensors |= factors(name, *before[place].shape)[0]
    tensors |= factors("lora_te2_text_model_encoder_layers_0_mlp_fc1", 4, 4)[0]
    lora = write(tmp_path / "x.safetensors", tensors)
    report = merge(sd15, tmp_path / "out.gguf", lora, type=type_named("q8_0"))
    assert report.merged.loras[0].absent == {"text_encoder": 1, "text_encoder_2": 1}
    assert (report.merged.loras[0].merged, report.merged.loras[0].written) == (2, 1)


BROKEN = {
    "a missing half": ({"x.lora_down.weight": np.ones((2, 4), "f4")}, "the up factor"),
    "two shapes": (
        {"x.lora_down.weight": np.ones((2, 4), "f4"), "x.lora_up.weight": np.ones((4, 3), "f4")},
        "expected factors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_files_are_refused_by_name(case, sd15, write, tmp_path):
    tensors, reason = BROKEN[case]
    good, _ = factors("lora_unet_time_embed_0", 4, 4)
    lora = write(tmp_path / "bad.safetensors", {**good, **tensors})
    with pytest.raises(MalformedFile, match=f"bad.safetensors: x: .*{reason}"):
        merge(sd15, tmp_path / "out.safetensors", lora)


def test_nan_in_factors_is_named_and_nothing_is_left(sd15, write, tmp_path):
    shape = weights(sd15)["denoiser", "time_embed.0.weight"].shape
    tensors, _ = factors("lora_unet_time_embed_0", *shape)
    tensors["lora_unet_time_embed_0.lora_up.weight"][0, 0] = np.nan
    lora = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(MalformedFile, match=r"lora_up.weight: NaN or infinity"):
        merge(sd15, tmp_path / "out.safetensors", lora)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_nothing_to_merge_and_no_numbers_are_said(sd15, write, tmp_path):
    plain = write(tmp_path / "plain.safetensors", {"a.weight": np.ones((2, 2), "f4")})
    with pytest.raises(ArchitectureError, match="no LoRA or other adapter in it"):
        merge(sd15, tmp_path / "out.safetensors", plain)
    with pytest.raises(UsageError, match="expected finite weights"):
        merge(sd15, tmp_path / "out.safetensors", LoraInput(plain, math.nan))


def test_packed_bases_take_a_flag_and_tell_what_survives(sd15, write, tmp_path):
    packed = tmp_path / "sd15.gguf"
    run_job(sd15, packed, Request(container="gguf", type=type_named("q8_0")))
    key = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors, delta = factors(
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
        *weights(sd15)["denoiser", key].shape,
    )
    lora = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(PolicyError, match=r"is q8_0: .*--allow-requantize"):
        merge(packed, tmp_path / "out.gguf", lora)
    strong = merge(packed, tmp_path / "out.gguf", lora, allow_requantize=True)
    before, after = (
        weights(packed)["denoiser", key],
        weights(tmp_path / "out.gguf")["denoiser", key],
    )
    lost = np.linalg.norm(after - before - delta) / np.linalg.norm(delta)
    [layer] = strong.merged.layers
    assert layer.survival == pytest.approx(1 - lost, abs=1e-3)
    assert 0.5 < layer.survival < 1
    weak = merge(packed, tmp_path / "out.gguf", LoraInput(lora, 1e-3), allow_requantize=True)
    assert weak.merged.survival < 0.1
    assert any("keep less than half" in text for text in weak.warnings)
    assert not any("keep less than half" in text for text in strong.warnings)


def test_a_lora_that_is_read_is_never_written_to(sd15, write, tmp_path):
    shape = weights(sd15)["denoiser", "time_embed.0.weight"].shape
    tensors, _ = factors("lora_unet_time_embed_0", *shape)
    lora = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UsageError, match="source itself"):
        merge(sd15, lora, lora)


def test_an_interrupted_run_is_known_by_files_and_strengths(sd15, write, tmp_path):
    shape = weights(sd15)["denoiser", "time_embed.0.weight"].shape
    tensors, _ = factors("lora_unet_time_embed_0", *shape)
    lora = write(tmp_path / "x.safetensors", tensors)
    texts = []
    for strength in (1.0, 1.0, 0.5):
        with merging(sd15, (LoraInput(lora, strength, strength),)) as found:
            texts.append(repr(found.into(Request(container="safetensors"))))
    assert texts[0] == texts[1] != texts[2]


# --- real files -----------------------------------------------------------------------------------

REAL = {  # layers; one of them comes with the vectors of two tokens
    "catundchat_sd15.safetensors": (128, 0),
    "catundchat_sd15.bin": (128, 0),
    "cloneofsimo_analog_svd_rank4.safetensors": (192, 0),
    "cloneofsimo_lora_disney.safetensors": (192, 2),
}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A file with the header of SD1.5 and a hole in place of the numbers."""
    manifest = SHARED / "manifests/sd15.checkpoint.ldm-pruned-emaonly.json.gz"
    if not manifest.is_file():
        pytest.skip("the reference data is not here")
    header, at = {}, 0
    tensors = json.loads(gzip.decompress(manifest.read_bytes()))["tensors"]
    for key, (_, shape) in tensors.items():
        end = at + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path_factory.mktemp("full") / "sd15.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_loras_fit_a_checkpoint_of_full_size(name, full_size, tmp_path):
    layers, vectors = REAL[name]
    request = Request(container="safetensors")
    with merging(full_size, (LoraInput(SHARED / "real/lora" / name),)) as found:
        out = tmp_path / "out.safetensors"
        report = found.told(run_job(full_size, out, found.into(request), dry_run=True))
    [row] = report.merged.loras
    assert (row.merged, row.written, row.skipped) == (layers, layers, ())
    assert len(row.ignored) == vectors
    assert row.base == "sd15"


def test_a_change_of_a_zero_weight_is_a_change():
    """In proportion to its weight it is infinite; it is no adapter that changes nothing."""
    from diffquant.convert.lora.merge import _share

    assert _share(1.0, 0.0) == math.inf
    assert _share(0.0, 0.0) == 0.0
    assert _share(1.0, 2.0) == 0.5
