"""Images and prompts of a visitor: every bad one is a sentence."""

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.demo.shared import PROMPT
from tests.support.pictures import png_header
from vlm_fix import VlmFixError
from vlm_fix.demo import compare

BAD = {
    "text": (b"not an image", "not a readable image"),
    "empty": (b"", "not a readable image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not a readable image"),
    "truncated": (None, "not a readable image"),
    "large": (png_header(5001, 5000), "5001 x 5000 pixels"),
    "bomb": (png_header(60000, 60000), "too many pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence(loaded, scene, tmp_path, name):
    data, words = BAD[name]
    file = tmp_path / "bad.png"
    file.write_bytes(scene.read_bytes()[:2000] if data is None else data)
    with pytest.raises(VlmFixError, match=words) as error:
        next(compare.compare(loaded, file, PROMPT, []))
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_no_image_and_no_prompt(loaded, scene):
    with pytest.raises(VlmFixError, match="no image yet"):
        next(compare.compare(loaded, None, PROMPT, []))
    with pytest.raises(VlmFixError, match="no prompt"):
        next(compare.compare(loaded, scene, "  ", []))


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert compare.read_image(tmp_path / "turned.jpg").size == (20, 40)
