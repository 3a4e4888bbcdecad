"""The page driven in headless Chromium: layout, slider, choices, sorting, and no complaint."""

import sys
from dataclasses import replace

import pytest
from headless import CHROMIUM, Browser
from made_comparison import HOSTILE, MADE, ROWS, drawn, with_rows

from diffquant.publish.compare_page import render_comparison, render_comparisons

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or sys.platform == "win32", reason="no chromium here, or no pipes to drive it"
)

SPLIT = "document.querySelector('.stage').style.getPropertyValue('--split')"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    render_comparison(MADE, drawn(), path)
    return path


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """Two models, one of them with names that are long, hostile, or both."""
    rows = tuple(
        replace(one, name=f"{one.name}{HOSTILE}{'x' * 200}", type=HOSTILE, stored="y" * 300,
                problems=("z" * 300,))
        for one in ROWS
    )  # fmt: skip
    bad = with_rows(*rows, prompts=(HOSTILE * 3, "w" * 300), reference=HOSTILE * 2)
    path = tmp_path_factory.mktemp("wild") / "page.html"
    render_comparisons(((MADE, drawn()), (bad, drawn(bad))), path, title="t" * 300)
    return path


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
@pytest.mark.parametrize("script", [True, False])
def test_the_page_never_scrolls_sideways(browser, made, wild, width, script):
    for path in (made, wild):
        browser.open(path, width=width, touch=width < 700, script=script)
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.js(OVERFLOW) <= 0
        assert browser.js("document.documentElement.classList.contains('js')") is script
        assert browser.complaints == []


def test_nothing_moves_after_the_page_is_shown(browser, made):
    browser.open(made, width=360, touch=True)
    shift = (
        "new Promise(done => { let sum = 0; new PerformanceObserver(list => { for (const one of "
        "list.getEntries()) sum += one.value; }).observe({type: 'layout-shift', buffered: true}); "
        "setTimeout(() => done(sum), 300); })"
    )
    found = browser.call(
        "Runtime.evaluate", expression=shift, awaitPromise=True, returnByValue=True
    )
    assert found["result"]["value"] < 0.01


def test_the_slider_obeys_the_keyboard(browser, made):
    browser.open(made)
    assert browser.js(SPLIT) == "50%"
    browser.js("document.querySelector('.viewer input[type=range]').focus()")
    for _ in range(3):
        browser.key("ArrowRight")
    assert browser.js(SPLIT) == "53%"
    browser.key("ArrowLeft")
    assert browser.js(SPLIT) == "52%"
    said = browser.js("document.activeElement.getAttribute('aria-valuetext')")
    assert said == "52% reference, 48% tiny-q4_0.gguf"
    assert browser.complaints == []


def test_the_slider_obeys_the_mouse(browser, made):
    browser.open(made)
    x, y = browser.centre(".stage", 0.25)
    browser.mouse("mouseMoved", x, y)
    assert browser.js(SPLIT) == "50%"
    browser.mouse("mousePressed", x, y, 1)
    assert browser.js(SPLIT) == "25%"
    further, _ = browser.centre(".stage", 0.75)
    browser.mouse("mouseMoved", further, y, 1)
    assert browser.js(SPLIT) == "75%"
    assert browser.js("document.querySelector('.viewer input[type=range]').value") == "75"
    browser.mouse("mouseReleased", further, y)
    browser.mouse("mouseMoved", x, y)
    assert browser.js(SPLIT) == "75%"


def test_the_slider_obeys_a_finger_and_the_page_still_scrolls(browser, made):
    browser.open(made, width=360, touch=True)
    x, y = browser.centre(".stage", 0.3)
    further, _ = browser.centre(".stage", 0.8)
    browser.touch([(x, y), (x + 20, y), (further, y)])
    assert abs(int(browser.js(SPLIT)[:-1]) - 80) <= 1
    assert browser.js("getComputedStyle(document.querySelector('.stage')).touchAction") == "pan-y"


def choose(browser, selector, value):
    browser.js(
        f"(() => {{ const s = document.querySelector('{selector}'); s.value = '{value}';"
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_file_prompt_and_difference_choose_the_picture(browser, made):
    browser.open(made)
    source = "document.querySelector('.stage .{}').src"
    of = 'document.querySelector(\'figure[data-row="{}"][data-pair="{}"] .{}\').src'
    assert browser.js(source.format("right")) == browser.js(of.format(4, 0, "shot"))
    choose(browser, "[data-viewer] [data-row]", 6)
    choose(browser, "[data-viewer] [data-pair]", 1)
    assert browser.js(source.format("right")) == browser.js(of.format(6, 1, "shot"))
    exact = "document.querySelector('figure:not([data-row])[data-pair=\"1\"] .shot').src"
    assert browser.js(source.format("left")) == browser.js(exact)
    browser.click("[data-heat]")
    assert browser.js(source.format("right")) == browser.js(of.format(6, 1, "heat"))
    assert "difference of control" in browser.js("document.querySelector('.stage .right').alt")
    facts = browser.js("document.querySelector('[data-facts]').textContent")
    assert facts == "control (must fail)\nPSNR 7.5 dB\nFLIP 0.9000"
    browser.click("[data-heat]")
    browser.click('figure[data-row="1"][data-pair="0"] a')
    assert browser.js(source.format("right")) == browser.js(of.format(1, 0, "shot"))
    assert browser.complaints == []


def test_the_sheet_shows_differences_even_without_script(browser, made):
    browser.open(made, script=False)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    seen = "getComputedStyle(document.querySelector('figure[data-row=\"1\"] .{}')).display"
    assert (browser.js(seen.format("shot")), browser.js(seen.format("heat"))) == ("block", "none")
    browser.click(".show-heat")
    assert (browser.js(seen.format("shot")), browser.js(seen.format("heat"))) == ("none", "block")
    assert browser.js("document.querySelector('.viewer').offsetHeight") == 0
    assert browser.js("[...document.querySelectorAll('.panel')].every(p => p.offsetHeight > 0)")


def test_zoom_shows_pixels_inside_its_own_box(browser, made):
    browser.open(made, width=360, touch=True)
    wide = "document.querySelector('.stage').offsetWidth"
    assert browser.js(wide) == 328  # the whole width of the text
    choose(browser, "[data-zoom]", 1)
    assert browser.js(wide) == 32
    choose(browser, "[data-zoom]", 8)
    assert browser.js(wide) == 256
    rendering = "getComputedStyle(document.querySelector('.stage .right')).imageRendering"
    assert browser.js(rendering) == "pixelated"
    assert browser.js(OVERFLOW) <= 0


def order(browser):
    return browser.js(
        "[...document.querySelectorAll('[data-sortable] tbody th')].map(t => t.dataset.key)"
    )[1:]


def test_columns_sort_by_click_and_by_keyboard(browser, made):
    browser.open(made)
    start = order(browser)
    assert start == [one.name for one in ROWS]
    browser.click("[data-sortable] th:nth-child(5) button")  # PSNR, identical is infinite
    by_psnr = ["control", "tiny-q4_0.gguf", "tiny-nf4.gguf", "tiny-q4_k_s.gguf", "tiny-q8_0.gguf",
               "noise floor", "tiny-f32.gguf"]  # fmt: skip
    assert order(browser) == by_psnr
    head = "document.querySelector('[data-sortable] th:nth-child(5)').getAttribute('aria-sort')"
    assert browser.js(head) == "ascending"
    browser.js("document.querySelector('[data-sortable] th:nth-child(5) button').focus()")
    browser.key("Enter")
    assert order(browser) == by_psnr[::-1]
    assert browser.js(head) == "descending"
    browser.click("[data-sortable] th:nth-child(3) button")  # size, rows without one stay last
    assert order(browser)[:2] == ["tiny-q4_0.gguf", "tiny-q4_k_s.gguf"]
    assert set(order(browser)[-2:]) == {"noise floor", "control"}
    assert "Sorted by Size, ascending." in browser.js(
        "document.querySelector('[data-sorted]').textContent"
    )
    assert browser.complaints == []


def test_plots_and_layers_follow_their_choice(browser, made):
    browser.open(made)
    shown = (
        "[...document.querySelectorAll('[data-choices]')].map(group => "
        "[...group.querySelectorAll(':scope > .panel')].flatMap((p, at) => "
        "p.offsetHeight > 0 ? [at] : []))"
    )
    assert browser.js(shown) == [[0], [4]]
    browser.js(
        "(() => { const s = document.querySelector('[data-choices] select'); s.selectedIndex = 1;"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.js(shown) == [[1], [4]]


def test_weights_are_named_under_the_pointer_and_by_keyboard(browser, made):
    browser.open(made)
    told = "document.querySelector('.panel[data-layers]:not(.other) .walk p').textContent"
    assert browser.js(told).startswith("blocks.4.attn.weight: q4_0")
    browser.js("document.querySelector('.panel[data-layers]:not(.other) .walk input').focus()")
    browser.key("ArrowLeft")
    assert browser.js(told).startswith("blocks.3.attn.weight: q4_0")
    x, y = browser.centre(".panel[data-layers]:not(.other) .chart > svg", 0.02, 0.9)
    browser.mouse("mouseMoved", x, y)
    assert browser.js(told).startswith("img_in.weight: bf16, error 0.0000")
    assert browser.complaints == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_light_and_dark(browser, made, dark):
    browser.open(made, dark=dark)
    contrast = """(() => {
      const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number)
        .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e)
        .backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
      let least = 99;
      for (const e of document.querySelectorAll('body *')) {
        const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!text || !e.offsetHeight) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((p, q) => q - p);
        least = Math.min(least, (a + 0.05) / (b + 0.05));
      } return least; })()"""
    assert browser.js(contrast) >= 4.5


def test_print_has_the_whole_table_and_no_controls(browser, made):
    browser.open(made, width=1047)  # A4 landscape between its margins, at 96 dots an inch
    browser.call("Emulation.setEmulatedMedia", media="print")
    wide = "document.querySelector('[data-sortable]').getBoundingClientRect().right"
    assert browser.js(wide) <= 1047
    assert browser.js("document.querySelector('.viewer').offsetHeight") == 0
    assert browser.js("document.querySelector('figure img').offsetHeight") > 0
    browser.call("Emulation.setEmulatedMedia", media="")
