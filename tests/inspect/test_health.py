"""health(): a good file is healthy, and every check of the table is true of a file made for it."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.inspect import health_values as values_module
from diffquant.inspect.health import health
from diffquant.inspect.health_findings import CHECKS
from diffquant.inspect.subject import open_subject
from diffquant.inspect.weight_stats import chunk_stats, combine
from diffquant.quant.types import type_named

RNG = np.random.default_rng(3)


def normal(*shape, dtype=np.float32):
    return (RNG.standard_normal(shape) * 0.02).astype(dtype)


def model(**changed):
    """Two blocks of an unknown transformer; `changed` replaces or adds tensors."""
    tensors = {}
    for block in range(2):
        tensors |= {
            f"blocks.{block}.attn.qkv.weight": normal(192, 64),
            f"blocks.{block}.attn.proj.weight": normal(64, 64),
            f"blocks.{block}.attn.proj.bias": normal(64),
            f"blocks.{block}.mlp.0.weight": normal(128, 64),
            f"blocks.{block}.norm.weight": np.ones(64, np.float32),
            f"blocks.{block}.norm.bias": np.zeros(64, np.float32),
        }
    return {**tensors, **{key.replace("__", "."): value for key, value in changed.items()}}


def with_value(array, value):
    out = array.copy()
    out.reshape(-1)[5] = value
    return out


QKV = "blocks__0__attn__qkv__weight"
OUT = "blocks__0__attn__proj__weight"


def block(make):
    names = ("attn.qkv", "attn.proj", "mlp.0")
    shapes = ((192, 64), (64, 64), (128, 64))
    return {f"blocks.0.{n}.weight": make(s) for n, s in zip(names, shapes, strict=True)}


SHARED = normal(192, 64)
FP8 = np.full((16, 16), 0x7E, np.uint8)  # 448
BROKEN = {
    "nan": {QKV: with_value(normal(192, 64), np.nan)},
    "infinite": {QKV: with_value(normal(192, 64), -np.inf)},
    "zero_tail": {"z__weight": np.zeros((1024, 1024), np.float32)},
    "holes": {"a__weight": np.zeros((1024, 1024), np.float32)},
    "beyond_fp16": {QKV: with_value(normal(192, 64), 70_000)},
    "dead_block": block(lambda shape: np.zeros(shape, np.float32)),
    "dead_output": {OUT: np.zeros((64, 64), np.float32), "blocks.0.attn.proj.bias": normal(64) * 0},
    "zero_matrix": {QKV: np.zeros((192, 64), np.float32)},
    "idle_adapter": {"x__lora_up__weight": np.zeros((64, 4), np.float32)},
    "constant": {QKV: np.full((192, 64), 0.5, np.float32)},
    "fp8_clipped": {"w.weight": ("F8_E4M3", (16, 16), FP8)},
    "header": {"w.weight": ("F8_E4M3", (16, 16), FP8)},
    "outlier": {QKV: with_value(normal(192, 64), 500)},
    "fp16_underflow": {QKV: normal(192, 64) * np.float32(1e-7)},
    "sparse": {QKV: normal(192, 64) * (RNG.random((192, 64)) < 0.3)},
    "zero_rows": {QKV: normal(192, 64) * (np.arange(192) % 2)[:, None].astype(np.float32)},
    "copies": {QKV: SHARED, "blocks__1__attn__qkv__weight": SHARED},
    "mask": {"attn_mask": np.triu(np.full((8, 8), -np.inf, np.float32), 1)},
    "not_checked": {"position_ids": np.arange(8)},
}


def report_of(path, **options):
    with open_subject(path) as subject:
        return health(subject, **options)


def names(report):
    return {one.name for one in report.findings}


@pytest.fixture
def made(write, tmp_path):
    def make(tensors, metadata=None):
        return write(tmp_path / "model.safetensors", tensors, metadata)

    return make


def test_a_good_file_is_healthy(made):
    report = report_of(made(model()))
    assert (report.verdict, report.findings) == ("healthy", ())
    (part,) = report.parts
    assert (part.tensors, part.bad, part.zeros) == (12, 0, 128)


def test_the_demo_models_are_healthy(examples):
    for name in ("sd15-shapes", "flux1-shapes"):
        report = report_of(examples / name)
        assert report.verdict == "healthy", report.findings
        assert [part.name for part in report.parts if part.name == "denoiser"]


@pytest.mark.parametrize("name", [*BROKEN])
def test_every_check_finds_what_it_is_for(made, name):
    changed = BROKEN[name]
    start = {"a.weight": changed["a__weight"]} if "a__weight" in changed else {}
    report = report_of(made({**start, **model(**changed)}))
    check = next(row for row in CHECKS if row.name == name)
    found = next(one for one in report.findings if one.name == name)
    assert found.severity == check.severity
    assert found.count >= 1
    assert found.examples
    verdict = {"error": "damaged", "warning": "suspicious"}
    if check.severity in verdict:
        assert report.verdict in (verdict[check.severity], "damaged")
    else:
        assert report.verdict == "healthy"


def test_a_file_of_zeros_holds_no_model(made):
    report = report_of(made({"a.weight": np.zeros((8, 8), np.float32)}))
    assert "empty_part" in names(report)
    assert report.verdict == "damaged"


def test_a_stated_hash_that_differs_is_a_warning(made):
    path = made(model(), {"sshs_model_hash": "ab" * 32})
    found = next(one for one in report_of(path).findings if one.name == "stated_hash")
    assert "sshs_model_hash says abababab" in found.examples[0]
    raw = path.read_bytes()
    data = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    (file,) = report_of(made(model(), {"modelspec.hash_sha256": "0x" + "0" * 64})).hashes
    assert [one.verdict for one in file.stated] == ["differs"]
    assert file.data_sha256 != data  # other random numbers


def test_every_check_is_tried_here():
    assert set(BROKEN) | {"empty_part", "stated_hash"} == {row.name for row in CHECKS}


@pytest.mark.parametrize(
    "kind", ["q4_k_s", "fp8_scaled", "nf4_dq", "mxfp8", "nvfp4", "int8_rowwise"]
)
def test_packed_weights_are_decoded_and_healthy(made, tmp_path, kind):
    tensors = model(head__weight=normal(64, 256))
    wide = {f"blocks.{i}.mlp.2.weight": normal(64, 256) for i in range(2)}
    source = made({**tensors, **wide})
    made_type = type_named(kind)
    container = next(iter(made_type.dialects))
    out = tmp_path / f"packed.{container}"
    run_job(source, out, Request(container, type=made_type, arch="generic"), verify="none")
    report = report_of(out)
    assert report.verdict == "healthy", report.findings
    assert sum(part.weights for part in report.parts) >= sum(
        np.prod(v.shape) for v in {**tensors, **wide}.values()
    )


def test_a_nan_scale_is_found_where_it_reaches_the_weights(write, tmp_path):
    path = write(
        tmp_path / "a.safetensors",
        {
            "l.weight": ("F8_E4M3", (4, 4), np.full(16, 0x38, np.uint8)),
            "l.scale_weight": np.array(np.nan, np.float32).reshape(()),
        },
    )
    found = next(one for one in report_of(path).findings if one.name == "nan")
    assert found.examples[0].startswith("l.weight: 16 of 16")


def test_chunks_and_threads_do_not_change_the_answer(made, monkeypatch):
    path = made(model(**{QKV: with_value(normal(192, 64), np.nan)}))
    once = report_of(path, workers=1)
    monkeypatch.setattr(values_module, "CHUNK", 100)
    parts = [report_of(path, workers=3) for _ in range(2)]
    assert parts[0] == parts[1]
    assert parts[0].findings == once.findings
    assert parts[0].hashes == once.hashes


def test_a_row_that_is_too_large_is_named_and_not_decoded(made, monkeypatch):
    monkeypatch.setattr(values_module, "MAX_ROW", 50)
    report = report_of(made({"a.weight": normal(4, 51), "b.weight": normal(4, 50)}))
    found = next(one for one in report.findings if one.name == "not_checked")
    assert found.examples == (
        "a.weight: one row of 51 numbers: more than 50 are not decoded at once",
    )


def test_an_error_in_one_thread_ends_all(made, monkeypatch):
    """A hash task that fails must not leave others waiting for their turn."""
    path = made(model())
    monkeypatch.setattr("diffquant.inspect.hashes.SEGMENT_NBYTES", 1000)
    before = threading.active_count()
    with open_subject(path) as subject:
        path.write_bytes(path.read_bytes()[:50_000])
        with pytest.raises(Exception, match=r"ends at byte|asked for|header"):
            health(subject, workers=4)
    assert threading.active_count() == before


class TestStats:
    def stats(self, array):
        values = np.atleast_2d(np.asarray(array, np.float32))
        return combine([chunk_stats(values)], rows=len(values))

    def test_counts_are_exact(self):
        one = self.stats([[0, 1, -2], [0, 0, 0], [np.nan, np.inf, 65504]])
        assert (one.size, one.nan, one.inf, one.zeros, one.zero_rows) == (9, 1, 1, 4, 1)
        assert (one.low, one.high, one.beyond) == (-2, 65504, 0)

    @pytest.mark.parametrize("value", [2.0**-25, 2.0**-24, 2.0**-26, 1e-30, 65519.0, 65520.0, 1e30])
    def test_what_float16_loses_is_what_numpy_loses(self, value):
        one = self.stats([value, 1.0])
        with np.errstate(over="ignore"):
            half = np.float16(np.float32(value))
        assert one.tiny == (half == 0)
        assert one.beyond == (value > 65504)

    def test_moments_match_float64(self):
        array = (RNG.standard_normal((300, 1000)) * 3 + 1).astype(np.float32)
        one = combine([chunk_stats(array[:100]), chunk_stats(array[100:])], rows=300)
        assert one.mean == pytest.approx(array.astype(np.float64).mean(), rel=1e-5)
        assert one.std == pytest.approx(array.astype(np.float64).std(), rel=1e-4)

    def test_huge_numbers_do_not_overflow(self):
        one = self.stats([3e38, -3e38, 3e38, 3e38])
        assert np.isfinite(one.std)
        assert one.beyond == 4

    def test_nothing_is_nothing(self):
        one = combine([], rows=0)
        assert (one.size, one.amax, one.std, one.is_zero) == (0, 0.0, 0.0, False)


def test_the_page_about_health_lists_every_check():
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
    assert [row.name for row in CHECKS if f"`{row.name}`" not in page] == []
