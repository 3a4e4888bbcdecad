"""GGUF files of another writer, back to safetensors, folders and other types, block by block."""

from __future__ import annotations

import numpy as np
import pytest

from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.detect import to_canonical
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import PolicyError, UnsupportedDtype
from diffquant.io import open_source
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import type_named

pytestmark = pytest.mark.oracle
gguf = pytest.importorskip("gguf")

UNREAD = ("Q8_1", "Q8_K", "Q1_0")
BLOCKS = [name for name, row in STORAGE.items() if row.is_block and name not in UNREAD]
PREFIX = "model.diffusion_model."
# Every type under bare names; names do not matter to numbers, so some of them prefixed as well.
CASES = [
    *((name, "") for name in BLOCKS),
    *((name, PREFIX) for name in ("Q4_0", "Q2_K", "IQ1_M", "Q6_K")),
]


@pytest.fixture(scope="module")
def weights(examples):
    """The demo's denoiser as float32, by canonical key."""
    with opened(examples / "flux1-shapes") as (_, logical, match):
        found = {}
        for one in to_canonical(match.parts[0]):
            rows = one.shape[0] if len(one.shape) > 1 else 1
            found[one.target] = canonical_rows(logical, one, (0, rows)).reshape(one.shape).copy()
        return found


def blocks(shape, kind) -> np.ndarray:
    """Blocks of a type that gguf-py cannot encode: any bits, their floats small and finite."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(shape[0] + shape[1])
    return rng.integers(0, 256, (shape[0], shape[1] // size * nbytes), np.uint8) & 0x37


@pytest.fixture(scope="module")
def written(weights, tmp_path_factory):
    """Write the denoiser with gguf-py: (type name, prefix) -> path and what gguf-py decodes."""
    folder = tmp_path_factory.mktemp("theirs")
    made = {}

    def write(name, prefix):
        if (name, prefix) in made:
            return made[name, prefix]
        kind = gguf.GGMLQuantizationType[name]
        size = gguf.GGML_QUANT_SIZES[kind][0]
        path = folder / f"{name}-{len(prefix)}.gguf"
        writer = gguf.GGUFWriter(path, "flux")
        writer.add_name("a model of theirs")
        writer.add_string("general.license", "apache-2.0")
        writer.add_array("their.numbers", [1, 2, 3])
        writer.add_quantization_version(2)
        decoded = {}
        for key, x in weights.items():
            if x.ndim == 2 and x.shape[1] % size == 0 and x.size > 1024:
                try:
                    raw = gguf.quantize(x, kind)
                except NotImplementedError:
                    raw = blocks(x.shape, kind)
                writer.add_tensor(prefix + key, raw, raw_dtype=kind)
                if name not in UNREAD:
                    decoded[key] = gguf.dequantize(raw, kind).reshape(x.shape), raw
            else:
                writer.add_tensor(prefix + key, x)
                decoded[key] = x, None
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made[name, prefix] = path, decoded
        return made[name, prefix]

    return write


def by_canonical(path):
    """Every denoiser weight of a file or folder as float32."""
    with opened(path) as (_, logical, match):
        found = {}
        for one in to_canonical(match.parts[0]):
            rows = one.shape[0] if len(one.shape) > 1 else 1
            found[one.target] = canonical_rows(logical, one, (0, rows)).reshape(one.shape).copy()
        return found


def bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(("name", "prefix"), CASES)
def test_to_safetensors_every_number_is_what_gguf_py_decodes(written, tmp_path, name, prefix):
    path, expected = written(name, prefix)
    for dtype, rounded in (("f32", lambda x: x), ("bf16", bf16)):
        report = run_job(path, tmp_path / "a.safetensors", Request("safetensors", dtype=dtype),
                         force=True)  # fmt: skip
        assert {row.stored for row in report.tensors} == {dtype}
        found = by_canonical(tmp_path / "a.safetensors")
        assert found.keys() == expected.keys()
        for key, (x, _) in expected.items():
            assert np.array_equal(found[key], rounded(x)), key
        packed = sum(raw is not None for _, raw in expected.values())
        assert any(
            f"keep that rounding: {packed} from {name.lower()}" in text for text in report.warnings
        )
        lost = next(text for text in report.warnings if "header keys" in text)
        assert lost.endswith(": their.numbers")
        with open_source(tmp_path / "a.safetensors") as source:
            assert source.metadata["general.name"] == "a model of theirs"
            assert source.metadata["general.license"] == "apache-2.0"
            assert "general.architecture" not in source.metadata
    if prefix:  # a single file keeps the names it came with
        with open_source(tmp_path / "a.safetensors") as source:
            assert all(key.startswith(prefix) for key in source.specs)


@pytest.mark.parametrize("name", ["Q2_K", "IQ3_S", "Q5_0", "TQ2_0"])
def test_to_a_folder(written, tmp_path, examples, name):
    path, expected = written(name, "")
    made = Request("folder", dtype="f32")
    report = run_job(path, tmp_path / "out", made, base=examples / "flux1-shapes")
    assert not any("missing" in text for text in report.warnings)
    assert (tmp_path / "out" / "transformer" / "config.json").exists()
    found = by_canonical(tmp_path / "out")
    for key, (x, _) in expected.items():
        assert np.array_equal(found[key], x), key


@pytest.mark.parametrize(("name", "prefix"), [one for one in CASES if one[0].lower() in FORMATS])
def test_to_gguf_blocks_are_copied_and_keys_kept(written, tmp_path, name, prefix):
    path, expected = written(name, prefix)
    out = tmp_path / "a.gguf"
    report = run_job(path, out, Request("gguf"))
    assert all(text.startswith("written for") for text in report.warnings)  # not for every reader
    with open_source(out) as source:
        for key, (x, raw) in expected.items():
            data = source.read(key)  # bare in the output, whatever they were
            wanted = x.astype("<f4") if raw is None else raw
            assert bytes(data) == wanted.tobytes(), key
        assert source.metadata["general.name"] == "a model of theirs"
        assert source.metadata["general.license"] == "apache-2.0"
        assert list(source.metadata["their.numbers"]) == [1, 2, 3]
        assert source.typed_metadata["their.numbers"].type == "i32"


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "IQ4_XS", "IQ1_M", "MXFP4", "NVFP4"])
def test_to_another_type_only_when_asked_for(written, tmp_path, name):
    path, expected = written(name, "")
    out = tmp_path / "a.gguf"
    with pytest.raises(PolicyError, match="--allow-requantize"):
        run_job(path, out, Request("gguf", type=type_named("q8_0")))
    assert not out.exists()
    made = Request("gguf", type=type_named("q8_0"), allow_requantize=True)
    report = run_job(path, out, made)
    rows = {row.key: row for row in report.tensors}
    again = [row for row in report.tensors if "requantized from" in row.reason]
    assert again
    assert all(row.stored == "q8_0" for row in again)
    assert any("keep that rounding" in text for text in report.warnings)
    found = by_canonical(out)
    for key, (x, _) in expected.items():
        scale = np.abs(x).max() or 1.0
        limit = {"q8_0": 1 / 126, "f16": 1e-3, "bf16": 1 / 127}.get(rows[key].stored, 0)
        assert np.abs(found[key] - x).max() <= limit * scale, key
    with open_source(out) as source:
        assert source.metadata["general.file_type"] == 7
        assert source.metadata["general.license"] == "apache-2.0"


@pytest.mark.parametrize("name", UNREAD)
def test_blocks_that_nobody_decodes_are_refused_by_name(written, tmp_path, name):
    path, _ = written(name, "")
    for made in (Request("safetensors", dtype="bf16"), Request("gguf")):
        with pytest.raises(UnsupportedDtype, match=rf"\w+\.weight: .*{name}"):
            run_job(path, tmp_path / f"a.{made.container}", made)
    assert not list(tmp_path.iterdir())
