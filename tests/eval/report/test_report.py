"""The report page: whole, self-contained, true to the answers, safe against what a model writes; and the leaderboard."""

import html.parser
import itertools
import json
import os
import re
import shutil

import pytest
from rich.console import Console

from tests.support import paths
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.report import board, page, svg
from vlm_fix.eval.run.runner import Settings, evaluate
from vlm_fix.eval.scorers.chair import score as chair

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")
RESULTS = paths.RESULTS / "picto-llava-shift"
VOID = {"meta", "br", "img", "line", "circle", "input"}


class Checker(html.parser.HTMLParser):
    """Collects tags, marked words and table cells, and asserts that every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.marks, self.cells, self.sources = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.sources += [values[key] for key in ("src", "href", "action", "data") if key in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marks.append([values["class"], values["title"], ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "mark":
            self.marks[-1][2] += data
        if "td" in self.open:
            self.cells.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small run whose captions differ between the runs, and one answer changed into an attack."""
    folder = tmp_path_factory.mktemp("report") / "out"
    settings = Settings(
        model=MODEL, methods=(("hiprune:keep=6",),), limit=6, batch_size=16, max_new_tokens=24, variant="pattern"
    )
    evaluate(settings, folder, console=Console(quiet=True))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    victim = next(row for row in lines if row["benchmark"] == "chair" and row["run"] != "baseline")
    victim["answer"] = '<script>alert("x")</script> a dog, a giraffe, two bears and a surfboard & more'
    victim["ground_truth"] = ["dog"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def test_the_page_is_whole_and_loads_nothing(folder):
    text = page.page([folder, RESULTS], samples=4)
    seen = Checker(text)
    assert seen.tags.count("svg") == 14 and seen.tags.count("h2") == 2 and seen.tags.count("script") == 1
    assert seen.sources and all(source.startswith("data:image/jpeg;base64,") for source in seen.sources)
    assert not re.search(r"url\(|@import|<link|<iframe", text) and "http" not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    shown = json.loads((RESULTS / "results.json").read_text())
    assert f"{100 * shown['runs']['vhr']['pope']['adversarial']['accuracy']:.1f}" in seen.cells


def test_marked_words_are_those_that_the_scorer_finds(folder):
    seen = Checker(page.page([folder], samples=100))
    expected = []
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        if row["benchmark"] == "chair":
            scored = chair.score([chair.Caption(0, row["answer"])], {0: row["ground_truth"]}, "pattern").captions[0]
            expected.append((row["id"], [("bad", o.node) for o in scored.hallucinated]))
    spread = {key: {len(bad) for k, bad in expected if k == key} for key, _ in expected}
    wrong = sorted(pair for key, bad in expected if len(spread[key]) > 1 for pair in bad)
    found = sorted((kind, title.split(":")[0]) for kind, title, _ in seen.marks if title.endswith("not there"))
    assert found == wrong and len(wrong) >= 3
    assert {"giraffe", "bear", "surfboard"} <= {title.split(":")[0] for _, title, _ in seen.marks}


@pytest.mark.parametrize("low, high", [(0, 100), (92.1, 92.1), (-0.3, 0.4), (0.001, 0.0011), (55, 1600), (0, 0)])
def test_ticks_enclose_the_data_and_are_few(low, high):
    ticks = svg.ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and ticks[0] < ticks[-1] and 2 <= len(ticks) <= 9
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in itertools.pairwise(ticks)}
    assert steps == {1.0}


def test_points_stand_where_their_numbers_say():
    """Two corners of the axes: pixels follow linearly from the tick labels of the same picture."""
    drawn = svg.scatter(
        [svg.Point(0, "baseline", 10, 1), svg.Point(1, "x<y", 20, 2, (15, 25), (1.5, 2.5))], "X", "Y", "T"
    )
    circles = [tuple(map(float, c)) for c in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert re.search(r'<text x="[\d.]+" y="[\d.]+" text-anchor="start">baseline</text>', drawn), (
        "marks bear their names"
    )
    (x1, y1), (x0, y0) = circles  # the baseline is drawn last, on top
    ticks = {float(t): float(x) for x, t in re.findall(r'x="([\d.]+)" y="281" text-anchor="middle">([\d.]+)<', drawn)}
    low, high = min(ticks), max(ticks)
    for value, pixel in ((10, x0), (20, x1)):
        assert pixel == pytest.approx(ticks[low] + (value - low) / (high - low) * (ticks[high] - ticks[low]), abs=0.2)
    assert y1 < y0 and "x&lt;y" in drawn and "x<y" not in drawn


def test_the_leaderboard_is_the_readme_table_and_keeps_the_rest_of_a_file(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{page.MARKS[0]}\nformer table\n{page.MARKS[1]}\n\nthe end\n")
    assert cli.main(["report", str(RESULTS), "--markdown", str(file)]) == 0
    first = file.read_text()
    assert first.startswith("# Title\n") and first.endswith("\n\nthe end\n") and "former" not in first
    results = json.loads((RESULTS / "results.json").read_text())
    row = next(line for line in first.splitlines() if line.startswith("| `vhr` |"))
    for split, bold in (("random", "**"), ("adversarial", "")):  # .1 to 1.3 excludes 0, but not after Holm's correction
        delta = results["runs"]["vhr"]["pope"][split]["delta"]["accuracy"]
        assert delta["excludes_zero"]
        shown = f"{bold}{100 * delta['delta']:+.1f}{bold} [{100 * delta['low']:.1f}, {100 * delta['high']:.1f}]"
        assert f"| {shown} |" in row
    assert row.endswith(f"| {results['speed']['vhr']['chair']['tokens_per_second']:.0f} |")
    assert cli.main(["report", str(RESULTS), "--markdown", str(file)]) == 0
    assert file.read_text() == first
    assert cli.main(["report", str(RESULTS), "--markdown", str(tmp_path / "new.md")]) == 0
    assert (tmp_path / "new.md").read_text().startswith("### picto-llava-shift: picto-llava on picto:shift")
    file.write_text(page.MARKS[0])
    assert cli.main(["report", str(RESULTS), "--markdown", str(file)]) == 2
    assert "add it where the table ends" in capsys.readouterr().err


def test_the_board_has_a_row_for_each_method_and_marks_gain_and_harm(tmp_path):
    seen = Checker(text := board.page([RESULTS]))
    assert "http" not in text and not seen.sources
    results = json.loads((RESULTS / "results.json").read_text())
    rows = dict(re.findall(r'<tr data-run="([^"]*)".*?</code></td>(.*?)</tr>', text))
    assert list(rows) == list(results["runs"])[1:]
    delta = results["runs"]["vcd"]["chair"]["captions"]["delta"]["chair_i"]
    assert f'<span class="better">{100 * delta["delta"]:+.1f}</span>' in rows["vcd"], "fewer invented objects is better"
    assert '<span class="worse">-12.6</span>' in rows["vcd"], "recall"
    assert '<span class="worse">+12.8</span>' in rows["hiprune"] and "pruning" in rows["hiprune"]
    scale = [float(x) for x in re.findall(r'cx="([\d.]+)"', rows["var"])]
    assert scale and set(scale) == {board.WIDTH / 2}, "no difference stands on the line"


def test_a_small_difference_looks_small():
    assert svg.widened([92.1, 92.5], 10) == pytest.approx((87.3, 97.3)) and svg.widened([0.2, 1], 10) == (0, 10)
    assert svg.widened([-1, 30], 10) == (-1, 30)
    drawn = svg.forest([("", [svg.Bar("a", 0.4, 0.1, 0.8, True), svg.Bar("b", -0.2, -0.9, 0.6)])], "points", "T")
    found = {
        float(t): float(x) for x, t in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">([+-]?\d+)<', drawn)
    }
    assert min(found) <= -5 and max(found) >= 5 and "+0.4 [0.1, 0.8]" in drawn


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(VlmFixError, match="not the result of a finished evaluation"):
        page.page([tmp_path])


def test_it_fits_a_phone_and_a_desk_in_light_and_dark(folder, tmp_path):
    browser_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("no chromium")
    out = tmp_path / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    with browser_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        inks = set()
        for scheme, width in (("light", 1240), ("dark", 390)):
            tab = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True
            ).new_page()
            asked, errors = [], []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("pageerror", lambda error, errors=errors: errors.append(error))
            tab.goto(out.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width and not errors
            assert not [url for url in asked if not url.startswith(("file:", "data:"))]
            assert tab.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
            inks.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(inks) == 2
        browser.close()
