"""diff(): every class made on purpose, streaming, and names of other layouts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import CheckpointError, UsageError
from diffquant.inspect.diff import DIFF_CLASSES, diff
from diffquant.quant.types import type_named

RNG = np.random.default_rng(5)
X = (RNG.standard_normal((8, 64)) * 0.02).astype(np.float32)
V = (X[0] * 3).copy()


def bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, half to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def widened(values: np.ndarray) -> np.ndarray:
    return (bf16(values).astype(np.uint32) << 16).view("<f4")


def q8(blocks, weight=X, levels=127.0):
    return "Q8_0", weight.shape, blocks(weight, levels)


def kinds(report):
    return {row.key: row.kind for row in report.tensors}


def pair(write, folder, a, b, suffix=".safetensors"):
    return write(folder / f"a{suffix}", a), write(folder / f"b{suffix}", b)


def test_each_class_is_told(tmp_path, write, q8_blocks):
    a = {
        "same": ("F32", X.shape, X.tobytes()),
        "values": ("F32", X.shape, widened(X).tobytes()),
        "scale": q8(q8_blocks),
        "format": ("F32", X.shape, X.tobytes()),
        "different": ("F32", X.shape, X.tobytes()),
        "nudged": ("F32", X.shape, X.tobytes()),
        "shape": ("F32", (8, 64), X.tobytes()),
        "lost": ("F32", X.shape, X.tobytes()),
        "count": ("I64", (2,), np.arange(2).tobytes()),
    }
    nudged = X.copy()
    nudged[3, 7] += 1e-6
    b = {
        "same": a["same"],
        "values": ("BF16", X.shape, bf16(X).tobytes()),
        "scale": q8(q8_blocks, levels=120.0),
        "format": q8(q8_blocks),
        "different": q8(q8_blocks, weight=X[::-1].copy()),
        "nudged": ("F32", X.shape, nudged.tobytes()),
        "shape": ("F32", (64, 8), X.tobytes()),
        "new": ("F32", X.shape, X.tobytes()),
        "count": ("I64", (2,), np.arange(1, 3).tobytes()),
    }
    report = diff(*pair(write, tmp_path, a, b, ".gguf"))
    assert kinds(report) == {
        "same": "identical",
        "values": "values",
        "scale": "scale",
        "format": "format",
        "different": "different",
        "nudged": "different",  # one number of one tensor, a millionth
        "shape": "shape",
        "lost": "missing_in_b",
        "new": "missing_in_a",
        "count": "different",
    }
    assert not report.same
    assert sum(report.classes.values()) == len(report.tensors)
    order = list(DIFF_CLASSES)
    ranks = [order.index(row.kind) for row in report.tensors]
    assert ranks == sorted(ranks, reverse=True)
    rows = {row.key: row for row in report.tensors}
    expected = np.linalg.norm(X - X[::-1]) / np.linalg.norm(X)
    assert rows["different"].error == pytest.approx(expected, rel=0.01)
    assert (rows["shape"].shape_a, rows["shape"].shape_b) == ((8, 64), (64, 8))
    assert rows["lost"].a == "f32"
    assert rows["lost"].b == ""


def test_only_accepted_classes_are_the_same(tmp_path, write, q8_blocks):
    a, b = pair(write, tmp_path, {"w": q8(q8_blocks)}, {"w": q8(q8_blocks, levels=120.0)}, ".gguf")
    assert diff(a, b).same
    assert diff(a, b, allow="scale").same
    assert not diff(a, b, allow="values").same
    assert diff(a, a, allow="identical").same
    with pytest.raises(UsageError, match="expected one of identical, values, scale, format"):
        diff(a, b, allow="different")


def test_the_reference_decides_and_gives_both_errors(tmp_path, write, q8_blocks):
    """A shifted weight is close to its twin, and not to the source."""
    shifted = (X * 1.009).astype(np.float32)
    assert 0.0054 < 0.009 < 1.5 * 2**0.5 * 0.00535
    a = write(tmp_path / "a.gguf", {"w": q8(q8_blocks)})
    b = write(tmp_path / "b.gguf", {"w": q8(q8_blocks, weight=shifted)})
    ref = write(tmp_path / "ref.safetensors", {"w": X})
    assert kinds(diff(a, b)) == {"w": "scale"}
    report = diff(a, b, ref=ref)
    (row,) = report.tensors
    assert row.kind == "different"
    assert row.error_a == pytest.approx(0.0054, rel=0.2)
    assert row.error_b == pytest.approx(np.hypot(0.009, 0.0054), rel=0.2)
    assert "against the reference" in row.note
    other = write(tmp_path / "c.gguf", {"w": q8(q8_blocks, levels=120.0)})
    assert kinds(diff(a, other, ref=ref)) == {"w": "scale"}


@pytest.mark.parametrize(("factor", "kind"), [(1.006, "scale"), (1.013, "different")])
def test_without_a_reference_the_bound_is_what_two_roundings_explain(
    tmp_path, write, q8_blocks, factor, kind
):
    """1.5 * sqrt(2) * 0.00535 = 0.0113; the two roundings themselves are 0.0076 apart."""
    moved = q8(q8_blocks, weight=(X * factor).astype(np.float32))
    a, b = pair(write, tmp_path, {"w": q8(q8_blocks)}, {"w": moved}, ".gguf")
    assert kinds(diff(a, b)) == {"w": kind}


def test_what_the_reference_lacks_is_noted(tmp_path, write):
    a = write(tmp_path / "a.safetensors", {"w": X, "v": V})
    ref = write(tmp_path / "ref.safetensors", {"v": np.zeros(3, "f4")})
    notes = {row.key: row.note for row in diff(a, a, ref=ref).tensors}
    assert notes == {"w": "not in the reference", "v": "the reference has shape (3,)"}


def test_a_changed_scale_of_a_packed_weight_is_no_identity(tmp_path, write):
    scale = np.array([0.5], "<f4")
    q = np.full((4, 4), 0x38, np.uint8)  # 1.0 in e4m3
    marker = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    a = {"l.weight": ("F8_E4M3", (4, 4), q), "l.weight_scale": scale, "l.comfy_quant": marker}
    b = {**a, "l.weight_scale": scale * 2}
    x, y = pair(write, tmp_path, a, b)
    assert kinds(diff(x, y)) == {"l.weight": "different"}
    assert kinds(diff(x, x)) == {"l.weight": "identical"}
    halves = {**a, "l.weight": ("F8_E4M3", (4, 4), q - 8), "l.weight_scale": scale * 2}
    assert kinds(diff(x, write(tmp_path / "c.safetensors", halves))) == {"l.weight": "values"}


def test_what_cannot_be_decoded_is_compared_by_all_its_bytes(tmp_path, write):
    marker = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)
    a = {
        "l.weight": np.zeros((4, 8), np.uint8),
        "l.weight_scale": np.ones((4, 1), "<f4"),
        "l.comfy_quant": marker,
    }
    b = {**a, "l.weight_scale": np.full((4, 1), 2.0, "<f4")}
    x, y = pair(write, tmp_path, a, b)
    assert kinds(diff(x, x)) == {"l.weight": "identical"}
    (row,) = diff(x, y).tensors
    assert row.kind == "unreadable"
    assert "nvfp4" in row.note


def test_not_a_number_is_equal_to_itself_and_to_nothing_else(tmp_path, write):
    a = X.copy()
    a[0, 0] = np.nan
    wide = np.where(np.isnan(a), a, widened(a)).astype("<f4")
    x = write(tmp_path / "a.safetensors", {"w": wide})
    y = write(tmp_path / "b.safetensors", {"w": ("BF16", wide.shape, bf16(wide).tobytes())})
    assert kinds(diff(x, y)) == {"w": "values"}
    z = write(tmp_path / "c.safetensors", {"w": widened(X)})
    assert kinds(diff(x, z)) == {"w": "different"}
    assert kinds(diff(z, x)) == {"w": "different"}


@pytest.mark.parametrize("model", ["flux1-shapes", "sd15-shapes"])
def test_layouts_that_name_things_differently_are_matched(examples, tmp_path, model):
    folder, single = examples / model, tmp_path / "a.safetensors"
    run_job(folder, single, Request("safetensors"))
    report = diff(folder, single, allow="values")
    assert report.same
    assert report.matched_by == "canonical name"
    assert len(report.tensors) > 100
    out = tmp_path / "a.gguf"
    run_job(folder, out, Request("gguf", type=type_named("q8_0")))
    report = diff(out, single)
    assert not report.same
    missing = [row.key for row in report.tensors if row.kind == "missing_in_a"]
    others = ("vae/", "text_encoder", "first_stage_model.", "cond_stage_model.")
    assert missing
    assert all(key.startswith(others) for key in missing)
    report = diff(out, single, parts=("denoiser",), ref=folder)
    assert report.same
    packed = [row for row in report.tensors if row.a == "q8_0"]
    assert packed
    assert all(row.kind == "format" and 0 < row.error_a < 0.009 for row in packed)
    assert all(row.error_b == 0 for row in packed)
    with pytest.raises(UsageError, match="no part clip"):
        diff(out, single, parts=("clip",))


def test_files_of_two_architectures_are_compared_by_name_and_that_is_said(examples):
    report = diff(examples / "flux1-shapes", examples / "sd15-shapes")
    assert report.matched_by == "name"
    assert report.warnings == ("compared by name: flux1-shapes is flux1, sd15-shapes is sd15",)
    assert not report.same


def test_memory_is_bounded_by_chunks(tmp_path, write):
    x = np.zeros((4096, 2048), "<f4")
    y = x.copy()
    y[-1, -1] = 1.0
    a, b = pair(write, tmp_path, {"w": x}, {"w": y})
    diff(a, b)  # whatever is compiled or imported is, now
    del x, y
    tracemalloc.start()
    report = diff(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kinds(report) == {"w": "different"}
    assert peak < 24 << 20  # of 32 MiB a side


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, write):
    a = write(tmp_path / "a.safetensors", {"w": X})
    with pytest.raises(CheckpointError, match="no such file"):
        diff(a, tmp_path / "b.safetensors")
