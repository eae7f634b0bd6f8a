"""`vlm-fix point` and `vlm-fix inspect` on the bundled model."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from PIL import Image

from vlm_fix.cli import main
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.picto import scene
from vlm_fix.eval.run import loading
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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "P", "What?", "--new-tokens", "0"], "--new-tokens is 0: give a whole number of at least 1"),
        (["inspect", "P", "What?", "--method", "nothing"], "nothing"),
        (["point", "P", "What?", "--point", "1,2", "--new-tokens", "-1"], "--new-tokens is -1: give a whole number"),
        (["point", "P", "What?", "--point", "1,2", "--method", "nothing"], "nothing"),
        (["point", "P", "What?", "--box", "50,50,10,10"], "--box '50,50,10,10' holds nothing"),
        (["point", "P", "What?", "--box", "10,50,60,50"], "--box '10,50,60,50' holds nothing"),
        (
            ["point", "P", "What?", "--box", "0,0,9000,10"],
            "'0,0,9000,10' lies outside the picture, which has 128 x 128",
        ),
        (["point", "P", "What?", "--point", "nan,2"], "--point 'nan,2' is not of the form"),
        (["point", "P", "What?", "--scribble", "1,2,3,-4"], "--scribble '1,2,3,-4' lies outside the picture"),
        (["point", "P", "What?", "--point", ""], "--point '' is not of the form 10,20"),
        (["point", "P", "What?", "--mask", "DARK"], "has no bright pixel"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(args, words, picture, tmp_path, capsys, monkeypatch):
    Image.new("L", (128, 128)).save(tmp_path / "dark.png")
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    assert main([{"P": picture, "DARK": "dark.png"}.get(arg, arg) for arg in args]) == 2
    said = capsys.readouterr()
    assert words in said.err and not said.out


def test_inspect_needs_no_name_for_its_page(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", picture, "Is there a dog?", "--answer", "Yes", "--no-saliency"]) == 0
    assert (tmp_path / "inspect.html").is_file()
