"""A published name is read by the Hub as the type that the file holds, or is refused."""

import re
from pathlib import PurePath

import pytest

from diffquant.core.errors import UsageError
from diffquant.publish.names import published_name, type_of_header
from diffquant.quant.types import TYPES

# The Hub's rule, written down a second time: huggingface/huggingface.js packages/tasks/src/gguf.ts.
_LABELS = """
    F32 F16 Q4_0 Q4_1 Q4_1_SOME_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M
    Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M
    IQ4_XS IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0 Q2_K_XL
    Q3_K_XL Q4_K_XL Q5_K_XL Q6_K_XL Q8_K_XL
"""
_HUB = re.compile(rf"(?:UD-)?(?:{'|'.join(_LABELS.split())})(?:_[A-Z]+)?")


def hub_reads(name: str) -> str:
    found = _HUB.findall(name.upper())
    return found[-1] if found else ""


def named(name: str, kind: str, *, container: str = "gguf", **more: str):
    largest = TYPES[kind].base if kind else more.pop("largest")
    return published_name(PurePath(name), kind=kind, largest=largest, container=container, **more)


GGUF = [name for name, row in TYPES.items() if "gguf" in row.dialects]
LISTED = [name for name in GGUF if name != "mxfp4"]


@pytest.mark.parametrize("kind", LISTED)
@pytest.mark.parametrize(
    "stem", ["flux1-dev", "model", "flux1-dev-bf16", "x-F16te", "sd_xl_base_1.0", "Ω"]
)
def test_every_type_is_listed_as_what_it_is(kind, stem):
    for file in (
        f"{stem}.gguf",
        f"{stem}-{kind.upper()}.gguf",
        f"{stem}-{kind}.gguf",
        f"{stem}-{kind.upper()}-F16te.gguf",
        f"{stem}_{kind}_v2.gguf",
    ):
        found = named(file, kind)
        assert hub_reads(found.name) == kind.upper() == found.label
        assert bool(found.note) == (found.name != file)


def test_a_name_that_reads_as_meant_is_kept():
    assert named("flux1-dev-q4_k_m.gguf", "q4_k_m").name == "flux1-dev-q4_k_m.gguf"
    assert named("a-bf16-Q4_K_S.gguf", "q4_k_s").name == "a-bf16-Q4_K_S.gguf"


def test_a_name_that_would_be_misread_is_changed_and_said():
    found = named("x-Q4_K_S-F16te.gguf", "q4_k_s")
    assert found.name == "x-F16te-Q4_K_S.gguf"
    assert "list it as F16" in found.note


def test_a_stem_of_percentages_is_refused():
    with pytest.raises(UsageError, match=r"IQ2_XXS.*--name"):
        named("a-55IQ2_XXS-34Q2_K-11Q4_0.gguf", "q4_k_s")


def test_a_type_that_the_hub_does_not_list_is_told():
    found = named("a.gguf", "mxfp4")
    assert (found.name, found.label, hub_reads(found.name)) == ("a-MXFP4.gguf", "", "")
    assert "lists no such type" in found.note


def test_the_stem_can_be_given():
    assert named("out.gguf", "q8_0", stem="flux1-dev").name == "flux1-dev-Q8_0.gguf"
    given = named("out.safetensors", "fp8_scaled", container="safetensors", stem="flux1-dev")
    assert given.name == "flux1-dev_fp8_scaled.safetensors"


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("m.safetensors", "m_fp8_scaled.safetensors"),
        ("m-fp8-scaled.safetensors", "m-fp8-scaled.safetensors"),
        ("m_FP8_SCALED.safetensors", "m_FP8_SCALED.safetensors"),
        ("m_fp8_scaledx.safetensors", "m_fp8_scaledx_fp8_scaled.safetensors"),
    ],
)
def test_safetensors_carry_their_type(file, wanted):
    assert named(file, "fp8_scaled", container="safetensors").name == wanted


def test_a_file_of_unknown_type_needs_a_name_that_agrees_with_it():
    mine = named("f-Q4_K_M.gguf", "", largest="q4_k", stem="mine")
    assert (mine.name, mine.label) == ("mine-Q4_K_M.gguf", "Q4_K_M")
    odd = named("f.gguf", "", largest="mxfp4", stem="mine")
    assert (odd.name, odd.label) == ("mine-MXFP4.gguf", "")
    with pytest.raises(UsageError, match=r"list mine-F16-MXFP4\.gguf as F16; give another"):
        named("f.gguf", "", largest="mxfp4", stem="mine-F16")
    assert named("f-Q4_K_M.gguf", "", largest="q4_k").label == "Q4_K_M"
    with pytest.raises(UsageError, match="list the file as Q8_0"):
        named("f-Q8_0.gguf", "", largest="q4_k")
    with pytest.raises(UsageError, match="as nothing"):
        named("f.gguf", "", largest="q4_k")


def test_the_header_names_the_type():
    assert (
        type_of_header({"diffquant.type": "q4_k_s", "general.file_type": "7"}, "q4_k") == "q4_k_s"
    )
    assert type_of_header({"general.file_type": "14"}, "q4_k") == "q4_k_s"
    assert type_of_header({"general.file_type": "14"}, "f16") == ""  # it says what is not so
    assert type_of_header({"diffquant.type": "<b>"}, "q4_k") == ""
