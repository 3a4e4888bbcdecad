"""TYPES: rows agree with FORMATS, FALLBACKS, dialects, and with the numbers GGUF files carry."""

from __future__ import annotations

import pytest

from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import _ROWS, ALIASES, TYPES, dialect_for, type_named

CONTAINERS = ("gguf", "safetensors", "folder")

# city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:155-225, and @4dfc025 (auto_convert) for the edge.
PUBLISHED = """
type    id  base   v         qkv   down  edge
q2_k    10  q2_k   q3_k      q2_k  q2_k  q4_k
q3_k_s  11  q3_k   q3_k      q3_k  q3_k  q4_k
q3_k_m  12  q3_k   2*q5_k,q4_k  q4_k  q4_k  q4_k
q3_k_l  13  q3_k   q5_k      q4_k  q5_k  q4_k
q4_k_s  14  q4_k   4*q5_k,q4_k  q4_k  q5_k  -
q4_k_m  15  q4_k   q6_k      q5_k  q6_k  q5_k
q5_k_s  16  q5_k   q5_k      q5_k  q5_k  -
q5_k_m  17  q5_k   q6_k      q6_k  q6_k  q6_k
q6_k    18  q6_k   q6_k      q6_k  q6_k  -
q4_0    2   q4_0   q4_0      q4_0  q4_1  -
q4_1    3   q4_1   q4_1      q4_1  q4_1  -
q5_0    8   q5_0   q5_0      q5_0  q5_1  -
q5_1    9   q5_1   q5_1      q5_1  q5_1  -
q8_0    7   q8_0   q8_0      q8_0  q8_0  -
"""
UNIFORM = {
    "iq4_nl": 25,
    "iq4_xs": 30,
    "iq3_s": 26,
    "iq3_xxs": 23,
    "iq2_s": 28,
    "iq2_xs": 20,
    "iq2_xxs": 19,
    "mxfp4": 38,
}
ROWS = {row.name: row for row in _ROWS}  # those too whose formats are not there yet


@pytest.mark.parametrize(
    "line", PUBLISHED.strip().splitlines()[1:], ids=lambda line: line.split()[0]
)
def test_mixes_are_the_published_table(line):
    name, number, base, v, qkv, down, edge = line.split()
    row = ROWS[name]
    assert row.published
    assert (row.base, row.file_type, row.edge or "-") == (base, int(number), edge)
    for family, cell in (("v", v), ("qkv", qkv), ("ffn_down", down)):
        first, early, late = row.mix.get(family, (0, base, base))
        assert (f"{first}*{early},{late}" if first else late) == cell
        assert first or early == late
    assert set(row.mix) <= {"v", "qkv", "ffn_down"}


def test_every_ggml_type_is_published_or_named_as_ours():
    published = {line.split()[0] for line in PUBLISHED.strip().splitlines()[1:]}
    assert {name for name, row in ROWS.items() if row.published} == published
    for name, number in UNIFORM.items():
        row = ROWS[name]
        assert (row.base, row.mix, row.edge, row.file_type) == (name, {}, "", number)
        assert "one format throughout" in row.about
    assert {"f32", "f16", "bf16"} | published | set(UNIFORM) == {
        name for name, row in ROWS.items() if "gguf" in row.dialects
    }


def test_types_are_offered_once_every_format_is_there():
    assert set(TYPES) == {name for name, row in ROWS.items() if row.formats <= set(FORMATS)}


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "q5_k", "Q4_K"])
def test_aliases_mean_what_llama_quantize_means(name):
    assert ALIASES[name.lower()] == f"{name.lower()}_m"
    if ALIASES[name.lower()] in TYPES:
        assert type_named(name).name == f"{name.lower()}_m"


@pytest.mark.parametrize("name", TYPES)
def test_rows_name_formats_and_containers_there_are(name):
    row = TYPES[name]
    assert row.name == name == name.lower()
    assert row.about
    assert set(row.dialects) <= set(CONTAINERS)
    assert row.dialects
    assert row.bits == FORMATS[row.base].bits
    for family, (count, early, late) in row.mix.items():
        assert family in ("v", "qkv", "ffn_down")
        assert count >= 0
        assert {early, late} <= set(FORMATS)
    for container in row.dialects:
        for fmt in {row.base, *(f for _, a, b in row.mix.values() for f in (a, b))}:
            for part in FORMATS[fmt].parts:
                storage = STORAGE[part.dtype]
                held = storage.ggml_id is not None if container == "gguf" else storage.safetensors
                assert held, f"{container} cannot hold {part.dtype}"
    assert (row.file_type is not None) == ("gguf" in row.dialects)


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name in ROWS if "gguf" in ROWS[name].dialects])
def test_file_types_are_llama_cpps(name):
    gguf = pytest.importorskip("gguf")
    label = gguf.LlamaFileType(ROWS[name].file_type).name
    odd = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
    spelled = odd.get(name, f"MOSTLY_{name.upper()}")
    assert label == spelled


@pytest.mark.parametrize("spelling", ["q4_k_s", "Q4_K_S", "Q4_k_S"])
def test_types_are_found_in_any_case(spelling):
    assert type_named(spelling) is TYPES["q4_k_s"]


@pytest.mark.parametrize(
    ("name", "near"), [("q4_k_", "q4_k_s"), ("fp8_e4m", "fp8_e4m3"), ("nf-4", "nf4"), ("zzz", None)]
)
def test_unknown_types_name_the_known_and_the_closest(name, near):
    with pytest.raises(UnknownFormat) as error:
        type_named(name)
    assert error.value.exit_code == 4
    text = str(error.value)
    assert f"unknown type {name!r}" in text
    assert all(known in text for known in TYPES)
    assert ("did you mean" in text) == (near is not None)
    assert near is None or f"did you mean {near!r}?" in text


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", TYPES)
def test_dialects_or_where_to_write_instead(name, container):
    row = TYPES[name]
    if container in row.dialects:
        assert dialect_for(row, container) == row.dialects[container]
        return
    with pytest.raises(UsageError, match=f"type {name} cannot go into a ") as error:
        dialect_for(row, container)
    for other in row.dialects:
        assert {"gguf": ".gguf", "safetensors": ".safetensors", "folder": "folder"}[other] in str(
            error.value
        )
