"""diffusers does with files what the loader rules say: it stops where they refuse, and only there.

Files are made from the demo models; each row of CASES is a rule, a file it is about, and how
diffusers is asked for it. What loads is run where loading alone proves nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.loaders import LoaderVerdict, judge
from diffquant.io import open_sink, open_source
from diffquant.quant.types import type_named

pytestmark = pytest.mark.oracle

LDM = "model.diffusion_model."
FIXTURES = Path(__file__).parents[3] / "shared" / "data"
UNET, FLUX, QWEN = (
    ("UNet2DConditionModel", "sd15-shapes", "unet"),
    ("FluxTransformer2DModel", "flux1-shapes", "transformer"),
    ("QwenImageTransformer2DModel", "qwen-image-shapes", "transformer"),
)
Change = Callable[[TensorSpec, np.ndarray], tuple[TensorSpec, np.ndarray]]


def verdict(path: Path) -> LoaderVerdict:
    return next(one for one in judge(path) if one.loader == "diffusers")


def rules(path: Path) -> dict[str, str]:
    return {reason.rule.partition(".")[2]: reason.verdict for reason in verdict(path).reasons}


@pytest.fixture
def make(examples: Path, tmp_path: Path) -> Callable[..., Path]:
    """Convert or quantize a demo model: (model, file name, type, request)."""

    def job(model: str, name: str, kind: str = "", **request: Any) -> Path:
        out = tmp_path / name
        container = {".gguf": "gguf", ".safetensors": "safetensors"}.get(out.suffix, "folder")
        chosen = type_named(kind) if kind else None
        run_job(examples / model, out, Request(container, type=chosen, **request), verify="none")
        return out

    return job


def rewrite(
    path: Path,
    rename: Callable[[str], str] = lambda key: key,
    change: Change = lambda spec, data: (spec, data),
) -> Path:
    """The same file under other names, or with other tensors."""
    out = path.with_stem(path.stem + "-changed")
    with open_source(path) as source:
        rows = [
            change(TensorSpec(rename(key), one.dtype, one.shape), np.array(source.read(key)))
            for key, one in source.specs.items()
        ]
        said = getattr(source, "typed_metadata", source.metadata)
        with open_sink(out, [spec for spec, _ in rows], dict(said)) as sink:
            for spec, data in rows:
                sink.write(spec.key, 0, data)
            sink.commit()
    return out


def to_bf16(pattern: str) -> Change:
    """Store the tensors whose key ends so in BF16."""

    def change(spec: TensorSpec, data: np.ndarray) -> tuple[TensorSpec, np.ndarray]:
        if not spec.key.endswith(pattern):
            return spec, data
        wide = data.view("<f2" if spec.dtype == "F16" else "<f4").astype("<f4").view("<u4") >> 16
        return TensorSpec(spec.key, "BF16", spec.shape), wide.astype("<u2").view(np.uint8)

    return change


@pytest.fixture
def load(client: Callable[[str], Any], silently: Callable[..., Any], examples: Path) -> Any:
    """from_single_file of a demo model's class, with the demo's config."""
    diffusers, torch = client("diffusers"), client("torch")

    def from_file(path: Path, model: tuple[str, str, str], *, gguf: bool | None = None) -> Any:
        name, example, folder = model
        asked: dict[str, Any] = {}
        if path.suffix == ".gguf" if gguf is None else gguf:
            asked["quantization_config"] = diffusers.GGUFQuantizationConfig(torch.float32)
        return silently(
            getattr(diffusers, name).from_single_file,
            str(path),
            config=str(examples / example),
            subfolder=folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            **asked,
        )

    return from_file


def draw(client: Callable[[str], Any], unet: Any) -> np.ndarray:
    """What the demo UNet says of zeros."""
    torch = client("torch")
    with torch.no_grad():
        context = torch.zeros(1, 7, unet.config.cross_attention_dim)
        out = unet(torch.zeros(1, 4, 16, 16), torch.tensor([1]), context).sample
    picture: np.ndarray = out.numpy()
    return picture


def test_a_unet_with_its_prefix_loads_and_a_bare_one_does_not(make, load) -> None:
    whole = make("sd15-shapes", "sd15.gguf", "q8_0")
    load(whole, UNET)
    assert verdict(whole).verdict == "caveat"
    bare = rewrite(whole, lambda key: key.removeprefix(LDM))
    assert rules(bare)["unet-prefix"] == "refuses"
    with pytest.raises(Exception, match="appear to be missing"):
        load(bare, UNET)


def test_rows_of_256_stop_at_the_shape(make, load) -> None:
    shaped = make("sd15-shapes", "sd15.gguf", "q4_k_s", target="comfyui-gguf")
    assert rules(shaped)["orig-shape"] == "refuses"
    with pytest.raises(ValueError, match="expected shape"):
        load(shaped, UNET)


def test_a_type_it_lacks_stops_the_file(make, load) -> None:
    file = make("qwen-image-shapes", "qwen.gguf", "mxfp4", target="sdcpp")
    assert rules(file)["gguf-types"] == "refuses"
    with pytest.raises(OSError, match="Unable to load weights"):
        load(file, QWEN)
    known = make("qwen-image-shapes", "known.gguf", "iq4_nl", target="diffusers")
    assert "gguf-types" not in rules(known)
    load(known, QWEN)


def test_bf16_runs_in_linear_layers_alone(make, load, client) -> None:
    plain = make("sd15-shapes", "sd15.gguf", "q8_0")
    expected = draw(client, load(plain, UNET))
    linear = rewrite(plain, change=to_bf16("time_embed.0.weight"))
    assert "placement" not in rules(linear)
    np.testing.assert_allclose(draw(client, load(linear, UNET)), expected, atol=0.1)
    linear.unlink()
    conv = rewrite(plain, change=to_bf16("input_blocks.0.0.weight"))
    assert rules(conv)["placement"] == "refuses"
    with pytest.raises(RuntimeError, match="Byte"):
        draw(client, load(conv, UNET))


def test_qwen_image_loads_under_bare_keys_alone(make, load) -> None:
    bare = make("qwen-image-shapes", "qwen.gguf", "q8_0")
    load(bare, QWEN)
    assert verdict(bare).verdict == "caveat"
    prefixed = rewrite(bare, lambda key: LDM + key)
    assert rules(prefixed)["qwen-prefix"] == "refuses"
    with pytest.raises(NotImplementedError, match="meta tensor"):
        load(prefixed, QWEN)


def test_an_extension_that_lies_stops_it(make, load) -> None:
    file = make("sd15-shapes", "sd15.gguf", "q8_0")
    renamed = Path(shutil.copy(file, file.with_suffix(".safetensors")))
    assert rules(renamed)["extension"] == "refuses"
    with pytest.raises(OSError, match="Unable to load weights"):
        load(renamed, UNET, gguf=True)


def test_scales_of_a_single_file_are_left_aside(make, load, client) -> None:
    """It loads without a word, and other numbers: that is refused."""
    plain = make("sd15-shapes", "sd15.safetensors")
    assert verdict(plain).verdict == "caveat"
    expected = draw(client, load(plain, UNET))
    scaled = make("sd15-shapes", "scaled.safetensors", "fp8_scaled")
    assert rules(scaled)["file-scales"] == "refuses"
    off = np.abs(draw(client, load(scaled, UNET)) - expected).mean()
    assert off > 0.2 * np.abs(expected).mean()
    cast = make("sd15-shapes", "cast.safetensors", "fp8_e4m3")
    assert "file-scales" not in rules(cast)
    assert np.abs(draw(client, load(cast, UNET)) - expected).mean() < off / 2


def test_bitsandbytes_in_a_single_file_stops_at_the_shape(make, load) -> None:
    file = make("sd15-shapes", "nf4.safetensors", "nf4")
    assert rules(file)["file-bitsandbytes"] == "refuses"
    with pytest.raises(ValueError, match="expected shape"):
        load(file, UNET)


def test_a_folder_loads_by_its_configs(make, client, silently) -> None:
    diffusers, torch = client("diffusers"), client("torch")
    folder = make("sd15-shapes", "folder", "nf4")
    assert rules(folder)["bitsandbytes-gpu"] == "caveat"
    config = folder / "unet" / "config.json"

    def pretrained(path: Path) -> Any:
        return silently(
            diffusers.UNet2DConditionModel.from_pretrained, str(path), local_files_only=True
        )

    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="GPU"):
            pretrained(folder / "unet")
    said = json.loads(config.read_text())
    del said["quantization_config"]
    config.write_text(json.dumps(said))
    assert rules(folder)["bitsandbytes-config"] == "refuses"
    assert rules(folder / "unet")["bitsandbytes-config"] == "refuses"
    with pytest.raises(ValueError, match="expected shape"):
        pretrained(folder / "unet")
    config.unlink()
    assert rules(folder / "unet")["no-config"] == "refuses"
    with pytest.raises(OSError, match=r"no file named config\.json"):
        pretrained(folder / "unet")


def test_a_plain_folder_loads(examples: Path, client, silently) -> None:
    diffusers = client("diffusers")
    folder = examples / "sd15-shapes"
    assert verdict(folder).verdict == "accepts"
    assert verdict(folder / "unet").verdict == "accepts"
    silently(diffusers.DiffusionPipeline.from_pretrained, str(folder), local_files_only=True)


def test_a_checkpoint_becomes_a_pipeline(make, examples: Path, client, silently) -> None:
    diffusers = client("diffusers")
    file = make("sd15-shapes", "sd15.safetensors")
    assert rules(file)["pipeline-file"] == "accepts"
    silently(
        diffusers.StableDiffusionPipeline.from_single_file,
        str(file),
        config=str(examples / "sd15-shapes"),
        local_files_only=True,
        safety_checker=None,
    )


def test_flux_of_another_width_is_not_split(make, load, examples: Path) -> None:
    narrow = make("flux1-shapes", "flux.safetensors")
    assert rules(narrow)["flux-width"] == "refuses"
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        load(narrow, FLUX)
    own = examples / "flux1-shapes" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "flux-width" not in rules(own)
    assert rules(own)["config"] == "caveat"
    load(own, FLUX)


def test_what_it_takes_for_sd15_needs_a_config(examples: Path, client) -> None:
    """The guess is by certain keys; a file it cannot guess is taken for SD1.5."""
    guess = client("diffusers.loaders.single_file_utils").infer_diffusers_model_type
    keys = {}
    for example, folder in (("flux1-shapes", "transformer"), ("qwen-image-shapes", "transformer")):
        path = examples / example / folder / "diffusion_pytorch_model.safetensors"
        with open_source(path) as source:
            keys[example] = dict.fromkeys(source.specs)
        assert rules(path)["config"] == "caveat"
        assert guess(keys[example]) == "v1"


@pytest.mark.parametrize(
    "name", ["PixArtTransformer2DModel", "Ideogram4Transformer2DModel", "AutoencoderTiny"]
)
def test_classes_that_no_row_accepts_load_no_single_file(name: str, client) -> None:
    made = getattr(client("diffusers"), name)
    if hasattr(made, "from_single_file"):
        with pytest.raises(ValueError, match="only compatible with"):
            made.from_single_file("nothing.safetensors")


def test_classes_that_rows_accept_load_single_files(client) -> None:
    known = client("diffusers.loaders.single_file_model").SINGLE_FILE_LOADABLE_CLASSES
    wanted = (
        "UNet2DConditionModel SD3Transformer2DModel FluxTransformer2DModel Flux2Transformer2DModel "
        "ChromaTransformer2DModel QwenImageTransformer2DModel ZImageTransformer2DModel "
        "Lumina2Transformer2DModel AuraFlowTransformer2DModel HiDreamImageTransformer2DModel "
        "WanTransformer3DModel HunyuanVideoTransformer3DModel LTXVideoTransformer3DModel "
        "Krea2Transformer2DModel AutoencoderKL AutoencoderKLWan ControlNetModel"
    )
    assert set(wanted.split()) <= set(known)


LORAS: Mapping[str, tuple[str, bool]] = {
    "sd15_dora": ("lora-dora", True),
    "sd15_locon": ("", True),
    "sd15_loha": ("lora-lycoris", False),
    "sd15_lokr": ("lora-lycoris", False),
}


@pytest.mark.parametrize("name", LORAS)
def test_loras_convert_or_raise_as_the_rules_say(name: str, client, silently) -> None:
    path = FIXTURES / "lora_fixtures" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("no reference data")
    rule, loads = LORAS[name]
    read = client("diffusers.loaders").StableDiffusionLoraLoaderMixin.lora_state_dict
    found = rules(path)
    assert not rule or rule in found
    assert ("refuses" in found.values()) is not loads
    if loads:
        state, _ = silently(read, str(path))
        assert not [key for key in state if "dora_scale" in key]
    else:
        with pytest.raises(ValueError, match="not been correctly renamed"):
            silently(read, str(path))


def test_a_textual_inversion_loads(client, silently) -> None:
    path = FIXTURES / "real" / "textual_inversion" / "fastai_learned_embeds.bin"
    if not path.exists():
        pytest.skip("no reference data")
    load = client("diffusers.loaders.textual_inversion").load_textual_inversion_state_dicts
    assert verdict(path).verdict == "accepts"
    (state,) = silently(load, [str(path)])
    assert list(state) == ["<birb-style>"]
