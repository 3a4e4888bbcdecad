"""Other kinds than LoRA under other names: the same change of a checkpoint, or refused by name."""

import numpy as np
import pytest

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.conversion import convert_lora
from diffquant.convert.lora.merge import LoraInput, merging
from diffquant.convert.request import Request
from diffquant.core.errors import DiffquantError, MappingError, PolicyError, UsageError
from diffquant.io import open_source

QKV = "double_blocks.0.img_attn.qkv"
TO = "transformer.transformer_blocks.0.attn.to_"
KOHYA = "lora_unet_" + QKV.replace(".", "_")
NORM_OUT = "transformer.norm_out.linear"
LAST = "final_layer.adaLN_modulation.1"
RNG = np.random.default_rng(5)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32) * 0.1


def alpha(value):
    return {"alpha": np.array(value, np.float32)}


def lora(n, k):
    return {"lora_down.weight": numbers(3, k), "lora_up.weight": numbers(n, 3), **alpha(6)}


def dora(n, k):
    return {**lora(n, k), "dora_scale": 1 + numbers(n, 1)}


def dora_of_columns(n, k):
    return {**lora(n, k), "dora_scale": 1 + numbers(1, k)}


def biased(n, k):
    return {**lora(n, k), "diff_b": numbers(n)}


def cored(n, k):
    return {**lora(n, k), "lora_mid.weight": numbers(3, 3)}


def loha(n, k):
    one = {f"hada_w{i}_a": numbers(n, 2) for i in (1, 2)}
    return {**one, **{f"hada_w{i}_b": numbers(2, k) for i in (1, 2)}, **alpha(1)}


def lokr(n, k):
    return {"lokr_w1": numbers(n // 8, 4), "lokr_w2_a": numbers(8, 2), **lokr_b(k)}


def lokr_b(k):
    return {"lokr_w2_b": numbers(2, k // 4), **alpha(1)}


def lokr_of_factors(n, k):
    one = {"lokr_w1_a": numbers(n // 8, 2), "lokr_w1_b": numbers(2, 4)}
    return {**one, "lokr_w2": numbers(8, k // 4), **alpha(1)}


def glora(n, k):
    shapes = {"a1": (k, 2), "a2": (2, k), "b1": (n, 2), "b2": (2, k)}
    return {**{f"{one}.weight": numbers(*shape) for one, shape in shapes.items()}, **alpha(1)}


def oft(n, k):
    return {"oft_blocks": numbers(n // 4, 4, 4), **alpha(0)}


def oft_with_limit(n, k):
    return {"oft_blocks": numbers(n // 4, 4, 4), **alpha(1e-4)}


def oft_rescaled(n, k):
    return {**oft(n, k), "rescale": 1 + numbers(n, 1)}


def boft(n, k):
    return {"oft_blocks": numbers(2, n // 4, 4, 4), **alpha(0)}


def ia3(n, k):
    return {"weight": numbers(n), "on_input": np.array(0, np.uint8)}


def ia3_of_inputs(n, k):
    return {"weight": numbers(k), "on_input": np.array(1, np.uint8)}


def full(n, k):
    return {"diff": numbers(n, k), "diff_b": numbers(n)}


def replacing(n, k):
    return {"set_weight": numbers(n, k)}


KINDS = {
    one.__name__: one
    for one in (
        *(lora, dora, dora_of_columns, biased, cored, loha, lokr, lokr_of_factors, glora, oft),
        *(oft_with_limit, oft_rescaled, boft, ia3, ia3_of_inputs, full, replacing),
    )
}
ALONE = {  # to_k alone in a fused module: zeros in other rows where these mean nothing
    "dora": "DoRA cannot be joined into",
    "dora_of_columns": "by columns measures all rows together",
    "glora": "GLoRA says nothing of the module's other",
    "oft_with_limit": "a limit (alpha) for all blocks",
    "oft_rescaled": "OFT with rescale says nothing of the module's other",
    "boft": "BOFT cannot be cut or joined",
    "ia3_of_inputs": "IA3 says nothing of the module's other",
    "replacing": "full difference with set_weight says nothing of",
}
JOINED = {  # q, k and v into one
    "dora_of_columns": "by columns measures all rows together",
    "cored": "layers cannot be joined: each has its own down",
    "loha": "LoHa layers cannot be joined: each has its own hada_w1_b",
    "lokr": "LoKr layers cannot be joined: each has its own lokr_w2_a",
    "lokr_of_factors": "LoKr layers cannot be joined: each has its own lokr_w1_b",
    "glora": "GLoRA layers cannot be joined: each has its own glora_a1",
    "oft_with_limit": "a limit (alpha) for all blocks",
    "boft": "BOFT cannot be cut or joined",
    "ia3_of_inputs": "IA3 layers cannot be joined: each has its own ia3",
}
REORDERED = {  # both halves of a layer change places
    "dora_of_columns": "by columns measures all rows together",
    "oft_with_limit": "a limit (alpha) for all blocks",
    "boft": "BOFT cannot be cut or joined",
}


@pytest.fixture(scope="module")
def flux(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    request = Request(container="safetensors", dtype="f32", parts=("denoiser",))
    run_job(examples / "flux1-shapes", out, request)
    return out


@pytest.fixture(scope="module")
def width(flux):
    with open_source(flux) as source:
        return source.specs["img_in.weight"].shape[0]


def merged(base, lora, out):
    """Weights that the LoRA changes, after it."""
    with merging(base, (LoraInput(lora),)) as found:
        request = found.into(Request(container="safetensors"))
        run_job(base, out, request, beside=found.paths, force=True)
    with open_source(out) as source, open_source(base) as before:
        values = {key: source.read(key).view("<f4") for key in source.specs}
        return {
            key: one
            for key, one in values.items()
            if not np.array_equal(one, before.read(key).view("<f4"))
        }


def named(parts, name):
    return {f"{name}.{part}": values for part, values in parts.items()}


def assert_same(flux, lora, other, tmp_path):
    wanted = merged(flux, lora, tmp_path / "one.safetensors")
    found = merged(flux, other, tmp_path / "two.safetensors")
    assert wanted
    assert found.keys() == wanted.keys()
    for key, one in wanted.items():
        np.testing.assert_allclose(found[key], one, atol=2e-6)


def check(kind, refused, tensors, to, flux, write, tmp_path):
    lora, out = write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    if kind in refused:
        with pytest.raises(MappingError) as raised:
            convert_lora(lora, out, to=to, base=flux, dry_run=True)
        assert refused[kind] in str(raised.value)
        assert "lora merge" in str(raised.value)
        return
    report = convert_lora(lora, out, to=to, base=flux)
    assert not report.left_out
    assert_same(flux, lora, out, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_layers_keep_what_they_do(kind, flux, width, write, tmp_path):
    lora = write(tmp_path / "a.safetensors", named(KINDS[kind](3 * width, width), KOHYA))
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    convert_lora(lora, there, to="comfy", base=flux)
    with open_source(there) as source:
        assert all(key.startswith(f"diffusion_model.{QKV}.") for key in source.specs)
    convert_lora(there, back, to="kohya", base=flux)
    with open_source(lora) as one, open_source(back) as two:
        assert set(one.specs) == set(two.specs)
    assert_same(flux, lora, back, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_is_some_rows_of_another(kind, flux, width, write, tmp_path):
    tensors = named(KINDS[kind](width, width), f"{TO}k")
    check(kind, ALONE, tensors, "kohya", flux, write, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_are_one_elsewhere(kind, flux, width, write, tmp_path):
    tensors = {}
    for one in "qkv":
        tensors |= named(KINDS[kind](width, width), f"{TO}{one}")
    check(kind, JOINED, tensors, "kohya", flux, write, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_with_its_rows_in_another_order(kind, flux, width, write, tmp_path):
    tensors = named(KINDS[kind](2 * width, width), NORM_OUT)
    check(kind, REORDERED, tensors, "comfy", flux, write, tmp_path)


def test_blocks_that_a_cut_would_go_through_are_refused(flux, width, write, tmp_path):
    tensors = {
        f"{NORM_OUT}.lokr_w1": numbers(1, 4),
        f"{NORM_OUT}.lokr_w2": numbers(2 * width, width // 4),
    }
    lora = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MappingError, match=f"blocks of {2 * width} rows, and row {width} is"):
        convert_lora(lora, tmp_path / "b.safetensors", to="kohya", base=flux)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_and_peft_take_lora_and_dora_cut_into_rows(
    kind, to, flux, width, write, tmp_path
):
    lora = write(tmp_path / "a.safetensors", named(KINDS[kind](3 * width, width), KOHYA))
    out = tmp_path / "b.safetensors"
    if kind not in ("lora", "dora"):
        with pytest.raises(UsageError, match=r"has no names in|of columns") as raised:
            convert_lora(lora, out, to=to, base=flux, dry_run=True)
        assert KOHYA in str(raised.value)
        return
    report = convert_lora(lora, out, to=to, base=flux)
    assert (report.split, report.written) == (1, 3)
    assert_same(flux, lora, out, tmp_path)


def test_a_magnitude_for_some_rows_only_is_refused(flux, width, write, tmp_path):
    tensors = {**named(dora(width, width), f"{TO}q"), **named(lora(width, width), f"{TO}k")}
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(DiffquantError, match="a magnitude is needed for every row"):
        convert_lora(source, tmp_path / "b.safetensors", to="kohya", base=flux)


@pytest.mark.parametrize("kind", ["oft", "boft", "dora_of_columns"])
def test_rows_that_are_mixed_and_parted_are_refused_in_the_plan(kind, flux, width, write, tmp_path):
    lora = write(tmp_path / "a.safetensors", named(KINDS[kind](3 * width, width), KOHYA))
    with merging(flux, (LoraInput(lora),)) as found:
        request = found.into(Request(container=container_for(tmp_path / "out")))
        with pytest.raises(PolicyError, match=rf"to_\w\.weight: {KOHYA}: .* mixes rows that are"):
            run_job(flux, tmp_path / "out", request, dry_run=True)
    tensors = named(KINDS[kind](width, width), f"{TO}k")
    assert merged(flux, write(tmp_path / "k.safetensors", tensors), tmp_path / "m.safetensors")


NORM = "down_blocks.0.resnets.0.norm1"
NORM_OWN = "input_blocks.1.0.in_layers.0"


@pytest.fixture(scope="module")
def unet(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("sd15") / "sd15.safetensors"
    request = Request(container="safetensors", dtype="f32", parts=("denoiser",))
    run_job(examples / "sd15-shapes", out, request)
    return out


@pytest.mark.parametrize("parts", [("w_norm",), ("b_norm",), ("w_norm", "b_norm"), ("diff_b",)])
def test_norms_and_biases_keep_what_they_do(parts, unet, write, tmp_path):
    name = "lora_unet_" + (NORM if "diff_b" not in parts else "conv_out").replace(".", "_")
    size = 4 if "diff_b" in parts else 64
    lora = write(tmp_path / "a.safetensors", named({one: numbers(size) for one in parts}, name))
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    convert_lora(lora, there, to="comfy", base=unet)
    own = NORM_OWN if "diff_b" not in parts else "out.2"
    with open_source(there) as source:
        assert set(source.specs) == {f"diffusion_model.{own}.{one}" for one in parts}
    convert_lora(there, back, to="kohya", base=unet)
    assert_same(unet, lora, there, tmp_path)
    assert_same(unet, lora, back, tmp_path)


def test_norms_need_the_model(write, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        **named(lora(320, 320), name),
        **named({"w_norm": numbers(320)}, "lora_unet_conv_norm_out"),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(DiffquantError, match=r"conv_norm_out \(.*: give the model\)"):
        convert_lora(path, tmp_path / "b.safetensors", to="comfy")
