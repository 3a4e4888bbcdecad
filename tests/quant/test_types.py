"""TYPES: rows agree with FORMATS, FALLBACKS, dialects, and with the numbers GGUF files carry."""

from __future__ import annotations

import pytest

from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, dialect_for, type_named

CONTAINERS = ("gguf", "safetensors", "folder")


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
@pytest.mark.parametrize("name", [name for name in TYPES if "gguf" in TYPES[name].dialects])
def test_file_types_are_llama_cpps(name):
    gguf = pytest.importorskip("gguf")
    label = gguf.LlamaFileType(TYPES[name].file_type).name
    spelled = {"f32": "ALL_F32"}.get(name, f"MOSTLY_{name.upper()}")
    assert label == spelled


@pytest.mark.parametrize("spelling", ["q4_k_s", "Q4_K_S", "Q4_k_S"])
def test_types_are_found_in_any_case(spelling):
    assert type_named(spelling) is TYPES["q4_k_s"]


@pytest.mark.parametrize(
    ("name", "near"), [("q4_k", "q4_k_s"), ("fp8_e4m", "fp8_e4m3"), ("nf-4", "nf4"), ("zzz", None)]
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
