"""Rows that a method leaves as they are keep plain SDPA's output bit for bit; a call in which all rows are left says so."""

from __future__ import annotations

import warnings

import pytest
import torch

import vlm_fix
from tests.support.models import BUILD, IMAGE, make_inputs, single
from vlm_fix.registry import get_method

IDLE = [
    "var:tau=8.1",
    "var:tau=1.7,min_visual_mass=1",
    "ad_hh:threshold=0.999,head_list=1.0|2.1",
    "act:threshold=0.999,layers=0-",
    "locore",  # the prompt's last row has no output columns yet
]


@pytest.fixture(scope="module")
def half():
    return {name: build(torch.bfloat16) for name, build in BUILD.items()}


def logits(model, inputs, spec=None):
    with torch.no_grad():
        if spec is None:
            return model(**inputs).logits
        with vlm_fix.wrapped(model, spec):
            return model(**inputs).logits


@pytest.mark.parametrize("spec", [*IDLE, ["locore", "var:tau=8.1", "act:threshold=0.999"]])
def test_nothing_edited(family, models, half, spec):
    """The whole prompt, in both precisions; text after the image is long enough for the kernel's sums to differ."""
    for model, dtype in ((models[family], torch.float32), (half[family], torch.bfloat16)):
        inputs = make_inputs(family, [1, 2], dtype=dtype, text=20)
        assert torch.equal(logits(model, inputs, spec), logits(model, inputs))


def test_gift_leaves_the_question_alone(family, models, half):
    """It reads the rows between the image and the last one, and edits the last one only."""
    for model, dtype in ((models[family], torch.float32), (half[family], torch.bfloat16)):
        inputs = single(family, [1], 0, dtype=dtype, text=20)
        plain, edited = logits(model, inputs), logits(model, inputs, "gift:alpha=3,source_layer=1,layers=2-3")
        assert torch.equal(edited[:, :-1], plain[:, :-1]) and not torch.equal(edited[:, -1], plain[:, -1])


def test_a_row_beside_an_edited_one(family, models, half):
    """One sample's head leans on the text, its neighbour's does not: only the first is edited, in its last row alone."""
    spec = "ad_hh:threshold={},head_list=3.0|3.1|3.2|3.3"
    for model, dtype in ((models[family], torch.float32), (half[family], torch.bfloat16)):
        inputs = make_inputs(family, [1, 1, 2, 1], dtype=dtype, text=20)
        plain, found = logits(model, inputs), set()
        for threshold in (0.6, 0.7, 0.75):
            edited = logits(model, inputs, spec.format(threshold))
            assert torch.equal(edited[:, :-1], plain[:, :-1])
            found.add(tuple((edited != plain).any(dim=-1).any(dim=-1).tolist()))
        assert any(len(set(rows)) == 2 for rows in found), "some rows must be edited beside rows that are not"


@pytest.mark.parametrize("path", ["auto", "kernel"])
def test_rows_before_a_sink(models, half, monkeypatch, path):
    """ACT edits the rows that see a sink; those before it are SDPA's, by either way of computing the others."""
    from vlm_fix.attention import AttentionPath, AttentionWing
    from vlm_fix.methods.attention.act import ACTMemory

    monkeypatch.setattr(AttentionWing, "path", AttentionPath(path))
    model, dtype = (models["llava"], torch.float32) if path == "auto" else (half["llava"], torch.bfloat16)
    inputs, seen = single("llava", [1], 0, seed=2, dtype=dtype), []
    method = get_method("act")
    read = method.read_queries_and_keys

    def spy(self, inputs, rows):
        read(self, inputs, rows)
        seen.append(rows.memory(ACTMemory).sinks[rows.layer])

    monkeypatch.setattr(method, "read_queries_and_keys", spy)
    plain, edited = logits(model, inputs), logits(model, inputs, "act:threshold=0.1,layers=2")
    first = int(seen[0][0].any(dim=0).int().argmax())
    assert 5 < first < plain.shape[1] - 1
    assert torch.equal(edited[:, :first], plain[:, :first]) and not torch.equal(edited[:, first:], plain[:, first:])


@pytest.mark.parametrize("spec", IDLE)
def test_a_call_that_edits_nothing_says_so_once(models, spec):
    model, one = models["llava"], single("llava", [1], 0)
    name = spec.partition(":")[0]
    with vlm_fix.wrapped(model, spec):
        with pytest.warns(UserWarning, match=f"{name} changed nothing in this call: "):
            model.generate(**one, max_new_tokens=1, do_sample=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(**one, max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize(
    "spec",
    [
        "var:tau=1.7,min_visual_mass=0.05,rho=0.1,layers=0-",
        "ad_hh:threshold=0.1,head_list=1.0|2.1|3.0",
        "act:threshold=0.04,layers=0-",
        "gift:alpha=3,source_layer=1,layers=2-3",
        "locore",
    ],
)
def test_a_call_that_edits_does_not(family, model, spec):
    with vlm_fix.wrapped(model, spec), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
            one = single(family, [1], 0)
            model.generate(**one, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE], **options)
