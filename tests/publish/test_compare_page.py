import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made_comparison import HOSTILE, MADE, ROWS, drawn, with_rows

from diffquant.core.errors import UsageError
from diffquant.publish.compare_page import render_comparison, render_comparisons
from diffquant.publish.meanings import METRIC_MEANINGS
from diffquant.runtime.comparison import METRICS, ComparisonPictures, LayerError, Value

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Tree(HTMLParser):
    """Every tag with its attributes, every text; fails on tags that do not pair up."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def page(tmp_path, comparison=MADE, pictures=None, name="page.html", **options):
    path = tmp_path / name
    render_comparison(comparison, pictures or drawn(comparison), path, **options)
    return path.read_text(encoding="utf-8")


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def bodies(text):
    table = text[text.index("data-sortable") : text.index("</table>")]
    return [words(one) for one in re.findall(r"<tbody.*?</tbody>", table, re.DOTALL)]


def test_the_headline_names_the_smallest_file_that_passes(tmp_path):
    text = words(page(tmp_path))
    said = "The smallest file that passes is tiny-nf4.gguf: 1.29 MiB, 17% of the reference, PSNR"
    assert f"{said} 26.0 dB." in text
    failed = with_rows(*(replace(one, verdict="fail") for one in ROWS[:5]))
    assert "No file passes." in words(page(tmp_path, failed))
    unjudged = with_rows(*(replace(one, verdict="") for one in ROWS[:5]))
    assert "nothing is judged" in words(page(tmp_path, unjudged))


def test_verdicts_are_told_by_word_and_sign(tmp_path):
    cards = re.search(r'<ul class="cards".*?</ul>', page(tmp_path), re.DOTALL)[0]
    found = [words(one) for one in re.findall(r"<li>.*?</li>", cards, re.DOTALL)]
    assert len(found) == 5
    for said, row, verdict in zip(found, ROWS, ["✓", "✓", "!", "✓", "✗"], strict=False):
        assert row.name in said
        assert f"{verdict} {row.verdict}" in said
        assert "bits" in said
    assert "identical pictures" in found[0]
    assert "PSNR 44.0 dB" in found[1]


def test_the_table_has_every_row_with_its_measurements(tmp_path):
    reference, *rows = bodies(page(tmp_path))
    assert "tiny" in reference
    assert len(rows) == len(ROWS)
    for row, said in zip(ROWS, rows, strict=True):
        assert row.name in said
        assert row.stored in said
        assert "1.25" in said
        assert "missing" in said
    assert "identical" in rows[0]
    assert "44.0 42.0 to 47.0 worst 40.0" in rows[1]
    assert "MIXED: small rows" in rows[2]
    assert "limit" in rows[5]
    assert "must fail" in rows[6]


def test_missing_metrics_keep_their_column_and_say_why(tmp_path):
    text = page(tmp_path)
    assert "LPIPS" in re.search(r"<thead>.*?</thead>", text, re.DOTALL)[0]
    assert "LPIPS is missing: no weights of AlexNet" in words(text)
    assert "Not measured here: latent error, peak memory." in words(text)


def test_tags_balance_and_nothing_is_loaded_from_elsewhere(tmp_path):
    text = page(tmp_path)
    tree = Tree(text)
    assert not re.search(r"https?://|@import|url\(", text)
    for tag, attrs in tree.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attrs.get(name, "#").startswith(("data:image/webp;base64,", "#"))
    policy = next(a["content"] for a in tree.named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_every_picture_is_there_once_and_named(tmp_path):
    images = [one for one in Tree(page(tmp_path)).named("img") if "src" in one]
    assert len(images) == 2 * (1 + 2 * len(ROWS))
    assert len({one["src"] for one in images if one["class"] == "shot"}) >= 2 * 7
    for one in images:
        assert one["alt"]
        assert (one["width"], one["height"]) == ("32", "32")


def test_names_for_a_screen_reader_are_there(tmp_path):
    tree = Tree(page(tmp_path))
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(one.get("aria-label") for one in tree.named("input") if one["type"] == "range")
    assert all(one.get("aria-labelledby", "").strip() in ids for one in tree.named("section"))
    charts = [one for one in tree.named("svg") if one.get("role") == "img"]
    assert charts
    assert all(one["aria-label"] for one in charts)


def test_layers_have_a_dot_and_a_line_of_the_table_each(tmp_path):
    text = page(tmp_path)
    panels = text.split("data-layers>")[1:]
    assert len(panels) == 5
    for row, panel in zip(ROWS, panels, strict=False):
        assert panel.count("<use class=") == len(row.layers)
        assert [one.key for one in row.layers] == re.findall(
            r'<th scope="row" class="any">(.*?)</th>', panel.split("All ")[1]
        )


def test_how_it_was_made_is_told(tmp_path):
    text = words(page(tmp_path))
    assert "Gates PSNR at least 25 dB, weight error at most 0.5" in text
    for said in ("a red circle a star", "Steps 12", "Guidance 3", "Picture size 32×32"):
        assert said in text


def test_every_metric_has_a_meaning_and_those_shown_are_explained(tmp_path):
    assert METRIC_MEANINGS.keys() == METRICS.keys()
    text = page(tmp_path)
    for name in MADE.metrics:
        assert METRIC_MEANINGS[name] in text
        assert METRICS[name].source in text
    assert METRIC_MEANINGS["clip"] not in text


def hostile():
    layer = LayerError(HOSTILE, HOSTILE, HOSTILE, 0.5)
    rows = tuple(
        replace(
            one,
            name=f"{one.name}{HOSTILE}",
            type=HOSTILE,
            verdict=HOSTILE,
            stored=HOSTILE,
            problems=(HOSTILE,),
            layers=(layer,) if one.layers else (),
            pairs=tuple(replace(pair, defects=(HOSTILE,)) for pair in one.pairs),
        )
        for one in ROWS
    )
    texts = ("reference", "architecture", "variant", "part", "engine", "device", "dtype", "tool")
    return with_rows(
        *rows,
        **dict.fromkeys((*texts, "synthetic"), HOSTILE),
        prompts=(HOSTILE, HOSTILE + "2"),
        missing={"lpips": HOSTILE},
        warnings=(HOSTILE,),
        gates={HOSTILE: 1.0},
    )


def test_hostile_strings_stay_text(tmp_path):
    plain = Tree(page(tmp_path))
    text = page(tmp_path, hostile(), title=HOSTILE, name="bad.html", picture_limit=60_000)
    tree = Tree(text)
    assert len(tree.named("script")) == 1
    assert len(tree.named("img")) <= len(plain.named("img"))
    assert not any(name.startswith("on") for _, attrs in tree.tags for name in attrs)
    assert "<script>alert" not in text
    assert HOSTILE in tree.texts


def test_names_that_are_no_unicode_do_not_stop_the_page(tmp_path):
    assert r"na\udc80me" in page(tmp_path, replace(MADE, reference="na\udc80me"))


def test_control_characters_stand_as_escapes(tmp_path):
    told = {"reference": "gpj\u202egguf", "prompts": ("red\ncircle\x1b[31m", "blue")}
    text = page(tmp_path, replace(MADE, **told), title="a\u2028b")
    assert not set(text) & set("\u202e\u2028\x1b")
    assert r"gpj\u202egguf" in text
    assert "red\ncircle" in text


def test_bytes_depend_on_the_arguments_only(tmp_path):
    assert page(tmp_path, name="one.html") == page(tmp_path, name="two.html")


def test_pictures_beyond_the_limit_are_named(tmp_path):
    text = page(tmp_path, picture_limit=40_000)
    assert re.search(r"\d+ of 16 pictures are in this page", text)
    assert "Left out: of “a" in text
    assert "not embedded" in text
    Tree(text)
    assert "No picture fits into this page." in page(tmp_path, picture_limit=1)


def test_bare_comparisons_are_shown(tmp_path):
    broken = Value(math.nan, math.nan, math.nan, math.nan)
    bare = with_rows(
        replace(ROWS[1], values={"psnr": broken}, layers=(), pairs=(), nbytes=None),
        reference_nbytes=0,
        missing={},
    )
    text = page(tmp_path, bare, ComparisonPictures(drawn().reference, {}))
    Tree(text)
    assert "Pictures were not kept." in text
    assert "not finite" in text
    for head in ("Pictures", "Size against quality", "Error of every weight"):
        assert f">{head}</h3>" not in text
    Tree(page(tmp_path, with_rows(), ComparisonPictures((), {})))


def test_several_models_share_a_page(tmp_path):
    other = replace(MADE, reference="other")
    render_comparisons(((MADE, drawn()), (other, drawn())), tmp_path / "all.html", title="demo")
    tree = Tree((tmp_path / "all.html").read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {"m1", "m2"} <= set(ids)
    render_comparisons((), tmp_path / "none.html", title="demo")
    Tree((tmp_path / "none.html").read_text(encoding="utf-8"))


def test_an_unknown_metric_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown metric 'psrn'"):
        page(tmp_path, replace(MADE, metrics=("psrn",)))
    with pytest.raises(UsageError, match="does not exist, create it first"):
        page(tmp_path, name="nowhere/page.html")


def test_a_page_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "page.html").write_text("old")
    short = ComparisonPictures(drawn().reference[:1], drawn().rows)
    with pytest.raises(ValueError, match="1 pictures for 2"):
        page(tmp_path, MADE, short)
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_publishing_loads_no_torch():
    code = (
        "import sys, diffquant.publish; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
