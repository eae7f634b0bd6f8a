"""The README: its first example prints the captions of its picture, and its first screen fits."""

from __future__ import annotations

import html
import re

from tests.support.paths import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_first_example_prints_the_captions_of_the_picture(capsys):
    found = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in found[1].splitlines() if line.strip()]) == 8
    exec(compile(found[1], "README.md", "exec"), {})
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    title = re.search("<title>(.*?)</title>", (ROOT / "docs/images/captions.svg").read_text())[1]
    drawn = [part.partition(": ")[2] for part in html.unescape(title).split("; ")]
    assert len(printed) == 2 and printed == drawn, "python docs/figures/captions.py"


def test_the_picture_marks_what_is_said():
    drawn = (ROOT / "docs/images/captions.svg").read_text()
    words = [
        html.unescape(re.sub("<[^>]*>", "", line))
        for line in re.findall("<text [^>]*preserve[^>]*>(.*?)</text>", drawn)
    ]
    title = html.unescape(re.search("<title>(.*?)</title>", drawn)[1])
    assert "".join(words) == "".join(part.partition(": ")[2] for part in title.split("; "))
    assert (
        'class="bad"' in drawn
        and 'class="good"' in drawn
        and "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    )


def test_the_first_screen_fits_and_the_leaderboard_has_its_marks():
    first = TEXT.partition("## Install")[0]
    assert max(len(line) for line in first.splitlines() if line.startswith("|")) <= 100
    assert TEXT.index("<!-- leaderboard -->") < TEXT.index("<!-- /leaderboard -->")
    assert TEXT.index("captions.svg") < TEXT.index("|"), "a picture comes before any table"
