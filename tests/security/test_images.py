"""Image files from anywhere: none starts a program, none fills the memory, and each bad one is a sentence."""

from __future__ import annotations

import os
import stat

import pytest
from PIL import EpsImagePlugin, Image

from tests.support.pictures import png_header
from vlm_fix import VlmFixError, cli
from vlm_fix.eval.tasks.sample import Sample, load_image
from vlm_fix.images import read_image

COMMANDS = {
    "describe": ["describe", "{}"],
    "inspect": ["inspect", "{}", "Is there a dog?", "--out", "{}.html"],
    "point": ["point", "{}", "Is there a dog?", "--point", "1,2"],
    "point --mask": ["point", "{good}", "Is there a dog?", "--mask", "{}"],
}
BAD = {
    "empty": b"",
    "text": b"not an image",
    "half": None,
    "bomb": png_header(60000, 60000),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    return path


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program called as Ghostscript is, which leaves a mark when it is started."""
    mark, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def bad(name, good, folder):
    path = folder / "bad.png"
    path.write_bytes(good.read_bytes()[:200] if BAD[name] is None else BAD[name])
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BAD)
def test_every_command_says_it_in_a_sentence(name, command, good, tmp_path, capsys):
    path = bad(name, good, tmp_path)
    arguments = [part.replace("{}", str(path)).replace("{good}", str(good)) for part in COMMANDS[command]]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad.png cannot be read as an image" in said and "give a PNG or JPEG file" in said


@pytest.mark.parametrize("name", BAD)
def test_an_evaluation_names_the_file(name, good, tmp_path):
    sample = Sample("1", 1, "bad.png", bad(name, good, tmp_path), "?", {})
    with pytest.raises(VlmFixError, match=r"bad\.png cannot be read as an image .*--ids"):
        load_image(sample)


def test_a_bomb_is_refused_where_pillow_would_take_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs set it
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    with pytest.raises(VlmFixError, match="more than 178 megapixels"):
        read_image(tmp_path / "bomb.png")


def test_postscript_starts_no_program(good, ghostscript, tmp_path):
    file = tmp_path / "picture.png"  # Pillow goes by the content
    Image.open(good).save(file, "EPS")
    with pytest.raises(VlmFixError, match="cannot be read as an image"):
        read_image(file)
    assert not ghostscript.exists()
    with pytest.raises(Exception, match=".*"), Image.open(file) as image:
        image.load()
    assert ghostscript.exists(), "the trap does not work: Pillow itself starts Ghostscript"


def test_an_image_is_turned_upright_where_that_is_wanted(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 40)
    assert read_image(tmp_path / "turned.jpg", upright=False).size == (40, 20)
    assert read_image(tmp_path / "turned.jpg", mode="L").mode == "L"
