import functools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from diffquant.cli.main import cli
from diffquant.runtime import devices
from diffquant.runtime.compare import ImageSettings
from diffquant.runtime.compile_choice import Compiling
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.scorers import DEMO_PROMPTS

EXAMPLES = Path(__file__).parents[2] / "examples"
SD15, FLUX = EXAMPLES / "sd15-shapes", EXAMPLES / "flux1-shapes"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def call(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def generate(model, out, *more):
    return call("generate", model, "-p", DEMO_PROMPTS[0], "--steps", 2, "-o", out, *more)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A picture by the SD 1.5 demo with nothing but the defaults; tests do not change it."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFQUANT_CACHE", str(folder / "cache"))
        result = generate(SD15, folder / "first.png")
    assert result.exit_code == 0, result.output
    return folder / "first.png"


def refused(result, code, *words):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def test_a_picture_carries_its_parameters(tmp_path):
    out = tmp_path / "out.png"
    result = generate(FLUX, out, "--seed", 3)
    assert result.exit_code == 0, result.output
    picture = Image.open(out)
    assert picture.size == (128, 128)  # the model's own size
    text = picture.text["parameters"]
    assert text.startswith(DEMO_PROMPTS[0])
    assert "Steps: 2" in text
    assert "Seed: 3" in text
    assert json.loads(picture.text["diffquant"])["size"] == [128, 128]


def test_the_same_seed_gives_the_same_picture_and_another_does_not(tmp_path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate(SD15, tmp_path / f"{name}.png", "--seed", seed).exit_code == 0
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_json_names_parts_and_parameters(tmp_path):
    result = generate(SD15, tmp_path / "out.png", "--json")
    body = json.loads(result.stdout)
    assert body["ok"]
    assert {part["name"] for part in body["result"]["parts"]} == {
        "denoiser",
        "vae",
        "text_encoder",
    }


def test_an_impossible_size_is_one_line_with_the_nearest(tmp_path):
    refused(generate(FLUX, tmp_path / "o.png", "--size", "100x100"), 2, "multiples of 16", "96x96")
    refused(generate(FLUX, tmp_path / "o.png", "--size", "big"), 2, "expected WIDTHxHEIGHT")
    assert not (tmp_path / "o.png").exists()


def test_a_gpu_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(generate(FLUX, tmp_path / "o.png", "--device", "cuda"), 6, "not on this machine")
    refused(generate(FLUX, tmp_path / "o.png", "--device", "tpu"), 2, "expected auto, cpu, cuda")


def test_missing_parts_are_one_line(tmp_path):
    out = tmp_path / "d.gguf"
    assert call("quantize", FLUX, "-o", out, "-t", "q8_0").exit_code == 0
    (Path(__import__("os").environ["DIFFQUANT_CACHE"]) / "sources.json").unlink()
    refused(generate(out, tmp_path / "o.png"), 2, "has no vae", "--base")
    assert generate(out, tmp_path / "o.png", "--base", FLUX).exit_code == 0


def test_a_prompt_that_is_too_long_is_cut_and_said(tmp_path):
    words = ("-p", "a small red circle " * 40, "--steps", 1)
    result = call("generate", FLUX, *words, "-o", tmp_path / "flux.png")
    assert result.exit_code == 0, result.output
    assert "warning: the prompt was cut" in result.stderr
    result = call("generate", SD15, *words, "-o", tmp_path / "sd.png")  # read in parts of 75
    assert result.exit_code == 0, result.output
    assert "was cut" not in result.stderr


def test_a_lora_of_another_family_is_one_line(tmp_path):
    from safetensors.numpy import save_file

    down = np.zeros((4, 3072), np.float32)
    keys = {}
    for block in range(2):
        name = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        keys[f"{name}.lora_down.weight"] = down
        keys[f"{name}.lora_up.weight"] = np.zeros((9216, 4), np.float32)
    save_file(keys, tmp_path / "flux-lora.safetensors")
    lora = f"{tmp_path / 'flux-lora.safetensors'}:0.8"
    refused(generate(SD15, tmp_path / "o.png", "--lora", lora), 4, "flux1", "sd15")
    refused(generate(SD15, tmp_path / "o.png", "--lora", "missing:x"), 2, "FILE:WEIGHT")


def test_an_existing_picture_is_not_replaced_without_force(tmp_path):
    out = tmp_path / "o.png"
    out.write_bytes(b"mine")
    refused(generate(SD15, out), 2, "--force")
    assert out.read_bytes() == b"mine"
    assert generate(SD15, out, "--force").exit_code == 0


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffquant.runtime.pipeline.Pipeline.denoise", interrupt)
    result = generate(SD15, tmp_path / "o.png")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--seed", 5, "--cfg", 4, "-n", "a green star", "--sampler", "DPM++ 2M Karras"),
        ("--sampler", "euler_a", "--dtype", "float32", "--size", "64x128", "--cfg-cutoff", 0.5),
        ("--hires", 1.5, "--hires-strength", 0.5, "--steps", 4, "--size", "64x64"),
    ],
    ids=["plain", "guided", "stochastic", "hires"],
)
def test_a_picture_repeats_itself_bit_by_bit(tmp_path, more):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert generate(SD15, first, *more).exit_code == 0
    result = call("generate", SD15, "--from-image", first, "-o", again)
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(first), pixels(again))
    assert Image.open(first).text == Image.open(again).text
    assert str(tmp_path) not in json.dumps(Image.open(first).text)
    assert str(EXAMPLES) not in json.dumps(Image.open(first).text)
    other = tmp_path / "other.png"
    assert call("generate", SD15, "--from-image", first, "--seed", 99, "-o", other).exit_code == 0
    assert not np.array_equal(pixels(first), pixels(other))


def test_a_picture_of_a_batch_repeats_alone(tmp_path):
    result = generate(SD15, tmp_path / "o.png", "--batch", 2, "--seed", 7, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "o-1.png, " in result.stdout
    assert json.loads(Image.open(tmp_path / "o-2.png").text["diffquant"])["seed"] == 8
    again = tmp_path / "again.png"
    call("generate", SD15, "--from-image", tmp_path / "o-2.png", "-o", again)
    difference = pixels(again).astype(int) - pixels(tmp_path / "o-2.png")
    assert np.abs(difference).max() <= 1  # another batch size may round otherwise
    refused(generate(SD15, tmp_path / "o.png", "--batch", 2), 2, "o-1.png exists", "--force")
    named = generate(SD15, tmp_path / "s.png", "--seed", "8,7", "--dtype", "float32")
    assert named.exit_code == 0
    difference = pixels(tmp_path / "s-1.png").astype(int) - pixels(tmp_path / "o-2.png")
    assert np.abs(difference).max() <= 1
    refused(generate(SD15, tmp_path / "x.png", "--seed", "1,2", "--batch", 3), 2, "2 seeds")


def test_another_model_is_said_when_a_picture_is_repeated(first, tmp_path):
    result = call(
        "generate", EXAMPLES / "sdxl-shapes", "--from-image", first, "-o", tmp_path / "b.png"
    )
    assert result.exit_code == 0, result.output
    assert "made with another model (sd15-shapes)" in result.stderr


def test_files_that_a_picture_was_made_with_are_asked_for(first, tmp_path):
    second = tmp_path / "second.png"
    made = generate(SD15, second, "--image", first, "--strength", 0.5, "--steps", 4)
    assert made.exit_code == 0, made.output
    refused(
        call("generate", SD15, "--from-image", second, "-o", tmp_path / "x.png"),
        2, "not given", "--image (first.png)",
    )  # fmt: skip
    again = tmp_path / "again.png"
    result = call("generate", SD15, "--from-image", second, "--image", first, "-o", again)
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(second), pixels(again))
    other = call(
        "generate", SD15, "--from-image", second, "--image", second, "-o", tmp_path / "y.png"
    )
    assert "another file than first.png" in other.stderr


def test_a_picture_with_a_lora_asks_for_it_and_remembers_its_weight(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    unet = open_state(SD15 / "unet" / "diffusion_pytorch_model.safetensors")
    rows, columns = unet["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    down, up = rng.standard_normal((4, columns)), rng.standard_normal((rows, 4))
    keys = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(4.0)}
    lora = tmp_path / "style.safetensors"
    save_file({f"{name}.{key}": value.astype(np.float32) for key, value in keys.items()}, lora)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    made = generate(SD15, first, "--lora", f"{lora}:0.3")
    assert made.exit_code == 0, made.output
    assert "<lora:style:0.3>" in Image.open(first).text["parameters"]
    repeat = ("generate", SD15, "--from-image", first, "-o", again, "--force")
    refused(call(*repeat), 2, "not given", "--lora style:0.3")
    result = call(*repeat, "--lora", lora)
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(first), pixels(again))
    assert "weight 0.9, 0.3 in the picture" in call(*repeat, "--lora", f"{lora}:0.9").stderr


def open_state(path):
    """Shapes by key."""
    from diffquant.io import open_source

    with open_source(path) as source:
        return {key: spec.shape for key, spec in source.specs.items()}


def test_the_help_lists_every_option_under_a_heading():
    from diffquant.cli.ask_picture import SECTIONS
    from diffquant.cli.generate import command

    named = [name for names in SECTIONS.values() for name in names]
    assert len(named) == len(set(named))
    options = {one.name for one in command.params if one.param_type_name == "option"}
    assert set(named) <= options
    assert options - set(named) == {"as_json", "quiet", "verbose", "no_progress"}
    shown = call("generate", "--help").output
    for one in command.params:
        if one.param_type_name == "option":
            assert one.opts[-1] in shown


def test_a1111_parameters_make_a_picture(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters",
        f"{DEMO_PROMPTS[0]}\nSteps: 2, Sampler: Euler a, Schedule type: Karras, CFG scale: 3, "
        "Seed: 1, Size: 64x64, Model: other, RNG: CPU, Tiling: True",
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    out = tmp_path / "o.png"
    result = call("generate", SD15, "--from-image", tmp_path / "theirs.png", "-o", out)
    assert result.exit_code == 0, result.output
    assert "Tiling: True is not used" in result.stderr
    assert "made with a model called other" in result.stderr
    facts = json.loads(Image.open(out).text["diffquant"])
    assert (facts["steps"], facts["cfg"], facts["size"]) == (2, 3.0, [64, 64])


def test_bad_pictures_are_one_line(tmp_path):
    out = tmp_path / "o.png"
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("L", (64, 64)).save(small)
    Image.new("RGBA", (128, 128)).save(large)
    refused(generate(SD15, out, "--image", text), 2, "text.png: not a picture")
    refused(generate(SD15, out, "--image", tmp_path / "none.png"), 2, "no such picture")
    refused(generate(SD15, out, "--image", large, "--mask", small), 2, "64x64", "128x128")
    refused(generate(SD15, out, "--mask", small), 2, "--mask needs", "--image")
    refused(generate(SD15, out, "--strength", 0.5), 2, "--strength is of --image")
    refused(generate(SD15, out, "--image", small, "--size", "128x128"), 2, "64x64", "--size")
    refused(generate(SD15, out, "--hires-model", SD15), 2, "--hires-model needs --hires")
    refused(call("generate", SD15, "--from-image", text, "-o", out), 2, "not a PNG")
    refused(call("generate", SD15, "-o", out), 2, "no prompt")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 9).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-2000])
    refused(generate(SD15, out, "--image", cut), 1, "a damaged picture")
    assert not out.exists()


def test_prompts_come_from_files_and_standard_input(tmp_path):
    out = tmp_path / "o.png"
    (tmp_path / "p.txt").write_text("from a file\n", encoding="utf-8")
    assert call(
        "generate", SD15, "-p", f"@{tmp_path / 'p.txt'}", "--steps", 1, "-o", out
    ).exit_code == 0  # fmt: skip
    assert json.loads(Image.open(out).text["diffquant"])["prompt"] == "from a file"
    words = ["generate", str(SD15), "-p", "-", "--steps", "1", "-o", str(out), "--force"]
    assert CliRunner().invoke(cli, words, input="from a pipe\n").exit_code == 0
    assert json.loads(Image.open(out).text["diffquant"])["prompt"] == "from a pipe"
    missing = tmp_path / "none.txt"
    refused(call("generate", SD15, "-p", f"@{missing}", "-o", out, "--force"), 2, "no file")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    refused(
        call("generate", SD15, "-p", f"@{tmp_path / 'p.txt'}", "-o", out, "--force"),
        2, "not UTF-8",
    )  # fmt: skip


def test_json_has_phases_and_the_preset(tmp_path):
    model = tmp_path / "sd15-shapes-lcm"
    model.symlink_to(SD15)
    result = call("generate", model, "-p", "x", "-o", tmp_path / "o.png", "--json", "--steps", 3)
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    found = body["result"]
    assert found["phases"].keys() == {"load", "encode", "denoise", "decode", "save"}
    assert found["parameters"]["steps"] == 3
    assert found["parameters"]["sampler"] == "lcm"
    assert "LCM" in found["preset"]["title"]
    assert found["preset"]["why"]
    plain = generate(model, tmp_path / "p.png", "--preset", "none", "--json", "--cfg", 7.5)
    found = json.loads(plain.stdout)
    assert found["result"]["preset"] is None
    assert any("cfg 7.5 is too much" in text for text in found["warnings"])
    refused(generate(SD15, tmp_path / "q.png", "--preset", "lcn"), 4, "unknown preset 'lcn'")


def test_what_is_not_compiled_says_why(tmp_path, monkeypatch):
    picture = tmp_path / "a.png"
    result = generate(SD15, picture, "--json")
    (why,) = json.loads(result.stdout)["result"]["compiling"].values()
    assert why == "not compiled: only for cuda is it known to repay, not for cpu"
    other = generate(SD15, picture, "--force", "--compile", "sometimes")
    assert other.exit_code == 2
    assert "'auto', 'on', 'off'" in other.stderr
    other = generate(SD15, picture, "--force", "--compile", "on", "--engine", "diffusers")
    refused(other, 2, "--compile is of the bundled engine")


def test_what_is_not_captured_says_why_and_is_a_warning_where_it_was_asked_for(tmp_path):
    out = tmp_path / "a.png"
    for mode, said, warned in (
        ("auto", "no CUDA graph: the device is cpu", []),
        ("off", "no CUDA graph: asked for", []),
        (
            "on",
            "no CUDA graph: the device is cpu",
            ["--cuda-graphs on: no CUDA graph: the device is cpu"],
        ),
    ):
        body = json.loads(generate(SD15, out, "--force", "--json", "--cuda-graphs", mode).stdout)
        assert body["result"]["graphs"] == {"denoise": said}
        assert [text for text in body["warnings"] if "graph" in text] == warned
    other = generate(SD15, out, "--force", "--cuda-graphs", "on", "--engine", "diffusers")
    refused(other, 2, "--cuda-graphs is of the bundled engine")


def test_graphs_hear_what_steps_are_walked_and_that_blocks_are_compiled(
    first, tmp_path, monkeypatch
):
    heard = []

    def begins(*arguments, began, **more):
        began()
        return Compiling(*arguments, **more)

    class Hearing(Graphs):
        def begin(self, calls):
            heard.append(calls)
            super().begin(calls)

        def anew(self):
            heard.append("anew")

    monkeypatch.setattr("diffquant.runtime.session.Graphs", Hearing)
    monkeypatch.setattr("diffquant.runtime.session.Compiling", begins)
    result = generate(SD15, tmp_path / "a.png", "--image", first, "--strength", 0.5)
    assert result.exit_code == 0, result.output
    assert heard == ["anew", 1]  # one step of two


def test_products_in_8_bits_are_of_gpus_and_a_picture_remembers_them(tmp_path):
    plain, asked = tmp_path / "a.png", tmp_path / "b.png"
    assert generate(SD15, plain).exit_code == 0
    result = generate(SD15, asked, "--compute", "int8", "--json")
    body = json.loads(result.stdout)
    assert body["result"]["computing"] == {}
    (said,) = [text for text in body["warnings"] if "--compute" in text]
    assert "computed exactly" in said
    assert "gain nothing on cpu" in said
    assert (pixels(plain) == pixels(asked)).all()
    assert json.loads(Image.open(asked).text["diffquant"])["compute"] == "int8"
    assert "compute" not in json.loads(Image.open(plain).text["diffquant"])
    again = call("generate", SD15, "--from-image", asked, "-o", tmp_path / "c.png", "--json")
    assert any("--compute int8" in text for text in json.loads(again.stdout)["warnings"])
    other = generate(SD15, asked, "--force", "--compute", "fp8", "--engine", "diffusers")
    refused(other, 2, "--compute is of the bundled engine")


def test_verify_computes_in_8_bits_only_where_pictures_are_drawn_by_us():
    for words in (("--level", "tensors"), ("--engine", "diffusers")):
        result = call("verify", SD15, "--against", SD15, "--compute", "fp8", *words)
        refused(result, 2, "--compute draws pictures in the bundled engine")


def test_layers_in_8_bits_are_counted_and_said(tmp_path, monkeypatch):
    """As on a card: what multiplies there is chosen, and here the reference stands for it."""
    from diffquant.runtime import few_rows, session
    from diffquant.runtime.compute import Card

    monkeypatch.setattr(session, "card_of", lambda _device: Card("cuda", 90))
    monkeypatch.setattr(few_rows, "FEW", 3)
    out = tmp_path / "a.png"
    result = generate(SD15, out, "--compute", "int8", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    (rows,) = json.loads(result.stdout)["result"]["computing"].values()
    assert any("layers int8 (triton" in text and "output error up to" in text for text in rows)
    told = generate(
        SD15, out, "--compute", "int8", "--dtype", "bfloat16", "--force", "-v", "--compile", "off"
    )
    assert "compute, denoise: " in told.stdout
    assert "weights quantized again to 8 bits" in told.stdout


def test_a_preview_is_written_on_the_way(tmp_path):
    out = tmp_path / "o.png"
    assert generate(SD15, out, "--preview", "rgb").exit_code == 0
    assert pixels(tmp_path / "o.preview.png").shape == (16, 16, 3)
    refused(generate(SD15, tmp_path / "x.png", "--preview", "nowhere"), 2, "expected rgb")
    out.unlink()
    refused(generate(SD15, out, "--preview", "rgb"), 2, "o.preview.png exists")


def test_a_single_file_generates_with_a_named_tokenizer(tmp_path):
    one = tmp_path / "one.safetensors"
    assert call("convert", SD15, "-o", one).exit_code == 0
    (Path(__import__("os").environ["DIFFQUANT_CACHE"]) / "sources.json").unlink(missing_ok=True)
    out = tmp_path / "out.png"
    result = generate(one, out, "--tokenizer", SD15 / "tokenizer", "--sampler", "pndm")
    assert result.exit_code == 0, result.output
    result = generate(one, out, "--add", f"tokenizer={SD15 / 'tokenizer'}", "--force")
    assert result.exit_code == 0, result.output
    refused(generate(one, out, "--force", "--tokenizer", tmp_path / "no"), 2, "no such folder")
    refused(generate(one, out, "--force", "--add", "vae"), 2, "expected PART=FILE")
    twice = ("--vae", SD15 / "vae", "--add", f"vae={SD15 / 'vae'}")
    refused(generate(one, out, "--force", *twice), 2, "vae is given twice")


# python -m diffquant, where Ctrl-C is heard (a shell may have it ignored: that is inherited) and
# comes when the first preview is there: into the run, or into a finalizer, which swallows it.
INTERRUPTED = """
import runpy, signal, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from diffquant.runtime import session
save = session.save_preview
class Buffer: pass
def save_and_press(path, picture):
    save(path, picture)
    session.save_preview = save
    if {swallowed}:
        weakref.finalize(Buffer(), signal.raise_signal, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
session.save_preview = save_and_press
runpy.run_module("diffquant", run_name="__main__")
"""


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_in_a_real_process_is_130_and_leaves_nothing(tmp_path, swallowed):
    import subprocess
    import sys

    # 300 steps: seconds after the first preview, in which a swallowed Ctrl-C comes again.
    words = ["generate", str(SD15), "-p", "x", "--steps", "300", "--size", "64x64"]
    words += ["-o", str(tmp_path / "o.png"), "--preview", "rgb"]
    code = INTERRUPTED.format(swallowed=swallowed)
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=300)
    assert ran.returncode == 130, ran.stderr
    assert b"interrupted" in ran.stderr
    assert b"Traceback" not in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"o.preview.png"}


def test_memory_is_planned_for_pictures_that_are_judged(tmp_path):
    out = tmp_path / "q.gguf"
    assert call("quantize", FLUX, "-o", out, "-t", "q8_0", "--verify", "none").exit_code == 0
    (tmp_path / "one.txt").write_text(DEMO_PROMPTS[0])
    few = ("verify", out, "--against", FLUX, "--size", "64x64", "--steps", 1, "--seeds", 0)
    few = (*few, "--prompts", tmp_path / "one.txt")
    plain, planned = (
        json.loads(call(*few, *more, "--json").stdout)["result"]["image"]
        for more in ((), ("--offload", "blocks", "--ram", "4GiB"))
    )
    assert planned["psnr_db"] == plain["psnr_db"]
    assert planned["control_psnr_db"] == plain["control_psnr_db"]
    assert plain["how"] == "read and run by diffquant"
    assert "; offload blocks, " in planned["how"]
    refused(call(*few, "--vram", "4GiB"), 2, "on the CPU use --ram")
    refused(call(*few, "--offload", "blocks", "--level", "tensors"), 2, "are of pictures")
    refused(call(*few, "--offload", "blocks", "--engine", "diffusers"), 2, "of the bundled engine")
    refused(call(*few, "--ram", "64MiB"), 6, "no way to place the weights fits")


def test_a_card_that_does_not_compute_is_told_and_the_cpu_taken(tmp_path, monkeypatch):
    why = "the CUDA card does not compute: no kernel image"
    monkeypatch.setattr(devices, "auto_device", lambda: devices.Device("cpu", why, failed=True))
    made = generate(SD15, tmp_path / "o.png", "--size", "64x64")
    assert made.exit_code == 0
    assert f"computed on the CPU: {why}" in made.stderr
    assert " s on cpu (" in made.stdout
    asked = generate(SD15, tmp_path / "p.png", "--size", "64x64", "--device", "cpu", "--json")
    assert "computed on the CPU" not in asked.stderr
    found = json.loads(asked.stdout)["result"]
    assert (found["device"], found["device_why"]) == ("cpu", "asked for")


def test_verify_prints_the_contract_and_exits_3_below_the_gate(tmp_path):
    out, prompts = tmp_path / "q.gguf", tmp_path / "prompts.txt"
    prompts.write_text(f"# one per line\n{DEMO_PROMPTS[0]}\n\n")
    assert call("quantize", FLUX, "-o", out, "-t", "q8_0", "--verify", "none").exit_code == 0
    options = ["--against", FLUX, "--prompts", prompts, "--seeds", "0", "--steps", 3, "--json"]
    result = call("verify", out, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["result"]
    assert {"level", "verdict", "load", "tensors", "image"} <= found.keys()
    assert found["tensors"]["worst"][0].keys() >= {"key", "error", "verdict"}
    assert found["image"].keys() >= {
        "psnr_db",
        "identical",
        "ssim",
        "noise_floor_psnr_db",
        "control_psnr_db",
        "pairs",
        "reference",
        "candidate",
    }
    assert len(found["image"]["pairs"]) == 1
    strict = call("verify", out, *options, "--min-psnr", 99)
    assert strict.exit_code == 3
    assert not json.loads(strict.stdout)["ok"]


def test_quantize_verifies_pictures_in_one_go(tmp_path, monkeypatch):
    fewer = functools.partial(ImageSettings, steps=6)  # half of the default
    monkeypatch.setattr("diffquant.runtime.compare.ImageSettings", fewer)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(DEMO_PROMPTS[2])
    result = call(
        "quantize", FLUX, "-o", tmp_path / "q.safetensors", "-t", "int8_rowwise",
        "--verify", "image", "--prompts", prompts, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["result"]
    assert found["image"]["verdict"] == "pass"
    assert found["image"]["steps"] == 6
    assert found["bits_per_weight"] < 16
