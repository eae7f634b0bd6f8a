"""Pointing: the box that is drawn is the box that the method gets."""

import types

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

import vlm_fix
from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError, parse_spec
from vlm_fix.demo import compare, examples, point
from vlm_fix.eval.run import generation


def test_a_drawn_box_is_the_methods(loaded):
    image = examples.scenes()[0].image
    stack = point.spec(loaded, image, (10, 20, 55, 80))
    assert parse_spec(stack).box == (0.1, 0.2, 0.55, 0.8)
    panes = last(point.ask(loaded, image, PROMPT, (10, 20, 55, 80), compare.Stop()))
    assert [pane.state for pane in panes] == ["done", "done"] and panes[1].stack == [stack]
    with vlm_fix.wrapped(loaded.model, stack):
        alone = generation.generate(
            loaded.model, loaded.processor, [image], [PROMPT], 0, do_sample=False, max_new_tokens=point.TOKENS
        )
    assert panes[1].text.strip() == alone.texts[0]


def test_boxes_are_of_what_the_model_is_shown():
    how = types.SimpleNamespace(do_center_crop=True, size={"shortest_edge": 10}, crop_size={"width": 10, "height": 10})
    cut = types.SimpleNamespace(processor=types.SimpleNamespace(image_processor=how))
    wide = examples.scenes()[0].image.resize((200, 100))
    assert parse_spec(point.spec(cut, wide, (25, 0, 50, 50))).box == (0.0, 0.0, 0.5, 0.5)


@pytest.mark.parametrize("box", [(10, 10, 11, 90), (60, 10, 20, 90)])
def test_no_box_is_one_sentence(loaded, box):
    with pytest.raises(VlmFixError, match="no box: draw"):
        point.spec(loaded, examples.scenes()[0].image, box)


def test_the_pad_shows_the_box():
    shown = point.pad(examples.scenes()[0].image, (10, 20, 55, 80))
    assert "left:10%;top:20%;width:45%;height:60%" in shown and "alt=" in shown
    assert "Choose an image" in point.pad(None, point.START)
