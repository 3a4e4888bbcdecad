"""The streaming loop: the same bytes however it is cut, planned bytes written, errors by name."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from diffquant.convert import chunk_work, cutting, engine
from diffquant.convert.adapters import ROWS, WHOLE
from diffquant.convert.binding import bind
from diffquant.convert.cutting import chunk_extents
from diffquant.convert.detect import detect
from diffquant.convert.dialects import own_dialect, pack
from diffquant.convert.engine import run_plan
from diffquant.convert.jobs import container_for, opened, run_job
from diffquant.convert.plan import Plan, Request, Step, make_plan
from diffquant.convert.rules import Assignment, Piece
from diffquant.core.errors import QuantError
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, format_named
from diffquant.quant.policy import Decision
from diffquant.quant.types import TYPES, type_named

SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}
CASES = [(name, container) for name, row in TYPES.items() for container in row.dialects]


SHAPES = ((100, 37), (7, 256), (64, 96), (3, 5, 2, 2), (50, 33))
CUTS = [
    (fmt, shape)
    for fmt, row in FORMATS.items()
    for shape in SHAPES
    if row.encodes and not row.check(shape)
]


class MemorySink:
    """A sink that keeps bytes and refuses to be written twice or beyond the plan."""

    def __init__(self, specs):
        self.data = {spec.key: np.zeros(spec.nbytes, np.uint8) for spec in specs}
        self.seen = {key: np.zeros(data.size, bool) for key, data in self.data.items()}

    def write(self, key, offset, data):
        end = offset + data.size
        assert end <= self.data[key].size, key
        assert not self.seen[key][offset:end].any(), f"{key} written twice"
        self.data[key][offset:end] = data
        self.seen[key][offset:end] = True

    def finished(self):
        assert all(seen.all() for seen in self.seen.values())
        return {key: bytes(data) for key, data in self.data.items()}


class Counter:
    """Progress that adds up."""

    def __init__(self):
        self.lock, self.total, self.done, self.stopped = threading.Lock(), 0, 0, 0

    def start(self, label, total, unit="B"):
        self.total += total

    def advance(self, amount, key=""):
        assert amount >= 0
        with self.lock:
            self.done += amount

    def stop(self):
        self.stopped += 1


def one_step(fmt, shape, *, key="w.weight", source="f32", adapters=(), pieces=None, dialect=""):
    """A plan of one weight."""
    dialect = dialect or own_dialect(fmt)
    parts = pieces or (Piece(key, 0, shape[0]),)
    step = Step(
        part="denoiser",
        key=key,
        target=key,
        assignment=Assignment(key, shape, parts),
        decision=Decision(fmt, "test"),
        stored=fmt,
        packed=pack(dialect, key, fmt, shape, source),
        source_nbytes=math.prod(shape) * 4,
        adapters=adapters,
    )
    return Plan("sd15", "", Request("safetensors"), (step,))


def run(path, plan, **options):
    sink = MemorySink(plan.specs)
    with open_source(path) as source:
        results = run_plan(bind(source), plan, sink, **options)
    return sink.finished(), results


@pytest.mark.parametrize("model", ["sd15-shapes", "flux1-shapes"])
@pytest.mark.parametrize(("name", "container"), CASES)
def test_written_bytes_are_the_planned_bytes(
    examples, tmp_path, matrix_for, model, name, container
):
    """Through run_job, which re-opens the output and compares names, shapes and every chunk."""
    out = tmp_path / f"out{SUFFIX[container]}"
    wanted = Request(container, type=type_named(name), parts=("denoiser",))
    with opened(examples / model) as (_, logical, match):
        matrix = matrix_for(name, logical, match)
    report = run_job(examples / model, out, wanted, workers=2, matrix=matrix)
    with open_source(out) as source:
        assert sum(spec.nbytes for spec in source.specs.values()) == report.nbytes
    assert report.nbytes == sum(row.nbytes for row in report.tensors)
    if (name, model) != ("int8_tensor", "flux1-shapes"):
        assert report.verdict in ("pass", "warn")
    else:  # one integer scale for a whole weight: its outliers cost more than the gate allows
        assert report.verdict == "fail"
    weights = sum(row.parameters for row in report.tensors)
    assert report.bits_per_weight == pytest.approx(report.nbytes * 8 / weights)


@pytest.mark.parametrize("name", ["fp8_scaled", "nf4", "int8_rowwise", "q4_k_s"])
def test_bytes_do_not_depend_on_workers_or_chunks(examples, tmp_path, digest, monkeypatch, name):
    kind = type_named(name)
    container = next(iter(kind.dialects))
    wanted = Request(container, type=kind, parts=("denoiser",))
    out = tmp_path / f"out{SUFFIX[container]}"
    found, errors = set(), []
    for chunk, workers in ((1 << 20, 2), (1 << 15, 1), (1 << 15, 2), (1 << 15, 3)):
        monkeypatch.setattr(cutting, "CHUNK", chunk)
        report = run_job(examples / "flux1-shapes", out, wanted, workers=workers, force=True)
        found.add(digest(out)["."])
        errors.append(report.error)
    with opened(examples / "flux1-shapes") as (_, logical, match):
        steps = make_plan(logical, match, wanted).steps
    assert max(len(cutting.chunks_of(step)) for step in steps) > 10
    assert len(found) == 1
    # sums of squares are added up chunk by chunk, so only their last digits may differ
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-6)
    assert errors[1] == errors[2] == errors[3]  # never on the number of workers


@pytest.mark.parametrize(("fmt", "shape"), CUTS)
def test_cutting_a_weight_changes_no_byte(tmp_path, write, monkeypatch, fmt, shape):
    row = format_named(fmt)
    rng = np.random.default_rng(3)
    path = write(tmp_path / "w.safetensors", {"w.weight": rng.standard_normal(shape, np.float32)})
    plan = one_step(fmt, shape)
    ones = np.ones(math.prod(shape) // shape[0], np.float32)
    importance = {"w.weight": ones} if row.importance == "required" else {}
    whole, (result,) = run(path, plan, workers=1, importance=importance)
    monkeypatch.setattr(cutting, "CHUNK", 150)
    pieces = cutting.chunks_of(plan.steps[0])
    assert all(start % row.row_multiple(shape) == 0 for start, _ in pieces)
    for workers in (1, 2, 3):
        cut, (again,) = run(path, plan, workers=workers, importance=importance)
        assert cut == whole
        assert again.error == pytest.approx(result.error, rel=1e-6, abs=1e-12)
    for one in plan.steps[0].packed:
        extents = chunk_extents(plan.steps[0], one.spec.key)
        assert extents[0][0] == 0
        assert extents[-1][1] == one.spec.nbytes
        assert all(a[1] == b[0] for a, b in itertools.pairwise(extents))


def test_rows_that_end_inside_an_nf4_block_are_cut_where_blocks_end(monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 150)
    step = one_step("nf4", (200, 37)).steps[0]
    assert [start for start, _ in cutting.chunks_of(step)] == [0, 64, 128, 192]


@pytest.mark.parametrize(
    ("fmt", "value", "message"),
    [
        ("q8_0", np.nan, "NaN or infinite"),
        ("fp8_e4m3_scaled", np.inf, "NaN or infinite"),
        ("int8_rowwise", np.nan, "NaN or infinite"),
        ("nf4", -np.inf, "NaN or infinite"),
        ("f16", 1e6, "f16"),
        ("q8_0", 1e38, "q8_0"),
        ("q4_k", 1e38, "q4_k"),
        ("fp8_e4m3", 1e3, "fp8_e4m3"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_weights_a_format_cannot_hold_stop_the_run_by_name(
    tmp_path, write, monkeypatch, fmt, value, message, workers
):
    monkeypatch.setattr(cutting, "CHUNK", 256)
    weight = np.zeros((40, 256), np.float32)
    weight[17, 3] = value
    tensors = {"good.weight": np.ones((40, 256), np.float32), "w.weight": weight}
    path = write(tmp_path / "w.safetensors", tensors)
    good, bad = one_step(fmt, (40, 256), key="good.weight"), one_step(fmt, (40, 256))
    plan = Plan("sd15", "", Request("safetensors"), good.steps + bad.steps)
    before = threading.active_count()
    with pytest.raises(QuantError, match=rf"^w\.weight: .*{message}") as error:
        run(path, plan, workers=workers)
    assert "--tensor-type" in str(error.value)
    assert threading.active_count() == before


def test_floats_that_hold_nan_keep_it(tmp_path, write):
    weight = np.full((2, 3), np.nan, np.float32)
    path = write(tmp_path / "w.safetensors", {"w.weight": weight})
    for fmt, bits in (("bf16", 0x7FC0), ("f16", 0x7E00)):
        data, _ = run(path, one_step(fmt, (2, 3)))
        assert (np.frombuffer(data["w.weight"], "<u2") == bits).all()


def test_first_error_stops_the_other_threads(tmp_path, write, monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 64)
    weight = np.ones((1000, 64), np.float32)
    weight[2, 0] = np.nan
    path = write(tmp_path / "w.safetensors", {"w.weight": weight})
    plan = one_step("q8_0", (1000, 64))
    progress = Counter()
    with pytest.raises(QuantError):
        run(path, plan, workers=3, progress=progress)
    assert progress.done < progress.total / 2
    assert progress.stopped == 1


def test_a_sinks_error_reaches_the_caller(tmp_path, write, monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 64)
    path = write(tmp_path / "w.safetensors", {"w.weight": np.ones((100, 64), np.float32)})
    plan = one_step("q8_0", (100, 64))

    class Full(MemorySink):
        def write(self, key, offset, data):
            raise OSError(28, "No space left on device")

    with open_source(path) as source, pytest.raises(OSError, match="No space"):
        run_plan(bind(source), plan, Full(plan.specs), workers=3)


class AddRows:
    """Adds its row number to each row."""

    name, reach = "add rows", ROWS

    def apply(self, weight, rows):
        return weight + np.arange(*rows, dtype=np.float32)[:, None]


class Orthogonal:
    """Multiplies from the left, so it needs every row at once."""

    name, reach = "rotate", WHOLE

    def __init__(self, size):
        self.matrix = np.linalg.qr(np.random.default_rng(1).standard_normal((size, size)))[0]
        self.matrix = self.matrix.astype(np.float32)

    def apply(self, weight, rows):
        assert rows == (0, self.matrix.shape[0])
        return self.matrix @ weight


@pytest.mark.parametrize("fmt", ["f32", "q8_0", "fp8_e4m3_scaled", "nf4"])
@pytest.mark.parametrize("adapter", [AddRows(), Orthogonal(96)], ids=["rows", "whole"])
@pytest.mark.parametrize("chunk", [1 << 20, 500])
def test_adapters_change_the_weight_before_it_is_encoded(
    tmp_path, write, monkeypatch, fmt, adapter, chunk
):
    shape = (96, 160)
    weight = np.random.default_rng(2).standard_normal(shape, np.float32)
    plain = write(tmp_path / "w.safetensors", {"w.weight": weight})
    changed = {"w.weight": adapter.apply(weight, (0, 96))}
    merged = write(tmp_path / "merged.safetensors", changed)
    expected, _ = run(merged, one_step(fmt, shape))
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    found, _ = run(plain, one_step(fmt, shape, adapters=(adapter,)), workers=2)
    assert found == expected


def test_fused_pieces_are_cut_across_their_borders(tmp_path, write, monkeypatch):
    rng = np.random.default_rng(4)
    q, k = (rng.standard_normal((n, 64), np.float32) for n in (30, 21))
    path = write(tmp_path / "w.safetensors", {"q.weight": q, "k.weight": k})
    pieces = (Piece("q.weight", 3, 30), Piece("k.weight", 0, 20))
    plan = one_step("q8_0", (47, 64), pieces=pieces)
    fused = np.concatenate([q[3:], k[:20]])
    expected, _ = run(
        write(tmp_path / "fused.safetensors", {"w.weight": fused}), one_step("q8_0", (47, 64))
    )
    monkeypatch.setattr(cutting, "CHUNK", 64 * 10)
    assert run(path, plan, workers=2)[0] == expected


@pytest.mark.parametrize("name", ["fp8_scaled", "q4_k_s", "nf4", "bf16"])
@pytest.mark.parametrize("chunk", [1 << 20, 3000])
def test_progress_adds_up_to_what_was_announced(examples, tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    kind = type_named(name)
    container = next(iter(kind.dialects))
    with opened(examples / "flux1-shapes") as (_, logical, match):
        plan = make_plan(logical, match, Request(container, type=kind, parts=("denoiser",)))
        progress = Counter()
        run_plan(logical, plan, MemorySink(plan.specs), workers=3, progress=progress)
    assert progress.done == progress.total == plan.read_nbytes
    assert progress.stopped == 1
    if name == "fp8_scaled":
        twice = sum(step.source_nbytes for step in plan.steps if step.passes == 2)
        assert twice > 0
        assert plan.read_nbytes == sum(step.source_nbytes for step in plan.steps) + twice


@pytest.fixture(scope="module")
def packed(examples, tmp_path_factory):
    """flux1-shapes' denoiser in packed types."""
    folder, found = tmp_path_factory.mktemp("packed"), {}
    for name in ("fp8_scaled", "nf4", "int8_rowwise", "fp8_e4m3", "q4_k_s"):
        ending = ".gguf" if name.startswith("q") else ".safetensors"
        path = folder / f"{name}{ending}"
        wanted = Request(container_for(path), type=type_named(name), parts=("denoiser",))
        run_job(examples / "flux1-shapes", path, wanted)
        found[name] = path
    return found


@pytest.mark.parametrize("name", ["fp8_scaled", "nf4", "int8_rowwise", "q4_k_s", "fp8_e4m3"])
@pytest.mark.parametrize("chunk", [1 << 20, 5000])
def test_packed_weights_are_copied_bit_for_bit(packed, tmp_path, load, monkeypatch, name, chunk):
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    out = tmp_path / packed[name].name
    run_job(packed[name], out, Request(container_for(out)), workers=2)
    before, after = load(packed[name])[0], load(out)[0]
    assert before.keys() == after.keys()
    for key, (dtype, shape, data) in before.items():
        assert (dtype, shape) == after[key][:2], key
        assert np.array_equal(data, after[key][2]), key


@pytest.mark.parametrize(
    ("name", "shape"), [("fp8_scaled", "rows"), ("fp8_scaled", (1,)), ("int8_rowwise", ())]
)
def test_copied_scales_keep_the_shape_they_came_in(
    packed, tmp_path, write, load, monkeypatch, name, shape
):
    monkeypatch.setattr(cutting, "CHUNK", 5000)
    tensors, metadata = load(packed[name])
    rows = {key: (dtype, data, size) for key, (dtype, size, data) in tensors.items()}
    key = max(
        (k for k in rows if k.endswith(".weight_scale")),
        key=lambda k: rows[k.removesuffix("_scale")][1].size,
    )
    n = rows[key.removesuffix("_scale")][2][0]
    scale = np.arange(1, n + 1, dtype=np.float32).reshape(n, 1)
    rows[key] = scale if shape == "rows" else scale[0].reshape(shape)
    path = write(tmp_path / "in.safetensors", rows, metadata)
    out = tmp_path / "out.safetensors"
    run_job(path, out, Request("safetensors"))
    assert load(out)[0][key][1] == rows[key].shape
    with opened(path) as (_, before, match), opened(out) as (_, after, _):
        weight = key.removesuffix("_scale")
        assert match.architecture == "flux1"
        assert np.array_equal(before.read(weight), after.read(weight))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 1), (5, 0, 2)])
def test_empty_and_tiny_tensors_are_copied_and_cast(tmp_path, write, shape):
    path = write(tmp_path / "w.safetensors", {"w.weight": np.ones(shape, np.float32)})
    for fmt in ("bf16", "f16", "f32"):
        n = shape[0] if shape else 1
        data, _ = run(path, one_step(fmt, shape, pieces=(Piece("w.weight", 0, n),)))
        assert len(data["w.weight"]) == math.prod(shape) * (4 if fmt == "f32" else 2)


def test_transposed_weights_are_transposed(tmp_path, write, monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 100)
    weight = np.arange(60 * 32, dtype=np.float32).reshape(60, 32)
    path = write(tmp_path / "w.safetensors", {"w.weight": weight})
    step = one_step("f32", (32, 60), pieces=(Piece("w.weight", 0, 60),)).steps[0]
    turned = dataclasses.replace(
        step, assignment=dataclasses.replace(step.assignment, transpose=True)
    )
    for decision in (Decision("f32", ""), Decision("", "")):
        step = dataclasses.replace(turned, decision=decision)
        data, _ = run(path, Plan("sd15", "", Request("safetensors"), (step,)), workers=2)
        assert np.array_equal(np.frombuffer(data["w.weight"], "<f4").reshape(32, 60), weight.T)


def test_peak_memory_follows_the_chunk_not_the_model():
    small = engine.peak_nbytes(one_step("q8_0", (4096, 1024)), 2)
    assert engine.peak_nbytes(one_step("q8_0", (40960, 1024)), 2) == small
    one, more = (engine.peak_nbytes(one_step("q8_0", (4096, 1024)), count) for count in (1, 4))
    assert more - one == 3 * (small - one) > 0


MEASURED = """
    import sys, threading
    from pathlib import Path
    from diffquant.convert.dialects import pack
    from diffquant.convert.dialects.comfy import COMFY_FORMATS
    from diffquant.convert.engine import peak_nbytes, run_plan
    from diffquant.convert.binding import bind
    from diffquant.convert.plan import Plan, Request, Step
    from diffquant.convert.rules import Assignment, Piece
    from diffquant.io import open_sink, open_source
    from diffquant.quant.policy import Decision
    seen, ended, shape = [0], threading.Event(), (16384, 1024)
    def watch():
        while not ended.wait(0.002):
            lines = Path("/proc/self/status").read_text().splitlines()
            seen.append(next(int(one.split()[1]) for one in lines if one.startswith("RssAnon")))
    thread = threading.Thread(target=watch)
    thread.start()
    assignment = Assignment("w", shape, (Piece("w", 0, shape[0]),))
    packed = pack("plain", "w", "q8_0", shape, "f32")
    step = Step("", "w", "w", assignment, Decision("q8_0", ""), "q8_0", packed, 4 << 24)
    plan = Plan("sd15", "", Request("gguf"), (step,))
    with open_source(sys.argv[1]) as source, open_sink(sys.argv[2], plan.specs, {}) as sink:
        run_plan(bind(source), plan, sink, workers=int(sys.argv[3]))
    ended.set()
    thread.join()
    print(max(seen) * 1024, peak_nbytes(plan, int(sys.argv[3])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_planned_memory_is_an_upper_bound_and_less_than_twice_what_is_used(tmp_path, write):
    weight = np.random.default_rng(0).standard_normal((16384, 1024), np.float32)
    path = write(tmp_path / "w.safetensors", {"w": weight})
    for workers in ("1", "4"):
        command = [sys.executable, "-c", textwrap.dedent(MEASURED), str(path)]
        command += [str(tmp_path / f"{workers}.gguf"), workers]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used, planned = map(int, done.stdout.split())
        assert used < planned < 2 * used


@pytest.mark.parametrize("fmt", [name for name, row in FORMATS.items() if row.encodes])
def test_weights_up_to_the_safe_amax_do_not_overflow(fmt):
    """So that the engine need not decode them to know; one step further the casts do."""
    row = format_named(fmt)
    if not row.limited:
        return
    rng, ones = np.random.default_rng(1), np.ones(512, np.float32)
    rows = [np.sign(rng.standard_normal(512)), rng.uniform(-1, 1, 512), np.ones(512)]
    rows += [-np.ones(512), np.arange(512) % 2, np.eye(1, 512)[0], -np.eye(1, 512)[0]]
    rows += [rng.uniform(0.99, 1, 512), rng.standard_normal(512).clip(-1, 1) ** 9]
    weight = (np.array(rows) * row.safe_amax).astype(np.float32)
    modes = [{}] if row.importance == "unused" else [{"importance": ones}]
    modes += [{"importance": None}] if row.importance == "optional" else []
    for mode in modes:
        parts = backend(row.codec, "encode")(weight, None, fmt=fmt, **mode)
        decoded = backend(row.codec, "decode")(parts, weight.shape, fmt=fmt)
        assert np.isfinite(decoded).all(), mode


def test_weights_in_range_are_decoded_only_to_measure_errors(tmp_path, write, monkeypatch):
    path = write(tmp_path / "w.safetensors", {"w.weight": np.ones((64, 64), np.float32)})
    plan, calls, load = one_step("q8_0", (64, 64)), [], chunk_work.backend
    monkeypatch.setattr(chunk_work, "backend", lambda *a: (calls.append(a[1]), load(*a))[1])
    run(path, plan, check=False)
    assert calls == ["encode"]
    run(path, plan, check=True)
    assert calls == ["encode", "encode", "decode"]
    big = write(tmp_path / "big.safetensors", {"w.weight": np.full((64, 64), 1e38, np.float32)})
    with pytest.raises(QuantError, match="overflow q8_0"):
        run(big, plan, check=False)


def test_sink_specs_match_the_plan(examples, tmp_path):
    """What open_sink reserves is what the plan says, before anything is written."""
    with opened(examples / "flux1-shapes") as (source, logical, _):
        match = detect(logical.specs(), source.metadata, source.configs)
        plan = make_plan(logical, match, Request("gguf", type=type_named("q6_k")))
    with open_sink(tmp_path / "a.gguf", plan.specs, {"general.architecture": "flux"}) as sink:
        assert sink.nbytes >= plan.nbytes
    assert all(isinstance(spec, TensorSpec) for spec in plan.specs)
