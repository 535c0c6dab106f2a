"""The report of a real run as Chromium shows it: on a telephone, on a desk, in the dark and on paper."""

import base64

import pytest
from browser.chromium import Chromium
from support.finished_run import finished_run

from fedfuse_simulations.report import read_metrics, write_report
from fedfuse_simulations.session import audit

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]

# Elements that stick out of the page, other than inside a region that scrolls by itself.
STICKING_OUT = """
[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll *') && !e.closest('svg'))
  .filter(e => { const b = e.getBoundingClientRect(); return b.right > innerWidth + .5 || b.left < -.5; })
  .map(e => e.outerHTML.slice(0, 120))
"""
# Chart texts: size on the screen, whether they leave their chart, and pairs that cover one another.
CHART_TEXTS = """
[...document.querySelectorAll('svg.chart')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => t.getBoundingClientRect());
  const scale = frame.width / svg.viewBox.baseVal.width;
  const covered = [];
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 1 && y > 4) covered.push([texts[i].textContent, texts[i + 1 + j].textContent]);
  }));
  return {
    smallest: Math.min(...texts.map(t => parseFloat(getComputedStyle(t).fontSize) * scale)),
    outside: boxes.flatMap((b, i) => b.left < frame.left - 1 || b.right > frame.right + 1
      || b.top < frame.top - 1 || b.bottom > frame.bottom + 1 ? [texts[i].textContent] : []),
    covered: covered,
    colours: [...new Set(texts.map(t => getComputedStyle(t).fill))],
    fonts: [...new Set(texts.map(t => getComputedStyle(t).fontFamily))],
  };
})
"""
COLOURS = "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    home = finished_run(tmp_path_factory.mktemp("page"))
    return write_report(home, read_metrics(home), audit(home))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


def complaints(chromium):
    """Return everything the browser complained of since the page was opened."""
    return [
        *chromium.told("Runtime.consoleAPICalled"),
        *chromium.told("Runtime.exceptionThrown"),
        *chromium.told("Log.entryAdded"),
        *chromium.told("Network.loadingFailed"),
    ]


def asked_for(chromium):
    return [told["request"]["url"] for told in chromium.told("Network.requestWillBeSent")]


def test_the_eyes_of_these_tests_are_open(chromium, tmp_path):
    """A page with every fault looked for: each is seen."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><div style='width: 2000px'>wide</div>"
        "<svg class=chart viewBox='0 0 800 100' width=200><text x=10 y=50>one</text><text x=12 y=50>two</text>"
        "<text x=790 y=50>outside</text></svg><img src=missing.png><script>console.error('no'); undefined_name()"
        "</script>"
    )
    chromium.open(page, width=390)
    assert chromium.evaluate("document.documentElement.scrollWidth") > 390
    assert any("wide" in element for element in chromium.evaluate(STICKING_OUT))
    (chart,) = chromium.evaluate(CHART_TEXTS)
    assert chart["outside"] == ["outside"]
    assert chart["covered"] == [["one", "two"]]
    assert chart["smallest"] < 8
    assert len(complaints(chromium)) >= 3
    assert any(url.endswith("missing.png") for url in asked_for(chromium))


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_it_fits_and_nobody_complains(chromium, report, tmp_path, width, scheme):
    chromium.open(report, width=width, scheme=scheme)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(STICKING_OUT) == []
    image = chromium.screenshot(tmp_path / f"report-{width}-{scheme}.png")
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") in range(width - 20, width + 1)
    assert complaints(chromium) == []
    assert asked_for(chromium) == [report.as_uri()]


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_charts_can_be_read(chromium, report, width, scheme):
    chromium.open(report, width=width, scheme=scheme)
    ground, ink = chromium.evaluate(COLOURS)
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    charts = chromium.evaluate(CHART_TEXTS)
    assert len(charts) == 4
    for chart in charts:
        assert chart["smallest"] >= 9
        assert chart["outside"] == []
        assert chart["covered"] == []
        assert chart["colours"] == [ink]
        assert "DejaVu Sans" not in chart["fonts"][0]


@pytest.mark.parametrize("width", [390, 1280])
def test_tables_that_are_too_wide_scroll_by_themselves(chromium, report, width):
    chromium.open(report, width=width)
    boxes = chromium.evaluate(
        "[...document.querySelectorAll('table')].map(t => !!t.closest('.scroll[tabindex=\"0\"]'))"
    )
    assert len(boxes) >= 6
    assert all(boxes)


def test_on_paper_it_is_black_on_white_even_from_a_dark_screen(chromium, report):
    chromium.open(report, width=1280, scheme="dark", media="print")
    assert chromium.evaluate(COLOURS) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert chromium.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    paper = base64.b64decode(chromium.call("Page.printToPDF")["data"])
    assert paper.startswith(b"%PDF-")
    assert len(paper) > 20_000
