"""Spellings of samplers and schedules."""

import subprocess
import sys

import pytest

from diffquant.core.errors import UnknownFormat
from diffquant.runtime.sampler_names import (
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    Named,
    sampler_named,
    schedule_named,
)


@pytest.mark.parametrize(
    ("text", "sampler", "schedule"),
    [
        # ComfyUI
        ("euler_ancestral", "euler_a", ""),
        ("dpmpp_2m", "dpmpp_2m", ""),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", ""),
        ("dpmpp_sde", "dpmpp_sde", ""),
        ("uni_pc_bh2", "unipc", ""),
        # A1111 and Forge
        ("Euler a", "euler_a", ""),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM++ SDE Karras", "dpmpp_sde", "karras"),
        ("PLMS", "pndm", ""),
        ("UniPC", "unipc", ""),
        ("Euler SGM Uniform", "euler", "sgm_uniform"),
        # stable-diffusion.cpp
        ("dpm++2m", "dpmpp_2m", ""),
        ("ddim_trailing", "ddim", "trailing"),
        ("LCM", "lcm", ""),
        # ours
        ("flow_euler", "euler", ""),
        ("heun", "heun", ""),
    ],
)
def test_everyones_spelling_of_a_sampler(text, sampler, schedule):
    assert sampler_named(text) == Named(sampler, schedule)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("Karras", "karras"),
        ("SGM Uniform", "sgm_uniform"),
        ("discrete", "normal"),
        ("DDIM", None),
        ("Align Your Steps", "ays"),
        ("ddim_uniform", "ddim_uniform"),
        ("Simple", "simple"),
    ],
)
def test_everyones_spelling_of_a_schedule(text, schedule):
    if schedule is None:
        with pytest.raises(UnknownFormat, match="unknown schedule"):
            schedule_named(text)
    else:
        assert schedule_named(text) == schedule


def test_unknown_names_list_the_closest():
    with pytest.raises(UnknownFormat, match="did you mean 'dpmpp_2m'"):
        sampler_named("dpmp_2m")
    with pytest.raises(UnknownFormat, match="did you mean 'karras'"):
        schedule_named("karas")
    for text in ("", "karras", "dpmpp_2m dpmpp_2m", "x" * 10_000):
        with pytest.raises(UnknownFormat):
            sampler_named(text)


def test_no_spelling_stands_for_two_things():
    for rows in (SAMPLER_NAMES, SCHEDULE_NAMES):
        spelled = [name for row in rows for name in {row.name, *row.spellings}]
        assert len(spelled) == len(set(spelled))
        name_of = (lambda t: sampler_named(t).sampler) if rows is SAMPLER_NAMES else schedule_named
        for row in rows:
            assert {name_of(text) for text in (row.name, row.title, *row.spellings)} == {row.name}


def test_names_agree_with_the_samplers():
    from diffquant.runtime.samplers import SAMPLERS

    own = {name.removeprefix("flow_") for name in SAMPLERS}
    assert own == {row.name for row in SAMPLER_NAMES}


def test_names_need_no_torch():
    code = "import sys, diffquant.runtime.sampler_names; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
