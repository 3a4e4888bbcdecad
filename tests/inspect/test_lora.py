"""LoRA and textual-inversion reports: what is said, what is wrong, and what hostile headers do."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.report import to_json
from diffquant.inspect.describe import describe

DATA = Path(__file__).parents[3] / "shared" / "data"
ATTN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"


def layer(name, rows, columns, rank=4, alpha=None, value=1.0):
    found = {
        f"{name}.lora_down.weight": np.full((rank, columns), value, np.float16),
        f"{name}.lora_up.weight": np.full((rows, rank), value, np.float16),
    }
    if alpha is not None:
        found[f"{name}.alpha"] = np.array(alpha, np.float32)
    return found


def sd15(**rest):
    """Two layers of SD1.5's first block."""
    return {
        **layer(f"{ATTN}_to_q", 320, 320, **rest),
        **layer(f"{ATTN}_to_k", 320, 768, **rest),
    }


@pytest.fixture
def report(write, tmp_path):
    """Describe a file written from arrays."""

    def make(tensors, metadata=None, name="a.safetensors", **rest):
        return describe(write(tmp_path / name, tensors, metadata), **rest)

    return make


def test_a_lora_is_described(report):
    found = report(sd15(alpha=2.0), {"ss_base_model_version": "sd_v1"})
    assert (found.kind, found.architecture, found.layout) == ("lora", "sd15", "kohya")
    lora = found.lora
    assert (lora.kinds, lora.ranks, lora.alphas, lora.scale) == (
        {"LoRA": 2},
        {"4": 2},
        {"2": 2},
        0.5,
    )
    assert [(part.name, part.layers, part.families) for part in lora.parts] == [
        ("denoiser", 2, {"attention": 2})
    ]
    assert [(one.stack, one.touched, one.count, one.total) for one in lora.blocks] == [
        ("down_blocks", "0", 1, 4)
    ]
    assert (lora.also, found.warnings, lora.malformed) == ((), (), ())
    json.dumps(to_json(found))


def test_alpha_that_is_not_stated_is_said(report):
    lora = report(sd15()).lora
    assert (lora.alphas, lora.scale) == ({"": 2}, 1.0)


def test_a_header_that_the_layers_deny_is_a_warning(report):
    found = report(sd15(), {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "True"})
    assert found.architecture == "sd15"
    assert [text.split(" says")[0] for text in found.warnings] == ["ss_base_model_version", "ss_v2"]


def test_malformed_layers_are_named_with_the_reason(report):
    tensors = sd15(alpha=2.0)
    del tensors[f"{ATTN}_to_q.lora_up.weight"]
    tensors |= layer("lora_unet_x", 8, 8, alpha=np.nan)
    found = report(tensors)
    assert dict(found.lora.malformed) == {
        f"{ATTN}_to_q": "the up factor of this layer is missing",
        "lora_unet_x": "alpha is nan, expected a finite number",
    }
    assert any(text.startswith("2 layers are malformed: ") for text in found.warnings)


def test_values_are_read_only_when_asked(report):
    tensors = sd15()
    tensors[f"{ATTN}_to_q.lora_up.weight"][:] = 0
    tensors[f"{ATTN}_to_k.lora_down.weight"][1, 5] = np.inf
    assert report(tensors).lora.zero == ()
    lora = report(tensors, deep=True).lora
    assert lora.zero == (f"{ATTN}_to_q",)
    assert lora.malformed == ((f"{ATTN}_to_k", "infinity in down"),)


def test_a_lora_of_zeros_changes_nothing(report):
    found = report(sd15(value=0.0), deep=True)
    assert "every adapter is zero: it changes nothing" in found.warnings


@pytest.mark.parametrize(
    ("parts", "zero"),
    [
        ({"lokr_w1": (4, 4), "lokr_w2": (80, 80)}, True),
        ({"oft_blocks": (10, 32, 32)}, True),
        ({"diff": (320, 320)}, True),
        ({"ia3_l": (320, 1)}, False),
        ({"set_weight": (320, 320)}, False),
        ({"lora_down.weight": (4, 320), "lora_up.weight": (320, 4), "dora_scale": (320, 1)}, False),
    ],
)
def test_zeros_of_other_kinds(report, parts, zero):
    tensors = {f"{ATTN}_to_q.{end}": np.zeros(shape, np.float32) for end, shape in parts.items()}
    assert report(tensors, deep=True).lora.zero == ((f"{ATTN}_to_q",) if zero else ())


def test_training_facts_are_short_and_bounded(report):
    tags = {"10_ohwx woman": {"ohwx": 30, "hat": 3}, "img": {"hat": 9, "bad": "x", "worse": True}}
    metadata = {
        "ss_tag_frequency": json.dumps(tags),
        "ss_steps": "1200",
        "ss_resolution": "(512, 512)",
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "locon"}',
        "ss_sd_model_name": "v1-5.safetensors",
        "ss_optimizer": "None",
        "modelspec.trigger_phrase": "ohwx woman photo",
        "modelspec.title": "x" * 5000,
    }
    lora = report(sd15(), metadata).lora
    training = lora.training
    assert lora.triggers == ("ohwx woman photo", "ohwx woman")
    assert list(training.tags.items()) == [("ohwx", 30), ("hat", 12)]
    assert (training.steps, training.optimizer) == ("1200", "")
    assert training.network == "lycoris.kohya (algo=locon)"
    assert len(training.title) == 120


@pytest.mark.parametrize(
    "text", ["{" * 100_000, "[1, 2]", '{"a": 5}', "null", "", '{"a": {"b": 1e999}}', '"x"']
)
def test_tags_of_another_form_are_left_out(report, text):
    assert report(sd15(), {"ss_tag_frequency": text}).lora.training.tags is None


def test_endless_tags_are_not_read(report):
    lora = report(sd15(), {"ss_tag_frequency": " " * (9 << 20)}).lora
    assert lora.training.note == f"ss_tag_frequency has {9 << 20} characters: not read"


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_peft_configuration_that_is_no_json_is_a_warning(report, text):
    found = report(sd15(), {"lora_adapter_metadata": text})
    assert (found.kind, found.architecture) == ("lora", "sd15")
    assert any(
        "is not JSON: alphas it states are not known" in warning for warning in found.warnings
    )


def test_a_recipe_is_a_hint_of_the_file_name(report):
    lora = report(sd15(), name="lcm-lora-sdv1-5.safetensors").lora
    assert (lora.hint.name, "4 to 8 steps" in lora.hint.advice) == ("lcm", True)
    assert report(sd15()).lora.hint is None


def test_token_vectors_inside_are_listed(report):
    lora = report({**sd15(), "<s1>": np.zeros(768, np.float32)}).lora
    assert lora.vectors == ("<s1>",)


@pytest.mark.parametrize(
    ("tensors", "base", "trigger"),
    [
        ({"emb_params": (3, 768)}, "sd15", "style"),
        ({"emb_params": (3, 1024)}, "sd2", "style"),
        ({"clip_l": (3, 768), "clip_g": (3, 1280)}, "sdxl", "style"),
        ({"clip_l": (3, 768), "t5xxl": (3, 4096)}, "flux1", "style"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280), "t5xxl": (2, 4096)}, "sd3", "style"),
        ({"<cat-toy>": (768,)}, "sd15", "<cat-toy>"),
        ({"emb_params": (3, 777)}, "unknown", "style"),
    ],
)
def test_textual_inversions_tell_their_base_by_width(report, tensors, base, trigger):
    arrays = {key: np.ones(shape, np.float32) for key, shape in tensors.items()}
    found = report(arrays, name="style.safetensors")
    assert (found.kind, found.architecture) == ("textual_inversion", base)
    assert found.inversion.trigger == trigger
    assert bool(found.warnings) == (base == "unknown")


def test_odd_inversions_are_warned_about(report):
    arrays = {"clip_l": np.ones((80, 768), np.float32), "clip_g": np.ones((3, 1280), np.float32)}
    warnings = report(arrays).warnings
    assert any("80 vectors" in text for text in warnings)
    assert "the encoders have different numbers of vectors" in warnings


FIXTURES = {
    "flux_dev_peft": ("diffusers", "flux1", {"LoRA": 22}),
    "qwen_image_lightning": ("bare", "qwen_image", {"LoRA": 16}),
    "sd15_dora": ("kohya", "sd15", {"DoRA": 278}),
    "sd15_locon": ("kohya", "sd15", {"LoRA": 228, "LoCon": 50}),
    "sd15_loha": ("kohya", "sd15", {"LoHa": 278}),
    "sd15_lokr": ("kohya", "sd15", {"LoKr": 278}),
}
REAL = {
    "catundchat_sd15.safetensors": ("diffusers_old", 4, 128),
    "catundchat_sd15.bin": ("diffusers_old", 4, 128),
    "cloneofsimo_analog_svd_rank4.safetensors": ("cloneofsimo", 4, 192),
    "cloneofsimo_lora_disney.safetensors": ("cloneofsimo", 1, 192),
}


@pytest.mark.oracle
@pytest.mark.skipif(not DATA.is_dir(), reason="the reference data is not here")
@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures_are_what_they_were_made_as(name):
    found = describe(DATA / "lora_fixtures" / f"{name}.safetensors", deep=True)
    assert (found.layout, found.architecture, found.lora.kinds) == FIXTURES[name]
    assert (found.warnings, found.lora.malformed, found.lora.zero) == ((), (), ())


@pytest.mark.oracle
@pytest.mark.skipif(not DATA.is_dir(), reason="the reference data is not here")
@pytest.mark.parametrize("name", REAL)
def test_real_loras(name):
    naming, rank, layers = REAL[name]
    found = describe(DATA / "real" / "lora" / name, deep=True)
    assert (found.kind, found.architecture, found.layout) == ("lora", "sd15", naming)
    assert (found.lora.ranks, found.lora.alphas) == ({str(rank): layers}, {"": layers})
    assert (found.lora.malformed, found.lora.zero) == ((), ())


@pytest.mark.oracle
@pytest.mark.skipif(not DATA.is_dir(), reason="the reference data is not here")
def test_a_real_inversion_in_a_pickle():
    found = describe(DATA / "real/textual_inversion/fastai_learned_embeds.bin")
    assert (found.architecture, found.inversion.trigger) == ("sd15", "<birb-style>")


def test_no_torch_is_loaded(write, tmp_path):
    path = write(tmp_path / "a.safetensors", sd15())
    code = (
        "import sys; from diffquant.inspect.describe import describe;"
        f"describe({str(path)!r}, deep=True);"
        "sys.exit(bool({'torch', 'numba'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_thousands_of_layers_with_one_module_are_grouped_in_one_pass(tmp_path):
    # A hostile header: many adapters' names of one module must not cost their square.
    entries = {}
    for index in range(20_000):
        for side in "AB":
            entries[f"unet.x.lora_{side}.n{index}.weight"] = {
                "dtype": "F16",
                "shape": [0, 4],
                "data_offsets": [0, 0],
            }
    text = json.dumps(entries).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    found = describe(path)
    assert len(found.lora.malformed) == 20_000
