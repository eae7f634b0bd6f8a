"""The referring task: its questions, and a blind model's half."""

from __future__ import annotations

from collections import Counter

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.picto import referring, world


def test_questions_come_in_pairs_about_boxes_of_the_scene():
    asked = referring.questions(4)
    assert asked == referring.questions(4) and len(asked) == 8
    for one, two in zip(asked[::2], asked[1::2], strict=True):
        assert (one.inside, one.other) == (two.other, two.inside) and one.scene == two.scene and one.box != two.box
        assert all(0 <= share <= 1 for share in one.box) and one.box[0] < one.box[2] and one.box[1] < one.box[3]
        x0, y0, x1, y1 = (round(s * one.image.width) for s in one.box)
        found = [s for s in world.scenes("test", 12) if (one.inside, [x0, y0, x1 - x0, y1 - y0]) in s.objects]
        assert found and Counter(name for name, _ in found[0].objects)[one.inside] == 1


def test_a_model_that_does_not_see_the_box_is_right_in_half(monkeypatch):
    monkeypatch.setattr(referring, "Asker", lambda model, processor: Blind())
    rows = referring.measure(None, None, referring.questions(6), [])
    none, crop = referring.accuracies(rows)
    assert none["accuracy"] == 0.5 and none["none"] == {"delta": 0.0, "low": 0.0, "high": 0.0}
    assert crop["accuracy"] == 0.5 and crop["n"] == 12


class Blind:
    def odds(self, image, names):
        return [float(len(name)) + ord(name[0]) / 1000 + ord(name[-1]) / 1e6 for name in names]


def test_a_crop_is_the_box_with_a_margin():
    q = referring.questions(1)[0]
    crop = referring.cropped(q.image, (0.25, 0.25, 0.75, 0.75))
    edge = round(q.image.width * 0.2)
    assert crop.size == q.image.size
    part = q.image.crop((edge, edge, q.image.width - edge, q.image.height - edge)).resize(q.image.size, 3)
    assert crop.tobytes() == part.tobytes()


def test_too_few_scenes_are_one_sentence(monkeypatch):
    empty = world.scene("test", 0, 0)
    monkeypatch.setattr(referring.world, "scene", lambda *_: type(empty)(**{**vars(empty), "objects": []}))
    with pytest.raises(VlmFixError, match="ask for fewer"):
        referring.questions(3)
