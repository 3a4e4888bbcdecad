"""Sensitivity files are hostile input; errors from weights are those that the engine measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.sensitivity import (
    MAX_SENSITIVITY_NBYTES,
    Sensitivity,
    cache_path,
    find_sensitivity,
    keep_sensitivity,
    read_sensitivity,
    write_sensitivity,
)
from diffquant.convert.sensitivity_weights import SAMPLE, Wanted, from_weights
from diffquant.core.errors import MalformedFile
from diffquant.quant.types import type_named

ONE = Sensitivity(
    "flux1", "outputs", "unit", "a" * 64, {"x.weight": {"q4_k": 0.5, "q8_0": 0}}, {"steps": "4"}
)
GOOD = {
    "diffquant_sensitivity": 1,
    "architecture": "flux1",
    "method": "weights",
    "unit": "",
    "source": "",
    "errors": {"x": {"q4_k": 1.0}},
    "context": {},
}


def test_what_is_written_is_read_and_the_same_data_give_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_sensitivity(first, ONE)
    write_sensitivity(second, read_sensitivity(first))
    assert read_sensitivity(first) == ONE
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_an_error_that_json_cannot_hold_is_not_written(tmp_path):
    bad = Sensitivity("flux1", "weights", "", "", {"x": {"q4_k": float("inf")}}, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_sensitivity(tmp_path / "a.json", bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffquant_sensitivity": 2}, "version 2, only 1"),
        ({"diffquant_sensitivity": True}, "version True"),
        ({"diffquant_sensitivity": None}, "no sensitivity file"),
        ({"method": "guess"}, "method 'guess', expected one of outputs, weights"),
        ({"source": "../../etc"}, "expected a sha256 or nothing"),
        ({"source": 3}, "source is 3, expected text"),
        ({"context": {"a": 1}}, "context is not an object of texts"),
        ({"errors": {}}, "a tensor in it"),
        ({"errors": []}, "a tensor in it"),
        ({"errors": {"x": {}}}, "no object of formats"),
        ({"errors": {"x": [1]}}, "no object of formats"),
        ({"errors": {"x": {"q4_k": -1}}}, "is -1, expected a finite number"),
        ({"errors": {"x": {"q4_k": float("nan")}}}, "is nan, expected a finite number"),
        ({"errors": {"x": {"q4_k": float("inf")}}}, "is inf, expected a finite number"),
        ({"errors": {"x": {"q4_k": "1"}}}, "is '1', expected a finite number"),
        ({"errors": {"x": {"q4_k": True}}}, "is True, expected a finite number"),
        ({"errors": {"x": {"q4_k": 10**400}}}, "expected a finite number"),
        ({"errors": {"x": {"../q": 1.0}}}, "names no format"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_what_no_measurement_gives_is_refused(tmp_path, change, message):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(MalformedFile, match=message) as caught:
        read_sensitivity(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path, raw):
    path = tmp_path / "s.json"
    path.write_bytes(raw)
    with pytest.raises(MalformedFile):
        read_sensitivity(path)


def test_a_file_without_end_is_not_read_whole(tmp_path):
    path = tmp_path / "s.json"
    with path.open("wb") as file:
        file.truncate(MAX_SENSITIVITY_NBYTES + 1)
    with pytest.raises(MalformedFile, match="more than"):
        read_sensitivity(path)


def test_a_file_is_found_beside_its_model_or_in_the_cache_by_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))
    model, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    model.touch()
    folder.mkdir()
    assert find_sensitivity(model, ONE.source) == ""
    kept = cache_path(ONE.source)
    kept.parent.mkdir(parents=True)
    places = (
        (model, kept),
        (model, tmp_path / "m.sensitivity.json"),
        (folder, tmp_path / "folder.sensitivity.json"),
        (folder, folder / "sensitivity.json"),
    )
    for source, path in places:
        write_sensitivity(path, ONE)
        assert find_sensitivity(source, ONE.source) == (path, ONE)
    assert "another checkpoint" in find_sensitivity(model, "b" * 64)
    link = tmp_path / "snapshot" / "m.safetensors"
    link.parent.mkdir()
    link.symlink_to(folder / "blob")
    write_sensitivity(tmp_path / "snapshot" / "m.sensitivity.json", ONE)
    found = find_sensitivity(link, ONE.source)
    assert found == (tmp_path / "snapshot" / "m.sensitivity.json", ONE)
    (tmp_path / "m.sensitivity.json").write_text("{")
    assert find_sensitivity(model, ONE.source) == (kept, ONE)


@pytest.fixture(scope="module")
def flux(examples):
    with opened(examples / "flux1-shapes", quantized=True) as (_, logical, match):
        plan = make_plan(logical, match, Request("gguf", type=type_named("q4_0"), pure=True))
        yield logical, [step for step in plan.part_steps("denoiser") if step.stored == "q4_0"]


def measured(flux, formats, **more):
    logical, steps = flux
    wanted = [Wanted(step, formats) for step in steps]
    return from_weights(logical, wanted, architecture="flux1", source="", **more).errors


def test_errors_are_those_the_engine_measures(examples, flux, tmp_path):
    """The oracle is a job that decodes every chunk it writes; small tensors are sampled whole."""
    found = measured(flux, ("q3_k", "q8_0"))
    for name in ("q3_k_s", "q8_0"):
        request = Request("gguf", type=type_named(name), pure=True)
        report = run_job(examples / "flux1-shapes", tmp_path / f"{name}.gguf", request)
        rows = {row.key: row for row in report.tensors}
        for key, errors in found.items():
            expected = rows[key].error ** 2
            sampled = rows[key].parameters > SAMPLE
            assert errors[rows[key].stored] == pytest.approx(expected, rel=0.1 if sampled else 1e-4)


def test_numbers_do_not_depend_on_threads_or_company(flux):
    alone = measured(flux, ("q4_k",), workers=1)
    assert measured(flux, ("q2_k", "q4_k", "f16"), workers=3).keys() == alone.keys()
    several = measured(flux, ("q2_k", "q4_k", "f16"), workers=3)
    assert {key: one["q4_k"] for key, one in several.items()} == {
        key: one["q4_k"] for key, one in alone.items()
    }


def test_importance_weighs_columns(flux):
    logical, steps = flux
    step = min(steps, key=lambda one: one.parameters)
    columns = step.assignment.shape[1]
    values = np.ones(columns, np.float32)
    values[: columns // 2] = 1e4
    (errors,) = from_weights(
        logical, [Wanted(step, ("q3_k", "bf16"))], architecture="", source="",
        importance={step.key: values}, matrix="m",
    ).errors.values()  # fmt: skip
    (plain,) = from_weights(
        logical, [Wanted(step, ("q3_k", "iq2_xs", "bf16"))], architecture="", source=""
    ).errors.values()
    assert errors["q3_k"] < plain["q3_k"]
    assert "iq2_xs" not in plain  # it cannot be encoded without importance
    assert plain["bf16"] == 0.0


def test_a_format_that_overflows_is_left_out(write, tmp_path, flux):
    from diffquant.convert.binding import bind
    from diffquant.convert.rules import Assignment, Piece
    from diffquant.convert.step import Step
    from diffquant.io import open_source
    from diffquant.quant.policy import Decision

    rng = np.random.default_rng(0)
    big = rng.normal(size=(8, 256)).astype(np.float32)
    bad = big.copy()
    big[0, 0], bad[0, 0] = 1e9, np.nan
    path = write(Path(tmp_path) / "a.safetensors", {"big.weight": big, "bad.weight": bad})
    with open_source(path) as source:
        wanted = [
            Wanted(
                Step("denoiser", key, key, Assignment(key, (8, 256), (Piece(key, 0, 8),)),
                     Decision("q4_k", ""), "q4_k", (), 0),
                ("q4_k", "q8_0", "f32"),
            )
            for key in ("big.weight", "bad.weight")
        ]  # fmt: skip
        found = from_weights(bind(source), wanted, architecture="", source="").errors
    assert found["big.weight"].keys() == {"f32"}
    assert found["bad.weight"] == {"f32": 0.0}


def test_what_was_measured_is_kept_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))
    assert keep_sensitivity(ONE)
    found = find_sensitivity(tmp_path / "model.safetensors", ONE.source)
    assert found == (cache_path(ONE.source), ONE)
    assert not keep_sensitivity(replace(ONE, source=""))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "file" / "below"))
    assert not keep_sensitivity(ONE)  # said in the log, no error


def test_what_knows_fewer_formats_does_not_replace_what_knows_more(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))
    assert keep_sensitivity(ONE)
    assert not keep_sensitivity(replace(ONE, errors={"x.weight": {"q4_k": 0.25}}))
    assert find_sensitivity(tmp_path / "model.safetensors", ONE.source)[1] == ONE
    more = {"x.weight": {"q4_k": 0.25, "q8_0": 0, "q6_k": 0.1}}
    assert keep_sensitivity(replace(ONE, errors=more))


def test_an_error_that_no_picture_has_is_refused(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(GOOD | {"errors": {"x.weight": {"q4_k": 1e31}}}))
    with pytest.raises(MalformedFile, match="expected a finite number"):
        read_sensitivity(path)
