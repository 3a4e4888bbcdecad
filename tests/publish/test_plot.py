import math
import re
from dataclasses import replace

import pytest
from made_comparison import MADE, ROWS, row, with_rows

from diffquant.publish.plot import pareto_front, plot_of
from diffquant.runtime.comparison import Value


def named(front):
    return [one.type for one in front]


def test_the_front_has_the_files_that_no_other_beats_in_both():
    assert named(pareto_front(MADE, "psnr", "size")) == ["q4_0", "q4_k_s", "q8_0", "f32"]
    flip = with_rows(*(one for one in ROWS if one.type != "f32"))
    assert named(pareto_front(flip, "flip", "size")) == ["q4_0", "q4_k_s", "q8_0"]


def test_the_front_keeps_equals_and_drops_what_is_larger_and_no_better():
    twin = replace(ROWS[1], name="twin")
    worse = replace(ROWS[1], name="worse", nbytes=ROWS[1].nbytes + 1)
    assert [one.name for one in pareto_front(with_rows(ROWS[1], twin, worse), "psnr", "size")] == [
        ROWS[1].name,
        "twin",
    ]


def test_the_front_is_what_comparing_every_pair_gives():
    sizes = [(7 * n) % 11 + 1 for n in range(40)]
    values = [float((13 * n) % 17) for n in range(40)]
    rows = [
        row(f"t{n}", s, v, 0.1, name=f"{n}")
        for n, (s, v) in enumerate(zip(sizes, values, strict=True))
    ]
    found = {int(one.name) for one in pareto_front(with_rows(*rows), "psnr", "size")}
    for n in range(40):
        beaten = any(
            sizes[m] <= sizes[n] and values[m] >= values[n]
            and (sizes[m], values[m]) != (sizes[n], values[n])
            for m in range(40)
        )  # fmt: skip
        assert (n in found) is not beaten


@pytest.mark.parametrize("width", [340, 760])
@pytest.mark.parametrize(("metric", "axis"), [("psnr", "size"), ("flip", "size"), ("psnr", "bits")])
def test_up_is_nearer_right_is_larger_and_everything_stays_inside(width, metric, axis):
    plot = plot_of(MADE, metric, axis, width=width, height=300)
    marks = {mark.label: mark for mark in plot.marks}
    assert marks["q8_0"].y < marks["q4_k_s"].y < marks["q4_0"].y
    assert marks["q4_0"].x < marks["q4_k_s"].x < marks["q8_0"].x
    assert len(plot.x_ticks) >= 2
    assert 3 <= len(plot.y_ticks) <= 8
    for mark in plot.marks:
        assert plot.left < mark.x < plot.right
        assert 0 < mark.y <= plot.bottom
        assert mark.label_at is not None
        assert plot.left <= mark.label_at[0] < width
    for line in plot.lines:
        assert plot.top - 1 <= line.y <= plot.bottom + 1
    assert abs(plot.lines[0].text_y - plot.lines[1].text_y) >= 13
    ticks = [float(tick.text) for tick in plot.y_ticks]
    assert ticks == sorted(ticks)
    ys = [tick.at for tick in plot.y_ticks]
    assert ys == sorted(ys, reverse=metric == "psnr")


def test_identical_pictures_sit_on_a_rail_where_psnr_has_no_value():
    plot = plot_of(MADE, "psnr", "size", width=760, height=330)
    assert plot.marks[0].y == plot.rail_y < plot.top
    assert "identical" in plot.marks[0].title
    assert plot_of(MADE, "flip", "size", width=760, height=330).rail_y is None


def test_floor_and_control_are_lines_and_far_ones_are_named_at_the_edge():
    plot = plot_of(MADE, "psnr", "size", width=760, height=330)
    assert [line.text for line in plot.lines] == ["noise floor 50.0 dB", "control 7.5 dB"]
    far = replace(ROWS[6], values={"psnr": Value(-900.0)})
    lines = plot_of(with_rows(*ROWS[:6], far), "psnr", "size", width=760, height=330).lines
    assert [line.beyond for line in lines] == ["", "below"]
    assert lines[1].text == "control -900.0 dB, below the scale"


def test_the_front_is_drawn_as_stairs_over_its_marks():
    plot = plot_of(MADE, "psnr", "size", width=760, height=330)
    assert plot.front == tuple(f"tiny-{name}.gguf" for name in ("q4_0", "q4_k_s", "q8_0", "f32"))
    marks = {mark.label: mark for mark in plot.marks}
    stairs = re.findall(r"H([\d.]+)V([\d.]+)", plot.front_path)
    expected = [marks[name] for name in ("q4_k_s", "q8_0", "f32")]
    assert [(float(x), float(y)) for x, y in stairs] == [(mark.x, mark.y) for mark in expected]


def test_what_is_not_finite_or_has_no_size_is_left_out():
    bad = with_rows(row("a", 10, math.nan, 0.1), row("b", 0, 20.0, 0.1))
    assert plot_of(bad, "psnr", "size", width=340, height=300) is None
    assert plot_of(MADE, "lpips", "size", width=340, height=300) is None


def test_labels_that_find_no_room_are_left_out_and_long_ones_cut():
    same = [row(f"t{n}", 1000, 30.0, 0.1, name=f"{n}") for n in range(30)]
    plot = plot_of(with_rows(*same), "psnr", "size", width=340, height=300)
    assert {mark.x for mark in plot.marks} == {plot.marks[0].x}
    assert any(mark.label_at is None for mark in plot.marks)
    long = plot_of(with_rows(row("x" * 99, 1000, 30.0, 0.1)), "psnr", "size", width=340, height=300)
    assert len(long.marks[0].label) == 22
