"""``report.html``: what it says is what the run's files say, whatever text is in them, and it needs nothing else."""

import re
import shlex
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import typer
from support.finished_run import finished_run

from fedfuse_server.home import RunHome
from fedfuse_shared.config.base import Trust
from fedfuse_shared.errors import DataError
from fedfuse_shared.ledger.log import kind_of, read_ledger
from fedfuse_shared.ledger.verification_report import Code, Finding
from fedfuse_simulations.metrics import LeftOut
from fedfuse_simulations.report import charts, read_metrics, render, write_report
from fedfuse_simulations.report.build import MATRIX, ROWS
from fedfuse_simulations.report.participation import Part, Participation, read_participation
from fedfuse_simulations.scoring import Score
from fedfuse_simulations.session import audit, run_report

pytestmark = pytest.mark.filterwarnings("ignore")
SITES = ("bern", "lyon", "oslo", "rome")
VOID = {"meta", "link", "br", "img", "input", "hr", "col", "base"}


class Page(HTMLParser):
    """Elements with their attributes and text, by tag; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def rows(self, region):
        """Return the cells' texts of the table in a named region, row by row."""
        inside, rows = False, []
        for element in self.elements:
            if element["tag"] == "div" and "aria-label" in element:
                inside = element["aria-label"] == region
            elif inside and element["tag"] == "tr":
                rows.append([])
            elif inside and element["tag"] in {"td", "th"}:
                rows[-1].append(element["text"].strip())
        return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def parts(home):
    return home, read_metrics(home), audit(home)


@pytest.fixture(scope="module")
def text(parts):
    return render(*parts)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def copied(home, folder):
    shutil.copytree(home.root, folder)
    return RunHome(folder)


# --- one file, nothing else -------------------------------------------------------------------------------
def test_the_page_names_nothing_to_load(text, page):
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    for element in page.elements:
        assert "src" not in element
        href = element.get("href", "#")
        assert href.startswith(("#", "data:,")), href
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    policy = next(e for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_there_is_no_script_in_it(page):
    assert not page.all("script")
    assert not [name for element in page.elements for name in element if name.startswith("on")]


def test_the_same_run_gives_the_same_bytes(parts, text):
    assert render(*parts) == text


def test_what_figures_refer_to_is_there_once(text, page):
    names = [element["id"] for element in page.elements if "id" in element]
    assert len(names) == len(set(names))
    told = set(re.findall(r"url\(#([^)]+)\)", text)) | {e["href"][1:] for e in page.all("use")}
    described = {e[k] for e in page.elements for k in ("aria-labelledby", "aria-describedby") if k in e}
    assert told
    assert told | described <= set(names)


# --- for everybody's eyes ---------------------------------------------------------------------------------
def test_it_can_be_read_aloud(page):
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title")[0]["text"] == "Run run · fedfuse report"
    assert all(header.get("scope") in {"row", "col"} for header in page.all("th"))
    assert len(page.all("svg")) == len(page.all("figure")) == 4
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 40
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def palettes(text):
    """Return the page's colours on light, on dark and on paper, as (red, green, blue)."""
    found = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    return [
        {k: tuple(bytes.fromhex(v)) for k, v in re.findall(r"--([a-z-]+): #([0-9a-f]{6});", block)}
        for block in found
    ]


def test_figures_have_no_colour_of_their_own(text):
    """A figure drawn in fixed black would vanish on a dark page."""
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}", drawn)
    used = set(re.findall(r"var\(--([a-z-]+)\)", text)) - {"share"}
    assert {"ink", "grid", "first", "second"} <= used
    assert len(palettes(text)) == 3
    for palette in palettes(text):
        assert used <= palette.keys()


def test_colours_are_told_apart_from_their_ground(text):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text; 1.4.11: 3 to 1 for parts of figures."""

    def light(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        dark, bright = sorted((light(one), light(other)))
        return (bright + 0.05) / (dark + 0.05)

    for palette in palettes(text):
        for ground in ("back", "panel"):
            for writing in ("ink", "muted", "bad", "good"):
                assert contrast(palette[writing], palette[ground]) >= 4.5, (writing, ground)
            for part in ("first", "second", "bad"):
                assert contrast(palette[part], palette[ground]) >= 3, (part, ground)
        darkest = [(a + b) / 2 for a, b in zip(palette["first"], palette["panel"], strict=True)]
        assert contrast(palette["ink"], darkest) >= 4.5, "a full cell of the confusion matrix"


# --- what it says -----------------------------------------------------------------------------------------
def test_scores_are_those_of_the_metrics(parts, page):
    _, metrics, _ = parts
    over = page.rows("Scores over the rounds")
    assert [row[0] for row in over[1:]] == ["1", "2", "3", "4"]
    assert over[1][1] == f"{metrics.rounds[0].scores.all_rows.accuracy:.3f}"
    assert over[4][1] == f"{metrics.final.all_rows.accuracy:.3f}"
    shown = page.rows("Scores by modalities shown")
    assert [row[0] for row in shown[1:]] == ["what each row has", "text", "image", "all"]
    assert shown[2][2] == f"{metrics.final.subsets['text'].accuracy:.3f}"
    matrix = page.rows("Confusion matrix")
    assert matrix[0][1:] == ["0", "1"]
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]] == [
        list(r) for r in metrics.final.confusion
    ]


def test_budgets_are_those_of_the_audit_never_rounded_down(parts, page):
    _, _, report = parts
    rows = page.rows("Budget of each site")[1:]
    assert [row[0] for row in rows] == list(SITES)
    for row, site in zip(rows, report.sites, strict=True):
        assert site.epsilon <= float(row[1]) < site.epsilon + 0.001
        assert float(row[2]) == site.cap == 50.0
        assert [int(row[4]), int(row[5])] == [site.reservations, site.rounds]


def test_it_says_up_to_which_head_and_against_whom(parts, text, page):
    _, _, report = parts
    said = " ".join(e["text"] for e in page.all("main")).split()
    said = " ".join(said)
    assert f"Up to head {report.leaves}, root {report.root}" in said
    assert "The ledger holds." in said
    assert "adding or removing one record" in said
    assert "delta 1e-05" in said
    assert "against everybody" in said
    assert "nothing was protected from whoever ran it" in said
    assert "Whether the records of its data folder are real or synthetic is not known here" in said


def test_who_took_part_and_why_not(page):
    assert page.rows("Rounds of each site")[1:] == [
        ["bern", "4", "0", "0", "0"],
        ["lyon", "3", "1", "0", "0"],
        ["oslo", "4", "0", "0", "0"],
        ["rome", "4", "0", "0", "0"],
    ]
    left = page.rows("Sites left out")[1:]
    assert ["2", "lyon", "train.update", "did not answer in time"] in left
    assert [row[:3] for row in left if row[0] == "3"] == [
        ["3", s, "train.keys"] for s in ("lyon", "oslo", "rome")
    ]
    aborted = page.rows("Aborted attempts")[1:]
    assert [row[:2] for row in aborted] == [["3", "1"]]
    assert "only 1 of 4 sites" in aborted[0][2]


def test_a_site_left_out_without_a_note_is_still_told(parts):
    """The server was stopped between its close and its note."""
    home, metrics, report = parts
    page = Page(render(home, metrics.model_copy(update={"left_out": ()}), report))
    assert [row[:2] for row in page.rows("Sites left out")[1:]] == [["2", "lyon"]]


def test_a_round_that_was_never_opened_is_nobodys(parts, tmp_path):
    home, _, _ = parts
    leaves = [entry.raw for entry in read_ledger(home.ledger)]
    last_close = max(i for i, raw in enumerate(leaves) if kind_of(raw) == "close")
    (tmp_path / "ledger.jsonl").write_bytes(
        b"".join(raw + b"\n" for raw in leaves[:last_close]) + b'{"no":1}\n'
    )
    seen = read_participation(tmp_path / "ledger.jsonl", (*SITES, "vaud"))
    assert seen.rounds == (1, 2, 3, 4)
    assert seen.parts["lyon"] == (Part.COUNTED, Part.LEFT_OUT, Part.COUNTED, Part.NOT_OPENED)
    assert seen.parts["vaud"] == (Part.NOT_ASKED,) * 4
    assert seen.opened == (True, True, True, False)
    assert [(a.round, a.attempt) for a in seen.aborted] == [(3, 1), (4, 1)]


@pytest.mark.slow
def test_the_command_it_gives_runs_the_same_settings_again(parts, page, capsys):
    from fedfuse_shared.cli import app

    home, _, _ = parts
    command = shlex.split(
        next(e["text"] for e in page.all("code") if e["text"].startswith("fedfuse simulate"))
    )
    app(command[1:], standalone_mode=False)
    again = RunHome(home.root.with_name("run-again"))
    assert again.load_config() == home.load_config()
    assert str(again.root / "report.html") in capsys.readouterr().out
    assert Page((again.root / "report.html").read_text()).all("svg")


# --- what it is told by others ----------------------------------------------------------------------------
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \" ' & $x_1$ \N{RIGHT-TO-LEFT OVERRIDE}"


def test_hostile_reasons_and_names_stay_text(parts, tmp_path):
    source, metrics, report = parts
    home = copied(source, tmp_path / "<script>alert(0)<\udcff")  # the last is no UTF-8 on the disk
    config = home.config.read_text().replace('"0",', '"<b onclick=alert(3)>",')
    home.config.write_text(config)
    entry = LeftOut(round=2, site="lyon", step="train.update", reason=HOSTILE)
    findings = (
        Finding(code=Code.MALFORMED, leaf=3, site="<i>", detail=HOSTILE),
        Finding(code=Code.OVER_CAP, leaf=None, site=None, detail="x"),
    )
    report = report.model_copy(update={"ok": False, "findings": findings})
    metrics = metrics.model_copy(update={"left_out": (entry,), "stopped": HOSTILE})
    text = write_report(home, metrics, report).read_text()
    page = Page(text)
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("b")
    assert not page.all("i")
    assert not [name for element in page.elements for name in element if name.startswith("on")]
    reason = page.rows("Sites left out")[1][3]
    assert reason == HOSTILE
    findings = page.rows("Findings of the audit")[1:]
    assert [row[0] for row in findings] == ["malformed", "over-cap"]
    assert findings[0][1] == "leaf 3, <i>"
    assert "2 findings" in page.all("dl")[0]["text"]
    assert "The ledger does not hold." in text
    assert "<script>alert(0)<" in page.all("h1")[0]["text"]
    assert page.rows("Confusion matrix")[0][1] == "<b onclick=alert(3)>"


def test_a_budget_over_its_cap_or_without_bound_shows(parts):
    home, metrics, report = parts
    over, unbounded, *rest = report.sites
    sites = (
        over.model_copy(update={"epsilon": 50.0001}),
        unbounded.model_copy(update={"epsilon": None}),
        *rest,
    )
    text = render(home, metrics, report.model_copy(update={"sites": sites}))
    rows = Page(text).rows("Budget of each site")
    assert rows[1][1] == "50.001 over cap"
    assert rows[2][1] == "unbounded over cap"
    assert "unbounded" in Page(text).all("dl")[0]["text"]
    bars = re.search(r'<svg[^>]*class="chart budgets".*?</svg>', text, re.DOTALL)[0]
    assert bars.count("fill: var(--bad)") == 2


def test_shared_noise_is_not_called_protection_from_everybody(parts):
    home, metrics, report = parts
    shared = {"trust": Trust.AGGREGATE, "colluders": 1, "epsilon_all_collude": 7.5}
    sites = tuple(site.model_copy(update=shared) for site in report.sites)
    text = render(home, metrics, report.model_copy(update={"sites": sites}))
    assert "rests on secure aggregation" in text
    assert Page(text).rows("Budget of each site")[1][3:5] == ["1", "7.500"]


# --- the command ------------------------------------------------------------------------------------------
def test_a_tampered_ledger_is_reported_and_the_exit_code_says_so(home, tmp_path, capsys):
    run = copied(home, tmp_path / "run")
    raw = run.ledger.read_bytes()
    place = raw.index(b'"noise_share":4') + len(b'"noise_share":')
    run.ledger.write_bytes(raw[:place] + b"5" + raw[place + 1 :])
    with pytest.raises(typer.Exit) as told:
        run_report(run.root, json=False)
    assert told.value.exit_code == 1
    path = run.root / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert "The ledger does not hold." in path.read_text()


def test_a_run_that_is_not_finished_says_how_to_finish_it(home, tmp_path):
    run = copied(home, tmp_path / "run")
    (run.root / "metrics.json").unlink()
    with pytest.raises(DataError, match="--resume"):
        run_report(run.root, json=False)
    assert not (run.root / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"rounds":"x"}', b"\xff", b'{"seconds":NaN}'])
def test_metrics_that_are_none_are_refused(home, tmp_path, content):
    run = copied(home, tmp_path / "run")
    (run.root / "metrics.json").write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.json: is not a run's metrics") as told:
        run_report(run.root, json=False)
    assert told.value.exit_code == 2


def test_metrics_of_another_model_are_refused(parts):
    home, metrics, report = parts
    other = metrics.model_copy(update={"final": metrics.final.model_copy(update={"confusion": ((1,),)})})
    with pytest.raises(DataError, match="another model"):
        render(home, other, report)


# --- however large the run --------------------------------------------------------------------------------
def test_a_large_run_keeps_the_page_small(parts):
    home, metrics, report = parts
    left = tuple(LeftOut(round=2, site=f"s{i}", step="x", reason="r" * 400) for i in range(5000))
    text = render(home, metrics.model_copy(update={"left_out": left}), report)
    assert len(Page(text).rows("Sites left out")) == ROWS + 1
    assert f"{5000 + 1 - ROWS} more are not listed here" in text


def test_a_hundred_sites_over_thousands_of_rounds_fit_one_chart():
    rounds = tuple(range(1, 3001))
    parts = {f"site-{i}": (Part.COUNTED,) * 2999 + (Part.LEFT_OUT,) for i in range(100)}
    drawn = charts.participation(Participation(rounds, parts, (True,) * 3000, (), None))
    assert len(drawn) < 2 * 2**20
    assert "30 in a column, the worst shown" in drawn
    assert "299900 counted, 100 left out" in drawn
    assert "patch" not in drawn.split(">", 1)[0]


def test_many_classes_are_listed_by_their_confusions(parts, tmp_path):
    source, metrics, report = parts
    home = copied(source, tmp_path / "run")
    classes = [f"class {i}" for i in range(MATRIX + 1)]
    home.config.write_text(
        re.sub(r"classes = \[.*?\]", f"classes = {classes!r}", home.config.read_text(), flags=re.DOTALL)
    )
    counts = [[0] * len(classes) for _ in classes]
    counts[3][3], counts[4][3], counts[3][5] = 9, 2, 7
    final = metrics.final.model_copy(update={"confusion": tuple(map(tuple, counts))})
    page = Page(render(home, metrics.model_copy(update={"final": final}), report))
    assert page.rows("Most frequent confusions")[1:] == [
        ["class 3", "class 5", "7"],
        ["class 4", "class 3", "2"],
    ]


def test_names_on_axes_are_bounded_and_printable():
    score = Score(rows=1, accuracy=0.5, balanced_accuracy=0.5, f1_macro=0.5)
    drawn = charts.subsets([("x" * 500 + "-north", score), ("a\x00\x1b$b$<c>", score)])
    assert "x" * 8 not in drawn
    assert "xxxxxxx…xx-north" in drawn
    assert "\x00" not in drawn
    assert "a��$b$&lt;c&gt;" in drawn


def test_a_run_without_privacy_is_marked_and_claims_nothing(tmp_path):
    from support.small_federation import SmallFederation

    from fedfuse_client.data.manifest import load_dataset
    from fedfuse_simulations.examiner import Examiner
    from fedfuse_simulations.metrics import Metrics

    federation = SmallFederation(tmp_path, {"rounds": 1, "privacy": {"trust": "none"}})
    federation.run()
    home = federation.home
    final = Examiner(federation.config.model, load_dataset(tmp_path / "data")).examine_published(home)
    metrics = Metrics(rounds=(), left_out=(), aborted=(), final=final, stopped="", seconds=1.0)
    text = render(home, metrics, audit(home))
    assert "No privacy." in text
    assert "no guarantee against anybody" in text
    assert "against everybody" not in text
