"""Tiny autoencoders alone in a file: what is packed, what is kept, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from diffquant.cli.main import cli
from diffquant.convert.jobs import run_job
from diffquant.convert.request import Request
from diffquant.core.errors import PolicyError, UnknownArchitecture, UsageError
from diffquant.inspect.describe import describe
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named
from diffquant.runtime.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDTH = 24
OUTSIDE = "outside of the residual blocks"


def block(rng, number, prefix=""):
    made = {}
    for layer in (0, 2, 4):
        name = f"{prefix}{number}.conv.{layer}"
        made[f"{name}.weight"] = rng.standard_normal((WIDTH, WIDTH, 3, 3)).astype(np.float32)
        made[f"{name}.bias"] = np.zeros(WIDTH, np.float32)
    return made


def conv(rng, name, after, before, *, bias=True):
    made = {f"{name}.weight": rng.standard_normal((after, before, 3, 3)).astype(np.float32)}
    return made | ({f"{name}.bias": np.zeros(after, np.float32)} if bias else {})


def half(name, prefix=""):
    """The tensors of a half as its makers number them; a shape of layers as taesd has it."""
    rng = np.random.default_rng(0)
    if name == "encoder":
        found = conv(rng, f"{prefix}0", WIDTH, 3) | block(rng, 1, prefix)
        found |= conv(rng, f"{prefix}2", WIDTH, WIDTH, bias=False) | block(rng, 3, prefix)
        return found | block(rng, 4, prefix) | conv(rng, f"{prefix}5", 4, WIDTH)
    first = 0 if prefix else 1  # the makers count a clamp
    found = conv(rng, f"{prefix}{first}", WIDTH, 4)
    for number in (first + 2, first + 3):
        found |= block(rng, number, prefix)
    found |= conv(rng, f"{prefix}{first + 5}", WIDTH, WIDTH, bias=False)
    return found | block(rng, first + 6, prefix) | conv(rng, f"{prefix}{first + 7}", 3, WIDTH)


FILES = {
    "encoder": half("encoder"),
    "decoder": half("decoder"),
    "whole": half("encoder", "encoder.layers.") | half("decoder", "decoder.layers."),
}


@pytest.fixture(params=FILES)
def source(request, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(FILES[request.param], path)
    return path


@pytest.mark.parametrize("kind", ["int8_rowwise", "fp8_e4m3_rowwise", "fp8_scaled", "nf4"])
def test_blocks_are_packed_and_what_no_skip_passes_is_kept_for_a_reason(source, kind):
    out = source.with_name("out.safetensors")
    report = run_job(source, out, Request("safetensors", type=type_named(kind)))
    base = type_named(kind).base
    for row in report.tensors:
        inside, vector = ".conv." in row.key, row.key.endswith(".bias")
        assert (row.stored == base) == (inside and not vector)
        if not inside and not vector and row.parameters > 1024:
            assert OUTSIDE in row.reason
        assert row.reason
    assert report.target == "diffquant"
    told = " ".join(report.warnings)
    assert "written for diffquant, since comfyui cannot read" in told
    assert "packed convolutions" in told
    judged = verify(out, source, level="tensors")
    assert judged.verdict == "pass"
    assert judged.tensors.compared == len(load_file(source))


def test_a_quantized_file_is_recognised_as_what_it_was(source):
    out = source.with_name("out.safetensors")
    run_job(source, out, Request("safetensors", type=type_named("int8_rowwise")))
    before, after = describe(source), describe(out)
    assert (after.architecture, after.variant) == (before.architecture, before.variant)
    again = source.with_name("again.safetensors")
    with pytest.raises(PolicyError, match="already int8_rowwise"):
        run_job(out, again, Request("safetensors", type=type_named("fp8_scaled")))


def test_other_programs_are_not_promised_packed_convolutions(source):
    out = source.with_name("out.safetensors")
    request = Request("safetensors", type=type_named("int8_rowwise"), target="comfyui")
    with pytest.raises(PolicyError, match=r"comfyui cannot read .* packed conv.*--target diffqu"):
        run_job(source, out, request)
    assert not out.exists()
    plain = run_job(source, out, Request("safetensors", type=type_named("fp8_e4m3")))
    assert plain.target == "comfyui"  # a cast needs no scales


def test_a_type_that_fits_no_kernel_is_called_mixed(source):
    out = source.with_name("out.safetensors")
    report = run_job(source, out, Request("safetensors", type=type_named("mxfp8")))
    assert any(text.startswith("MIXED: only 0%") for text in report.warnings)


def test_a_rule_of_the_user_wins_over_the_kept_layers(source):
    out = source.with_name("out.safetensors")
    rule = Rule(r"(^|layers\.)2\.weight$", "int8_rowwise", "asked for")
    request = Request("safetensors", type=type_named("int8_rowwise"), rules=(rule,))
    report = run_job(source, out, request)
    packed = {row.key for row in report.tensors if row.stored == "int8_rowwise"}
    named = {key for key in load_file(source) if key in ("2.weight", "encoder.layers.2.weight")}
    assert named <= packed


def test_gguf_has_no_form_for_an_autoencoder(source):
    with pytest.raises(UsageError, match=r"GGUF has no form for vae: write it to a \.safeten"):
        run_job(source, source.with_name("o.gguf"), Request("gguf", type=type_named("q8_0")))


def test_an_autoencoder_without_a_precision_policy_is_refused_still(tmp_path):
    path = EXAMPLES / "sd15-shapes" / "vae" / "diffusion_pytorch_model.safetensors"
    assert describe(path).architecture == "vae_kl"
    with pytest.raises(UnknownArchitecture, match="KL autoencoder, in a file of its own"):
        run_job(path, tmp_path / "o.safetensors", Request("safetensors", type=type_named("nf4")))


def test_the_command_says_what_it_kept(source):
    out = source.with_name("out.safetensors")
    words = ["quantize", str(source), "-o", str(out), "-t", "int8_rowwise", "--json"]
    ran = CliRunner().invoke(cli, words)
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)["result"]
    assert any(OUTSIDE in row["reason"] for row in said["tensors"])
    several = source.with_name("many")
    words = ["quantize", str(source), "-o", f"{several}/", "-t", "int8_rowwise", "-t", "fp8_scaled"]
    ran = CliRunner().invoke(cli, words)
    assert ran.exit_code == 0, ran.output
    assert len(list(several.iterdir())) == 2
    checked = CliRunner().invoke(
        cli, ["verify", str(out), "--against", str(source), "--level", "tensors"]
    )
    assert checked.exit_code == 0, checked.output
