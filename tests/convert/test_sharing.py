"""What plans share: rows that are read once, cut at common borders, held between two passes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from diffquant.convert import cutting, sharing
from diffquant.convert.adapters import ROWS
from diffquant.convert.binding import bind
from diffquant.convert.dialects import own_dialect, pack
from diffquant.convert.once import reading_once
from diffquant.convert.peak import peak_nbytes, peak_together
from diffquant.convert.plan import Plan, Request, Step
from diffquant.convert.rules import Assignment, Piece
from diffquant.io import open_source
from diffquant.quant.policy import Decision

SHAPE = (256, 100)


class Same:
    """An adapter that changes nothing."""

    name, reach = "same", ROWS

    def apply(self, weight, rows):
        return weight


def plan_of(fmt, *, start=0, adapters=(), shape=SHAPE, target="w.weight"):
    assignment = Assignment(target, shape, (Piece("w.weight", start, start + shape[0]),))
    packed = pack(own_dialect(fmt), target, fmt, shape, "f32")
    nbytes = math.prod(shape) * 4
    step = Step("", target, target, assignment, Decision(fmt, ""), fmt, packed, nbytes, adapters)
    return Plan("sd15", "", Request("safetensors"), (step,))


@pytest.fixture
def logical(tmp_path, write):
    path = write(tmp_path / "w.safetensors", {"w.weight": np.ones((512, 100), np.float32)})
    with open_source(path) as source:
        yield bind(source)


def test_shared_rows_are_cut_at_borders_that_suit_every_format(monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 100 * 50)
    plans = [plan_of("nf4"), plan_of("int8_blockwise"), plan_of("f16", target="other.weight")]
    assert len(sharing.shared_steps(plans)) > 1  # each has borders of its own
    alike = sharing.cut_alike(plans)
    (group,) = sharing.shared_steps(alike)
    assert group == ((0, 0), (1, 0), (2, 0))
    cuts = {cutting.chunks_of(plan.steps[0]) for plan in alike}
    assert cuts == {((0, 128), (128, 256))}
    for plan in alike:
        own = dataclasses.replace(plan.steps[0], cut=1).row_multiple
        assert plan.steps[0].row_multiple % own == 0


def test_borders_are_a_multiple_of_every_formats_not_the_largest():
    (step,) = plan_of("f16").steps
    odd = dataclasses.replace(plan_of("f16"), steps=(dataclasses.replace(step, cut=24),))
    alike = sharing.cut_alike([plan_of("nf4"), odd])
    assert {plan.steps[0].row_multiple for plan in alike} == {48}


def test_a_plan_alone_keeps_its_borders():
    plan = plan_of("int8_blockwise")
    assert sharing.cut_alike([plan]) == (plan,)


@pytest.mark.parametrize(
    "other",
    [
        plan_of("f16", start=256),
        plan_of("f16", adapters=(Same(),)),
        plan_of("f16", shape=(128, 200)),
    ],
    ids=["rows", "adapters", "shape"],
)
def test_what_differs_is_not_shared(other):
    plans = sharing.cut_alike([plan_of("f16"), other])
    assert len(sharing.shared_steps(plans)) == 2


def test_the_same_adapters_are_shared():
    merged = (Same(),)
    plans = [plan_of("f16", adapters=merged), plan_of("bf16", adapters=merged)]
    assert len(sharing.shared_steps(plans)) == 1


def test_a_plan_that_writes_rows_twice_keeps_two_groups():
    plan = plan_of("f16")
    plan = dataclasses.replace(plan, steps=plan.steps + plan_of("f16", target="tied.weight").steps)
    groups = sharing.shared_steps([plan, plan_of("bf16")])
    assert groups == (((0, 0), (1, 0)), ((0, 1),))


def test_two_passes_read_once_while_they_can_be_held(logical, monkeypatch):
    nbytes = math.prod(SHAPE) * 4
    plans = sharing.cut_alike([plan_of("fp8_e4m3_scaled"), plan_of("f16")])
    assert sharing.rows_read(logical, plans, 2) == nbytes
    assert sharing.rows_read(logical, plans[:1], 2) == 2 * nbytes  # one output keeps a chunk only
    held = peak_together(logical, plans, 2)
    monkeypatch.setattr(sharing, "HELD_NBYTES", 3 * nbytes - 1)
    assert sharing.rows_read(logical, plans, 2) == 2 * nbytes
    assert held - peak_together(logical, plans, 2) == 3 * nbytes


def test_outputs_hardly_add_up_in_memory(logical):
    plans = sharing.cut_alike([plan_of("q8_0", shape=(256, 96)), plan_of("f16", shape=(256, 96))])
    alone = max(peak_nbytes(plan, 2) for plan in plans)
    assert peak_together(logical, plans[:1], 2) == peak_nbytes(plans[0], 2)
    assert peak_together(logical, plans, 2) == alone + (2 << 20)  # 1.4 MiB were measured


def test_a_reader_asks_the_source_once(logical, monkeypatch):
    calls, read = [], type(logical.source).read
    monkeypatch.setattr(
        type(logical.source), "read", lambda self, *a: (calls.append(a), read(self, *a))[1]
    )
    once = reading_once(logical)
    first = once.read("w.weight", (0, 7))
    assert np.array_equal(once.source.read("w.weight", (0, 7)).view("<f4").reshape(7, 100), first)
    assert np.array_equal(once.source.read("w.weight"), once.source.read("w.weight", (0, 512)))
    assert len(calls) == 2
