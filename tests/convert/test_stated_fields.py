"""What a text encoder's GGUF header says of its model."""

from pathlib import Path

import pytest

from diffquant.convert.encoders.stated import stated_fields
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.io import open_source
from diffquant.quant.types import type_named

QWEN = Path(__file__).parents[2] / "examples" / "qwen-image-shapes"


def test_the_header_of_our_own_file_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "qwen.gguf"
    request = Request(
        container=container_for(out), type=type_named("q8_0"), parts=("text_encoder",)
    )
    run_job(QWEN, out, request)
    with open_source(out) as source:
        found = stated_fields(source.metadata, "qwen2_vl_text")
    assert found["num_attention_heads"] == 2
    assert found["num_key_value_heads"] == 1
    assert found["rope_theta"] == 1e6
    assert found["rms_norm_eps"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"general.architecture": "qwen3", "qwen2vl.attention.head_count": 2}, "qwen2_vl_text"),
        ({"general.architecture": "qwen2vl", "qwen2vl.attention.head_count": "2"}, "qwen2_vl_text"),
        (
            {"general.architecture": "qwen2vl", "qwen2vl.attention.head_count": True},
            "qwen2_vl_text",
        ),
        ({"general.architecture": "qwen2vl", "qwen2vl.attention.head_count": 2}, "vae_kl"),
        ({"general.architecture": ["qwen2vl"]}, "qwen2_vl_text"),
        ({}, "qwen2_vl_text"),
    ],
    ids=["other model", "text", "truth", "other part", "list", "empty"],
)
def test_nothing_else_is_taken_for_a_number(metadata, kind):
    assert stated_fields(metadata, kind) == {}
