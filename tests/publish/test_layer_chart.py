import math
from dataclasses import replace

from made_comparison import MADE, ROWS

from diffquant.publish.layer_chart import HEIGHT, layer_chart, stored_formats
from diffquant.runtime.comparison import LayerError


def chart_of(row=ROWS[1]):
    return layer_chart(row, stored_formats(MADE))


def test_dots_stand_in_file_order_and_higher_where_the_error_is_larger():
    chart = chart_of()
    assert [dot.layer for dot in chart.dots] == list(ROWS[1].layers)
    xs = [dot.x for dot in chart.dots]
    assert xs == sorted(xs)
    assert 0 < xs[0] < xs[-1] < 100
    ys = [dot.y for dot in chart.dots[1:6]]
    assert ys == sorted(ys, reverse=True)
    assert all(0 < dot.y < HEIGHT for dot in chart.dots)
    assert chart.ticks[0] == (chart.dots[0].y, "0.000")


def test_a_dot_lies_where_the_ticks_say():
    chart = chart_of()
    (low, first), (high, last) = chart.ticks[0], chart.ticks[-1]
    for dot in chart.dots:
        share = (low - dot.y) / (low - high)
        found = float(first) + share * (float(last) - float(first))
        assert abs(found - dot.layer.error) < 1e-3 * float(last)
    assert float(last) >= max(layer.error for layer in ROWS[1].layers)
    assert len(chart.ticks) <= 6


def test_the_worst_three_are_ranked_and_exact_weights_are_not():
    assert [dot.layer.key for dot in chart_of().worst] == [
        f"blocks.{n}.attn.weight" for n in (4, 3, 2)
    ]
    exact = replace(ROWS[1], layers=tuple(replace(one, error=0.0) for one in ROWS[1].layers))
    assert chart_of(exact).worst == ()


def test_what_is_not_finite_is_worst_and_sits_on_the_rail():
    broken = LayerError("broken.weight", "denoiser", "bf16", math.nan)
    chart = chart_of(replace(ROWS[1], layers=(*ROWS[1].layers, broken)))
    assert chart.dots[-1].y == chart.rail_y
    assert chart.worst[0].layer is broken
    assert "not finite" in chart.worst[0].text
    alone = chart_of(replace(ROWS[1], layers=(broken,)))
    assert alone.dots[0].y == alone.rail_y


def test_formats_keep_their_index_from_file_to_file():
    formats = stored_formats(MADE)
    assert formats == ("bf16", "f32", "q8_0", "q4_k_s", "nf4", "q4_0")
    for row in ROWS[1:5]:
        shown = {name: at for at, name, _ in chart_of(row).formats}
        assert shown == {name: formats.index(name) for name in ("bf16", row.type, "f32")}
        assert sum(count for *_, count in chart_of(row).formats) == len(row.layers)


def test_neighbours_with_one_leading_name_are_a_band():
    bands = chart_of().bands
    assert [band.label for band in bands] == ["img_in", "blocks", "final"]
    assert abs(sum(band.width for band in bands) - 98) < 0.1


def test_a_file_whose_weights_were_not_compared_has_no_chart():
    assert chart_of(ROWS[5]) is None
