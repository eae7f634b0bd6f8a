"""The demo's part of the table of bad input: what its page and its tools are given, each of it one sentence."""

import base64
import io

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from vlm_fix import VlmFixError
from vlm_fix.demo import compare, tools


def encoded(kind: str, size=(9, 7)) -> str:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


IMAGES = {
    "nothing": "",
    "blanks": "  ",
    "a path": "/etc/passwd",
    "a path up": "../../etc/passwd",
    "a file url": "file:///etc/passwd",
    "a web address": "https://example.org/a.png",
    "a scene that is not there": "scene:99",
    "a scene before the first": "scene:-1",
    "a scene without a number": "scene:",
    "a scene by a word": "scene:first",
    "a photograph that is not there": "coco:1",
    "an empty data url": "data:image/png;base64,",
    "a data url without base64": "data:image/png,abc",
    "a data url of text": "data:text/html;base64,PGI+",
    "base64 of text": base64.b64encode(b"not an image").decode(),
    "base64 with a stroke": "iVBORw0KGgo=!",
    "another format": encoded("TIFF"),
    "a cut-off image": encoded("PNG", (64, 64))[:80],
    "a zero byte": "scene:0\0",
    "a long text": "x" * 100_000,
}
ASKED = {
    "no such method": {"methods": "vdc"},
    "no value": {"methods": "pai:alpha="},
    "out of range": {"methods": "pai:alpha=-1"},
    "not a number": {"methods": "pai:alpha=nan"},
    "no such parameter": {"methods": "pai:__class__=1"},
    "layers it does not have": {"methods": "pai:layers=99"},
    "two pruners": {"methods": "hiprune+fastv"},
    "the same twice": {"methods": "vcd+vcd"},
    "a file that is not there": {"methods": "steer:file=/none.safetensors"},
    "a preset that is not there": {"methods": "@/none.yaml"},
    "a comma alone": {"methods": ","},
    "a plus alone": {"methods": "+"},
    "no tokens": {"longest": 0},
    "fewer than none": {"longest": -1},
    "too many tokens": {"longest": 513},
    "a model of another name": {"model": "llava"},
    "a folder as a model": {"model": "/tmp"},
    "no prompt": {"prompt": ""},
    "a blank prompt": {"prompt": " \n"},
}


@pytest.mark.parametrize("what", IMAGES)
def test_images(catalogue, what):
    with pytest.raises(VlmFixError) as error:
        tools.tools(catalogue)[2](image=IMAGES[what])
    said = str(error.value)
    assert said.strip() and "\n" not in said and len(said) < 2000 and "Traceback" not in said


@pytest.mark.parametrize("what", ASKED)
def test_what_is_asked(catalogue, what):
    with pytest.raises(VlmFixError) as error:
        tools.tools(catalogue)[2](**{"image": "scene:0", **ASKED[what]})
    said = str(error.value)
    assert said.strip() and "\n" not in said and "Traceback" not in said


@pytest.mark.parametrize("options", [{"pai": {"alpha": "x"}}, {"pai": {"alhpa": "1"}}, {"pai": {"alpha": "-1"}}])
def test_sliders_and_boxes(options):
    with pytest.raises(VlmFixError):
        compare.stack_of(["pai"], options)
