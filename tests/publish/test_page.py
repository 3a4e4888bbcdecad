import base64
import io
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffquant.publish.page import HEAT_FULL, ModelPictures, heat_map, render_page
from diffquant.publish.plot import plot_of
from diffquant.publish.rows import DemoModel, DemoRow

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "</script></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


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


def row(kind, nbytes, psnr_db, **changes):
    values = {
        "type": kind,
        "path": f"demo-out/{kind}.gguf",
        "nbytes": nbytes,
        "bits_per_weight": 4.5,
        "weight_error": 0.0123,
        "psnr_db": psnr_db,
        "identical": False,
        "ssim": 0.9876,
        "prompt_score": 0.75,
        "control_psnr_db": 11.5,
        "noise_floor_psnr_db": 50.0,
        "seconds": 2.25,
        "verdict": "pass",
        "stored": "q5_0 61%, q4_k 39%",
    }
    return DemoRow(**{**values, **changes})


ROWS = (
    row("f32", 8_000_000, None, identical=True),
    row("q8_0", 2_200_000, 44.0),
    row("q4_k_s", 1_300_000, 28.0, verdict="warn", note="MIXED: small rows"),
    row("q4_0", 1_200_000, 19.0, verdict="fail"),
    row("nf4", 1_250_000, None, verdict="not image-verified", ssim=None, control_psnr_db=None),
)
MODEL = DemoModel(
    "tiny", "sd15", "examples/tiny", 8_100_000, ("a red circle", "a star"), ROWS, 0.95, 50.0
)


def pictures(model=MODEL, side=32):
    rng = np.random.default_rng(0)
    exact = [rng.random((side, side, 3), np.float32) for _ in model.prompts]
    other = {r.type: [np.clip(p + 0.1, 0, 1) for p in exact] for r in model.rows}
    return ModelPictures(exact, other)


def page(tmp_path, models=(MODEL,), shown=None, name="page.html"):
    path = tmp_path / name
    shown = {m.name: pictures(m) for m in models} if shown is None else shown
    render_page(models, shown, path)
    return path.read_text(encoding="utf-8")


def test_the_table_has_every_row_with_its_measurements_and_verdict(tmp_path):
    text = page(tmp_path)
    rows = re.findall(r"<tbody.*?</tbody>", text, re.DOTALL)
    assert len(rows) == 1 + len(ROWS)
    words = [re.sub(r"<[^>]*>", " ", r) for r in rows]
    assert "original" in words[0]
    assert "0.95" in words[0]
    for expected, found in zip(ROWS, words[1:], strict=True):
        for part in (expected.type, expected.verdict, expected.path, expected.stored):
            assert part in found
        assert ("0.0123" in found, "0.75" in found, "2.2 s" in found) == (True, True, True)
    assert "identical" in words[1]
    assert "44.0 dB" in words[2]
    assert "MIXED: small rows" in words[3]


def test_tags_balance_and_nothing_is_loaded_from_elsewhere(tmp_path):
    text = page(tmp_path)
    tree = Tree(text)
    assert not re.search(r"https?://|@import|url\((?!data:image/png;base64,)", text)
    for tag, attrs in tree.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attrs.get(name, "#").startswith(("data:image/png;base64,", "#"))
    policy = next(a["content"] for a in tree.named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_every_picture_is_there_with_a_difference_and_a_labelled_slider(tmp_path):
    tree = Tree(page(tmp_path))
    images = tree.named("img")
    assert len(images) == 2 * len(ROWS) * len(MODEL.prompts)
    assert all(attrs["alt"] for attrs in images)
    with Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2]))) as image:
        assert image.size == (32, 32)
    sliders = tree.named("input")
    assert len(sliders) == len(ROWS)
    assert all(s["type"] == "range" and s["aria-label"] for s in sliders)
    assert {s["id"] for s in sliders} == {label["for"] for label in tree.named("label")}
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_type_furthest_from_the_original_is_open_at_first(tmp_path):
    opened = ["open" in attrs for attrs in Tree(page(tmp_path)).named("details")]
    assert opened == [False, False, False, True, False]


def test_hostile_strings_stay_text(tmp_path):
    plain = Tree(page(tmp_path))
    bad = replace(
        MODEL,
        name=HOSTILE,
        architecture=HOSTILE,
        source=HOSTILE,
        prompts=(HOSTILE, HOSTILE),
        rows=tuple(
            replace(r, type=f"{r.type}{HOSTILE}", path=HOSTILE, verdict=HOSTILE, stored=HOSTILE)
            for r in ROWS
        ),
    )
    text = page(tmp_path, (bad,))
    tree = Tree(text)
    assert len(tree.named("script")) == 1
    assert len(tree.named("img")) == len(plain.named("img"))
    assert not any(name.startswith("on") for _, attrs in tree.tags for name in attrs)
    assert "<script>alert" not in text
    assert HOSTILE in tree.texts


def test_names_that_are_no_unicode_do_not_stop_the_page(tmp_path):
    assert "na?me" in page(tmp_path, (replace(MODEL, name="na\udc80me"),))


def test_bytes_depend_on_the_arguments_only(tmp_path):
    assert page(tmp_path, name="one.html") == page(tmp_path, name="two.html")


def test_models_without_pictures_or_measurements_are_shown(tmp_path):
    bare = replace(
        MODEL,
        name="bare",
        rows=(replace(ROWS[4], weight_error=math.nan),),
        reference_score=None,
        noise_floor_psnr_db=None,
    )
    text = page(tmp_path, (MODEL, bare), {"tiny": pictures()})
    assert len(Tree(text).named("table")) == 2
    assert "not finite" in text
    assert text.count("<h3>Pictures</h3>") == text.count("<h3>Size against PSNR</h3>") == 1
    Tree(page(tmp_path, (), {}))


def test_a_picture_too_few_is_refused(tmp_path):
    some = pictures()
    short = ModelPictures(some.reference, {"q8_0": some.candidates["q8_0"][:1]})
    with pytest.raises(ValueError, match="tiny: q8_0 has 1 pictures for 2 prompts"):
        page(tmp_path, (MODEL,), {"tiny": short})


def test_differences_are_taken_before_rounding_and_clipped():
    exact = np.zeros((1, 4, 3), np.float32)
    other = exact.copy()
    other[0, 1, 2] = HEAT_FULL / 4
    other[0, 2, 0] = 1.0
    other[0, 3, 1] = np.nan
    image = heat_map(exact, other)
    assert np.asarray(image).tolist() == [[0, 128, 255, 255]]
    assert np.asarray(image.convert("RGB"))[0, 2].tolist() == [255, 255, 255]


@pytest.mark.parametrize("width", [340, 760])
def test_the_plot_orders_marks_and_keeps_everything_inside(width):
    plot = plot_of(MODEL, width, 300)
    assert [mark.label for mark in plot.marks] == ["f32", "q8_0", "q4_k_s", "q4_0"]
    exact, q8, q4_k, q4 = plot.marks
    assert exact.y == plot.rail_y < plot.top
    assert q8.y < q4_k.y < q4.y
    assert q4.x < q4_k.x < q8.x < exact.x
    assert q8.y > plot.floor_y
    assert len(plot.x_ticks) >= 2
    for mark in plot.marks:
        assert plot.left < mark.x < plot.right
        assert mark.y < mark.control_y <= plot.bottom
        assert mark.label_at is not None
        assert plot.left <= mark.label_at[0] < width


def test_the_plot_leaves_out_what_is_not_finite_and_survives_one_size():
    assert (
        plot_of(replace(MODEL, rows=(row("a", 10, math.nan), row("b", 0, 20.0))), 340, 300) is None
    )
    same = tuple(row(f"t{n}", 1000, 30.0, control_psnr_db=None) for n in range(30))
    plot = plot_of(replace(MODEL, rows=same, noise_floor_psnr_db=math.nan), 340, 300)
    assert plot.floor_y is None
    assert {mark.x for mark in plot.marks} == {plot.marks[0].x}
    assert any(mark.label_at is None for mark in plot.marks)


def test_publishing_loads_no_torch():
    code = (
        "import sys, diffquant.publish; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_the_page_without_complaint(tmp_path):
    page(tmp_path, (MODEL, replace(MODEL, name=HOSTILE)), {"tiny": pictures(), HOSTILE: pictures()})
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += [f"--screenshot={tmp_path / 'shot.png'}", "--window-size=800,1200"]
    url = (tmp_path / "page.html").as_uri()
    shot = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shot.stderr
    with Image.open(tmp_path / "shot.png") as image:
        assert len(image.convert("RGB").getcolors(800 * 1200)) > 100
    dump = [*command[:-2], "--dump-dom", url]
    dom = subprocess.run(dump, capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<html lang="en" class="js">' in dom
    assert "--split: 50%" in dom
