"""`vlm-fix point` and `vlm-fix inspect` on the bundled model."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from vlm_fix.cli import main
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.picto import scene
from vlm_fix.methods.procedures.regions import shares


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    scene("test", 0, 0).image.save(path)
    return str(path)


def test_inspect_writes_a_page_that_needs_nothing_else(picture, tmp_path, capsys):
    out = tmp_path / "page.html"
    args = ["inspect", picture, "Is there a dog in the image?", "--answer", "Yes", "--out", str(out), "--no-saliency"]
    assert main(args) == 0
    text = out.read_text(encoding="utf-8")
    for part in ("What each layer would say", "Attention rollout", "Heads that copy", "Sinks"):
        assert part in text
    sources = re.findall(r'(?:src|href)="([^"]{5})', text)
    assert sources and set(sources) == {"data:"} and "<script" not in text and "http" not in text
    assert str(out) in capsys.readouterr().out


def test_point_answers_about_the_picture_and_about_the_region(picture, capsys):
    args = ["point", picture, "Is there a dog in the image?", "--box", "10,10,60,60", "--new-tokens", "2"]
    assert main(args) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["whole picture", "region"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["point", "nowhere.png", "What?", "--point", "1,2"], "there is no picture"),
        (["inspect", "nowhere.png", "What?", "--out", "x.html"], "there is no picture"),
    ],
)
def test_a_missing_picture_is_one_sentence(args, words, capsys):
    assert main(args) == 2
    assert words in capsys.readouterr().err


def test_coordinates_follow_the_processors_crop():
    whole = SimpleNamespace(do_center_crop=False, size={"height": 10, "width": 10})
    assert shares([10, 20, 50, 40], (100, 40), whole) == [0.1, 0.5, 0.5, 1.0]
    crop = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    assert shares([30, 0, 50, 40], (100, 40), crop) == [0.0, 0.0, 0.5, 1.0]
    with pytest.raises(VlmFixError, match="lies outside"):
        shares([1, 0, 20, 40], (100, 40), crop)
