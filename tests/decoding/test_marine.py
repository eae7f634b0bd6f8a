"""MARINE's prompts: whose objects stand where, and what a wrong file is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, make_inputs, single
from tests.support.run import greedy
from vlm_fix.call import Call
from vlm_fix.families import family_of
from vlm_fix.methods.contrast import marine

IMAGES = [1, 2, 0, 1]


def test_each_row_names_the_objects_of_its_own_images(family, model, tmp_path):
    call = Call(model, family_of(model), make_inputs(family, IMAGES))
    keys = marine.image_keys(call)
    assert [len(row) for row in keys] == IMAGES and len({k for row in keys for k in row}) == 4
    (tmp_path / "o.json").write_text(
        json.dumps({keys[0][0]: [11, 12], keys[1][0]: [13], keys[1][1]: [14, 13], "*": []})
    )
    made = vlm_fix.parse_spec(f"marine:objects={tmp_path / 'o.json'}").negative(call)
    ids, mask = call.inputs["input_ids"], call.inputs["attention_mask"]
    for i, told in enumerate([[11, 12], [13, 14], [], []]):
        own = [t for t, m in zip(ids[i].tolist(), mask[i].tolist(), strict=True) if m]
        at = max((j for j, t in enumerate(own) if t == IMAGE), default=-1) + 1
        at += own[at] == 94
        expected = own[:at] + told + own[at:]
        seen = made["attention_mask"][i].bool()
        assert made["input_ids"][i][seen].tolist() == expected
        assert seen.tolist() == sorted(seen.tolist()), "padded on the left"


def test_a_row_without_objects_is_the_plain_models(family, model):
    """A function gets each image's pixels; gamma=1 then answers as the other prompt does."""
    inputs, seen = make_inputs(family, [1, 2]), []
    plain = greedy(model, inputs, 4)[0]

    def find(image):
        seen.append(image)
        return [21, 22] if len(seen) == 1 else []

    with vlm_fix.wrapped(model, marine.Marine(objects=find, gamma=1)):
        tokens, logits, scores = greedy(model, inputs, 4)
    assert len(seen) == 3 and torch.equal(tokens[1], plain[1])
    assert torch.allclose(scores[1].log_softmax(-1), logits[1].log_softmax(-1), atol=1e-4)
    assert not torch.allclose(scores[0].log_softmax(-1), logits[0].log_softmax(-1), atol=1e-2)


def test_words_are_joined_as_the_official_list(monkeypatch, models):
    told = []
    monkeypatch.setattr(marine, "line_tokens", lambda model, text, name, instead: told.append(text) or (5,))
    call = Call(models["llava"], family_of(models["llava"]), single("llava", [2], 0))
    for names in (["cat"], ["cat", "dog"], ["cat", "dog", "bus"]):
        answers = iter([names[:1], names])
        marine.Marine(objects=lambda image, answers=answers: next(answers)).negative(call)
    assert told == [f"This image contains {x}. Based on this," for x in ("cat", "cat and dog", "cat, dog, and bus")]


def test_what_is_missing_or_wrong_is_said(models, tmp_path):
    model, inputs = models["llava"], single("llava", [1], 0)
    for text, says in (
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold one object"),
        ('{"00": []}', "has no objects of"),
    ):
        (tmp_path / "o.json").write_text(text)
        spec = f"marine:objects={tmp_path / 'o.json'}"
        with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match=says):
            greedy(model, inputs, 1)
    with pytest.raises(vlm_fix.VlmFixError, match="what a detector of yours found"):
        vlm_fix.wrap(model, "marine")
    with pytest.raises(vlm_fix.VlmFixError, match="has no {objects} in it"):
        vlm_fix.wrap(model, marine.Marine(objects=lambda image: [], prompt="nothing"))
    both = marine.Marine(objects=lambda image: ["cat", 3])
    with vlm_fix.wrapped(model, both), pytest.raises(vlm_fix.VlmFixError, match="names or token ids, not both"):
        greedy(model, inputs, 1)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("dog", "gives 'dog' for an image's objects; give a list of names or token ids"),
        ({"dog", "cat"}, "for an image's objects; give a list"),
        (None, "gives None for an image's objects; give a list .* for none"),
        ({"dog": 0.9}, "for an image's objects; give a list"),
        (5, "gives 5 for an image's objects"),
        (iter(["dog"]), "for an image's objects; give a list"),
        ([5.5], "gives 5.5 as an object; a name is a text, a token id a whole number"),
        ([True], "gives True as an object"),
        ([None], "gives None as an object"),
        ([["dog"]], r"gives \['dog'\] as an object"),
        ([" "], "gives ' ' as an object"),
        ([5, 10**6], "the token id 1000000 of the objects is none of the model's"),
        ([-1], "the token id -1 of the objects is none of the model's"),
        ([5, IMAGE], f"the token id {IMAGE} of the objects stands for an image"),
    ],
)
def test_what_a_function_may_not_return_is_said(family, model, answer, says):
    method = marine.Marine(objects=lambda image: answer)
    with vlm_fix.wrapped(model, method), pytest.raises(vlm_fix.VlmFixError, match=says):
        greedy(model, single(family, [1], 0), 1)


@pytest.mark.parametrize("objects", ["[true]", "[5.5]", '["dog", null]', '[""]', '"dog"'])
def test_what_a_file_may_not_hold_is_said(models, tmp_path, objects):
    (tmp_path / "o.json").write_text(f'{{"*": {objects}}}')
    with (
        vlm_fix.wrapped(models["llava"], f"marine:objects={tmp_path / 'o.json'}"),
        pytest.raises(vlm_fix.VlmFixError, match="as an object; a name is a text|must hold one object"),
    ):
        greedy(models["llava"], single("llava", [1], 0), 1)


def test_ids_of_other_libraries_are_ids(models):
    call = Call(models["llava"], family_of(models["llava"]), single("llava", [1], 0))
    made = [marine.Marine(objects=lambda image, ids=ids: ids).negative(call) for ids in ([5, 7], np.array([5, 7]))]
    made += [
        marine.Marine(objects=lambda image, ids=ids: ids).negative(call)
        for ids in (torch.tensor([5, 7]), (5, np.int64(7)))
    ]
    assert all(torch.equal(m["input_ids"], made[0]["input_ids"]) for m in made)


def test_a_model_without_a_tokenizer_is_told_what_marine_takes(models):
    method = marine.Marine(objects=lambda image: ["dog"])
    with (
        vlm_fix.wrapped(models["llava"], method),
        pytest.raises(vlm_fix.VlmFixError, match="or give objects as token ids, those of the whole line"),
    ):
        greedy(models["llava"], single("llava", [1], 0), 1)


def test_a_call_in_which_no_object_was_found_says_so(models):
    method = marine.Marine(objects=lambda image: [])
    with (
        vlm_fix.wrapped(models["llava"], method),
        pytest.warns(UserWarning, match="marine changed nothing in this call: no object was found"),
    ):
        greedy(models["llava"], single("llava", [1], 0), 2)
