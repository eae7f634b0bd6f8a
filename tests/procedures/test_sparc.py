"""sparc: boxes and their fusion by hand, the prompt with its regions, seeds and batches; the model's texts are made up."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import make_inputs, single
from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.errors import VlmFixError
from vlm_fix.methods.procedures import sparc
from vlm_fix.methods.procedures.boxes import fused, overlap, written
from vlm_fix.wing import engine_of

HOW = {"max_new_tokens": 4, "do_sample": False}
SPEC = "sparc:samples=3,tokens=4,coordinates=shares,margin=0"


def test_boxes_are_read_from_texts():
    text = 'See [[10, 20, 30, 40], (0.5,0,1000, 90)] and {"bbox_2d": [5, 5, 5, 9]}, [1, 2, 3].'
    assert written(text, (100, 50)) == [(0.1, 0.4, 0.3, 0.8), (0.005, 0.0, 1.0, 1.0)]
    assert written("no boxes", (1, 1)) == []


def test_fusion_by_hand():
    a, b, far = (0.0, 0.0, 0.4, 0.4), (0.0, 0.0, 0.4, 0.3), (0.6, 0.6, 0.9, 0.9)
    assert overlap(a, b) == pytest.approx(0.75) and overlap(a, far) == 0
    (first, box), (second, other) = fused([[far], [a], [b]], 0.5)
    assert (first, second) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert box == pytest.approx((0.0, 0.0, 0.4, 0.35)) and other == far
    assert [sure for sure, _ in fused([[a, a, a], []], 0.5)] == [
        1.0
    ]  # an answer that repeats itself counts at most n times
    assert len(fused([[a], [b]], 0.8)) == 2


@pytest.fixture
def words(monkeypatch):
    """Texts by the order in which they are asked for."""
    given = []
    monkeypatch.setattr(sparc, "tokenized", lambda model, text: (11, 12, 13))
    monkeypatch.setattr(sparc, "text_of", lambda model, ids: given.pop(0) if given else "")
    return given


def refined(model, inputs, spec):
    with vlm_fix.wrapped(model, spec):
        engine = engine_of(model)
        return engine.wing(ProcedureWing).refine(Call(model, engine.family, dict(inputs)))


def test_regions_follow_their_image(model, family, words):
    """Two rows: two regions for the first, none for the second; crops on patch borders are compared pixel by pixel."""
    inputs = make_inputs(family, [1, 1])
    words += ["[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]", "[0, 0, 0.5, 0.5]", "[0.5, 0.5, 1, 1]", "", "[0, 0, 1, 1]", "none"]
    with pytest.warns(UserWarning, match="whole image alone for 1 of 2 images"):
        new = refined(model, inputs, SPEC)
    marks = inputs["input_ids"][0].eq(90).sum()
    assert int(new["input_ids"][0].eq(90).sum()) == 3 * int(marks)
    assert int(new["input_ids"][1].eq(90).sum()) == int(inputs["input_ids"][1].eq(90).sum())
    if family != "llava":
        assert new["image_grid_thw"].tolist() == [[1, 6, 6]] * 3 + [[1, 4, 8]]
        return
    image, made = inputs["pixel_values"][0], new["pixel_values"]
    assert len(made) == 4 and torch.equal(made[0], image) and torch.equal(made[3], inputs["pixel_values"][1])
    for crop, part in ((made[1], image[:, :12, :12]), (made[2], image[:, 12:, 12:])):
        expected = torch.nn.functional.interpolate(part[None], (24, 24), mode="bicubic", antialias=True)[0]
        assert torch.allclose(crop, expected, atol=1e-5)


def test_answers_are_those_to_the_prompt_with_regions(model, family, words):
    inputs, said = single(family, [1], 0), ["[0.1, 0.1, 0.6, 0.6]"] * 3
    words += said
    by_hand = refined(model, inputs, SPEC)
    expected = model.generate(**by_hand, **HOW)[:, -4:]
    words += said
    with vlm_fix.wrapped(model, SPEC):
        got = model.generate(**inputs, **HOW)
    assert torch.equal(got[:, -4:], expected) and torch.equal(got[:, :-4], inputs["input_ids"])
    assert by_hand["input_ids"].shape[1] > inputs["input_ids"].shape[1]


def test_looks_are_drawn_anew_for_each_seed_and_do_not_depend_on_the_batch(model, family, monkeypatch):
    """What the model says when it is asked: at low resolution, with the instruction."""
    monkeypatch.setattr(sparc, "tokenized", lambda model, text: (11, 12, 13))
    monkeypatch.setattr(sparc, "text_of", lambda model, ids: " ".join(map(str, ids.tolist())))

    def said(inputs, spec):
        with vlm_fix.wrapped(model, spec):
            engine = engine_of(model)
            call = Call(model, engine.family, dict(inputs))
            return engine.active[0].answers(call, sparc.images_of(call, "sparc"))

    batch = said(make_inputs(family, [1, 1]), SPEC)
    assert [len(texts) for texts in batch] == [3, 3] and len(set(batch[0])) > 1
    for row in range(2):
        assert said(single(family, [1, 1], row), SPEC) == batch[row : row + 1]
    several = said(single(family, [1, 2], 1), SPEC)
    assert len(several) == 2 and several[0] != several[1]
    assert said(make_inputs(family, [1, 1]), f"{SPEC},seed=1") != batch
    assert len(said(make_inputs(family, [1, 1]), f"{SPEC},temperature=0")[0]) == 1


def test_what_it_cannot_do_is_one_sentence(model, family):
    with vlm_fix.wrapped(model, "sparc"), pytest.raises(VlmFixError, match="which need the model's tokenizer"):
        model.generate(**single(family, [1], 0), **HOW)
    with vlm_fix.wrapped(model, "sparc:boxes=0.1|0.2|0.5"), pytest.raises(VlmFixError, match="in shares of the image"):
        model.generate(**single(family, [1], 0), **HOW)
    next_one = families.build("llava_next")
    with vlm_fix.wrapped(next_one, "sparc"), pytest.raises(VlmFixError, match="whole images"):
        next_one.generate(**families.prompt("llava_next", [1]), **HOW)
