"""Presets from names, metadata and weights of published models."""

import subprocess
import sys

import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.lora.distilled import DISTILLED, recipe_of, steps_told
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.levels import Levels
from diffquant.runtime.presets import Clues, LoraClue, contradictions, preset_named
from diffquant.runtime.sampler_names import sampler_named, schedule_named


def auto(architecture, *names, **more):
    return preset_named("auto", Clues(architecture, names=names, **more))


def lora(architecture, name, weight=1.0, *names):
    return Clues(architecture, names=names, loras=(LoraClue((name,), weight),))


@pytest.mark.parametrize(
    ("architecture", "name", "slug", "steps", "cfg", "sampler", "schedule"),
    [  # file names as their makers publish them
        ("sdxl", "sdxl_lightning_4step", "sdxl_lightning", 4, 1, "euler", "trailing"),
        ("sdxl", "sdxl_lightning_8step_unet", "sdxl_lightning", 8, 1, "euler", "trailing"),
        ("sdxl", "sd_xl_turbo_1.0_fp16", "sdxl_turbo", 1, 1, "euler_a", "trailing"),
        ("sdxl", "DreamShaperXL_Turbo_v2", "sdxl_turbo_merge", 6, 2, "dpmpp_sde", "karras"),
        ("sdxl", "dmd2_sdxl_4step_unet_fp16", "dmd2", 4, 1, "lcm", None),
        ("sdxl", "Hyper-SDXL-1step-Unet", "hyper_sd", 1, 1, "lcm", None),
        ("sd2", "sd_turbo", "sd_turbo", 1, 1, "euler_a", "trailing"),
        ("sd3", "sd3.5_large_turbo", "sd35_turbo", 4, 1, "euler", None),
        ("flux1", "flux1-schnell", "flux_schnell", 4, 1, "euler", "simple"),
        ("flux2", "flux-2-klein-4b", "flux2_klein", 4, 1, "euler", None),
        ("flux2", "flux-2-klein-base-4b", "flux2_klein", 50, 4, "euler", None),
        ("z_image", "Z-Image-Turbo", "z_image_turbo", 9, 1, "euler", None),
        ("krea2", "Krea-2-Turbo", "krea2_turbo", 8, 1, "euler", None),
    ],
)
def test_models_by_their_name(architecture, name, slug, steps, cfg, sampler, schedule):
    found = auto(architecture, name)
    recipe = found.recipe
    assert (found.name, recipe.steps, recipe.cfg, recipe.sampler) == (slug, steps, cfg, sampler)
    if schedule is not None:
        assert found.schedule_for(steps) == schedule
    assert repr(name) in found.why
    assert found.source


@pytest.mark.parametrize(
    ("architecture", "name", "slug", "steps", "cfg", "sampler", "weight"),
    [
        ("sd15", "lcm-lora-sdv1-5", "lcm", 4, 1, "lcm", 1),
        ("sdxl", "sdxl_lightning_2step_lora", "sdxl_lightning", 2, 1, "euler", 1),
        ("sdxl", "Hyper-SDXL-8steps-lora", "hyper_sd", 8, 1, "ddim", 1),
        ("sdxl", "Hyper-SDXL-12steps-CFG-lora", "hyper_sd", 12, 5, "ddim", 1),
        ("sdxl", "Hyper-SDXL-1step-lora", "hyper_sd", 1, 1, "tcd", 1),
        ("flux1", "Hyper-FLUX.1-dev-16steps-lora", "hyper_flux", 16, 1, "euler", 0.125),
        ("flux1", "FLUX.1-Turbo-Alpha", "turbo_alpha", 8, 1, "euler", 1),
        ("sd3", "Hyper-SD3-4steps-CFG-lora", "hyper_sd3", 4, 3, "euler", 0.125),
        ("sdxl", "dmd2_sdxl_4step_lora", "dmd2", 4, 1, "lcm", 1),
        ("sdxl", "pcm_sdxl_normalcfg_8step_converted", "pcm", 8, 3, "ddim", 1),
        ("sdxl", "pcm_sdxl_smallcfg_2step_converted", "pcm", 2, 1.5, "ddim", 1),
        ("sdxl", "tcd-sdxl-lora", "tcd", 4, 1, "tcd", 1),
        ("qwen_image", "Qwen-Image-Lightning-4steps-V1.0", "qwen_lightning", 4, 1, "euler", 1),
        ("flux2", "flux.2-turbo-lora", "flux2_turbo", 8, 1, "euler", 1),
        ("sdxl", "sdxl-flash-lora", "sdxl_flash", 7, 3, "dpmpp_sde", 0.55),
    ],
)
def test_loras_by_their_name(architecture, name, slug, steps, cfg, sampler, weight):
    found = preset_named("auto", lora(architecture, name))
    recipe = found.recipe
    assert (found.name, recipe.steps, recipe.cfg) == (slug, steps, cfg)
    assert (recipe.sampler, recipe.weight) == (sampler, weight)
    assert found.lora == 0
    assert "LoRA" in found.why


def test_levels_of_a_recipe_go_with_its_own_steps():
    four = auto("sdxl", "dmd2_sdxl_4step_unet")
    assert four.schedule_for(4) == Levels(timesteps=(999.0, 749.0, 499.0, 249.0))
    assert auto("sdxl", "dmd2_sdxl_1step_unet").schedule_for(1) == Levels(timesteps=(399.0,))
    turbo = preset_named("auto", lora("flux2", "flux.2-turbo-lora"))
    levels = turbo.schedule_for(turbo.recipe.steps)
    assert levels.bent
    assert len(levels.sigmas) == 8
    assert turbo.schedule_for(12) is None
    assert auto("sdxl", "sdxl_lightning_1step_unet_x0").recipe.prediction == "sample"


def test_a_lora_outweighs_the_model_it_is_attached_to():
    clues = lora("flux1", "Hyper-FLUX.1-dev-8steps-lora", 0.125, "flux1-schnell")
    assert preset_named("auto", clues).name == "hyper_flux"
    style = lora("flux1", "pencil sketch style", 1.0, "flux1-schnell")
    assert preset_named("auto", style).name == "flux_schnell"


def test_weights_tell_what_names_do_not():
    assert auto("flux1", "my-model", guided=False).name == "flux_schnell"
    assert auto("flux1", "my-model", variant="schnell").name == "flux_schnell"
    assert auto("flux1", "my-model", guided=True).name == "default"
    full = auto("sd15", "my-model", time_cond=True)
    assert full.name == "lcm_full"
    assert full.recipe.guidance == 8.0


@pytest.mark.parametrize("slug", [slug for slug in ARCHITECTURES if slug != "generic"])
def test_models_without_a_sign_get_their_makers_defaults(slug):
    found = auto(slug, "model", "unknown title")
    assert found.name == "default"
    sampling = ARCHITECTURES[slug].sampling_for("")
    assert (found.recipe.steps, found.recipe.cfg) == (sampling.steps, sampling.cfg)
    assert "nothing tells" in found.why
    assert found.source == sampling.source


def test_presets_by_name():
    clues = Clues("sdxl", names=("juggernaut",))
    assert preset_named("none", clues) is None
    assert preset_named("SDXL-Lightning", clues).recipe.schedule == "trailing"
    with pytest.raises(UnknownFormat, match="did you mean 'sdxl_lightning'"):
        preset_named("sdxl_lightening", clues)
    with pytest.raises(UsageError, match="made for flux1, not for sdxl"):
        preset_named("hyper_flux", clues)
    attached = lora("sdxl", "sdxl_lightning_8step_lora")
    assert preset_named("sdxl_lightning", attached).recipe.steps == 8


def test_contradictions_name_what_they_found():
    lightning = lora("sdxl", "sdxl_lightning_4step_lora")
    preset = preset_named("auto", lightning)
    assert contradictions(preset, lightning, steps=4, cfg=1.0) == ()
    found = contradictions(preset, lightning, steps=30, cfg=7.0, sampler="LCM")
    assert [sentence.partition(",")[0] for sentence in found] == [
        "SDXL-Lightning is made for 4 steps",
        "cfg 7 is too much for SDXL-Lightning: its makers use 1",
        "SDXL-Lightning is made for sampler euler",
    ]
    hyper = lora("flux1", "Hyper-FLUX.1-dev-8steps-lora", 1.0)
    preset = preset_named("auto", hyper)
    (sentence,) = contradictions(preset, hyper, steps=8, cfg=1.0)
    assert sentence == "Hyper-SD for Flux is made for weight 0.125, found 1"
    guided = lora("sdxl", "Hyper-SDXL-8steps-CFG-lora")
    (sentence,) = contradictions(preset_named("auto", guided), guided, steps=8, cfg=1.0)
    assert "keeps guidance" in sentence


def test_two_distilled_loras_and_few_steps_without_one_are_told():
    two = Clues("sdxl", loras=(LoraClue(("lcm_lora",)), LoraClue(("sdxl_lightning_4step_lora",))))
    found = contradictions(preset_named("auto", two), two, steps=4, cfg=1.0)
    assert any("use one" in sentence for sentence in found)
    plain = Clues("sdxl", names=("sd_xl_base_1.0",))
    preset = preset_named("auto", plain)
    assert contradictions(preset, plain, steps=30, cfg=7.0) == ()
    (sentence,) = contradictions(preset, plain, steps=4, cfg=7.0)
    assert "makers use 30" in sentence


def test_steps_in_names():
    assert steps_told(["sdxl_lightning_4step_lora"]) == 4
    assert steps_told(["Hyper-SD15-12steps-CFG-lora"]) == 12
    assert steps_told(["my-model-20000steps"]) is None
    assert steps_told(["4step", "8step"]) is None
    assert steps_told(["model"]) is None


@pytest.mark.parametrize("row", DISTILLED, ids=lambda row: row.slug)
def test_recipes_make_sense(row):
    for recipe in (row.recipe, *(one for _, one in row.cases)):
        assert 1 <= recipe.fewest <= recipe.steps <= recipe.most
        assert recipe.cfg <= recipe.cfg_most
        assert sampler_named(recipe.sampler).sampler == recipe.sampler
        if recipe.schedule:
            assert schedule_named(recipe.schedule) == recipe.schedule
        if recipe.timesteps or recipe.sigmas:
            assert len(recipe.timesteps or recipe.sigmas) == recipe.steps
            Levels(recipe.timesteps, recipe.sigmas, recipe.bent)
    assert recipe_of(row, ["nothing"]) == row.recipe
    assert set(row.bases) <= set(ARCHITECTURES)


def test_presets_need_no_torch():
    code = "import sys, diffquant.runtime.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
