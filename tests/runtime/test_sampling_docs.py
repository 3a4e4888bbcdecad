"""docs/sampling.md names what the tables hold."""

from pathlib import Path

import pytest

from diffquant.convert.lora.distilled import DISTILLED
from diffquant.runtime.sampler_names import SAMPLER_NAMES, SCHEDULE_NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")


def row_of(name, section):
    lines = PAGE.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return next((line for line in lines if line.startswith(f"| `{name}` |")), "")


@pytest.mark.parametrize("row", SAMPLER_NAMES, ids=lambda row: row.name)
def test_every_sampler_is_documented(row):
    assert f"| {row.meaning} |" in row_of(row.name, "Samplers")


@pytest.mark.parametrize("row", SCHEDULE_NAMES, ids=lambda row: row.name)
def test_every_schedule_is_documented(row):
    assert f"| {row.meaning} |" in row_of(row.name, "Schedules")


@pytest.mark.parametrize("row", DISTILLED, ids=lambda row: row.slug)
def test_every_preset_is_documented(row):
    assert f"| {row.advice} | {row.source} |" in row_of(row.slug, "Presets")
