"""Drafts change no answer: token for token, and in distribution; what the draft sees is what the formula says."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch

import vlm_fix
from tests.support import families, models
from tests.support.models import make_inputs, single
from tests.support.references.base import Reference, double, teacher_forced, visual_columns
from vlm_fix import projections
from vlm_fix.decoding import drafting
from vlm_fix.errors import VlmFixError

SPECS = ("draft", "draft:tokens=3,keep=0.05", "draft:rows=last,heads=together,keep=4", "draft:tokens=9,keep=1")
BESIDE = ("pai:alpha=0.5", "vcd:beta=0.01", "vhr", "deco:layers=1-3", "cca", "gift", "vista:lam=0.4", "locore:beta=2")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ends", [False, True])
def test_greedy_tokens_are_the_models_own(model, family, spec, ends):
    inputs, how = single(family, [1, 2], 1), {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.2}
    expected = model.generate(**inputs, **how)
    if ends:
        model.generation_config.eos_token_id = int(expected[0, -7])
    try:
        expected = model.generate(**inputs, **how)
        with vlm_fix.wrapped(model, spec):
            assert torch.equal(model.generate(**inputs, **how), expected)
            report = vlm_fix.drafted(model)
        assert 0 <= report.accepted <= report.drafted and report.rounds
        assert report.accepted + report.rounds >= expected.shape[1] - inputs["input_ids"].shape[1] - 2
    finally:
        model.generation_config.eos_token_id = None


def test_a_draft_that_sees_everything_is_always_right(model, family):
    """Nothing is thinned out, so each candidate must be accepted: the draft's cache, positions and rollback are right."""
    with vlm_fix.wrapped(model, "draft:keep=1.0,tokens=4"):
        model.generate(**single(family, [1, 2], 1), max_new_tokens=22, do_sample=False)
        report = vlm_fix.drafted(model)
    assert report.accepted == report.drafted >= 16 and report.columns == 1 and report.tokens_per_round > 4.5


@pytest.mark.parametrize("other", BESIDE)
def test_other_methods_answers_stay_theirs(model, family, other):
    inputs, how = single(family, [1, 2], 1), {"max_new_tokens": 10, "do_sample": False}
    with vlm_fix.wrapped(model, other):
        expected = model.generate(**inputs, **how)
    with vlm_fix.wrapped(model, [other, "draft:keep=0.5,tokens=3"]):
        assert torch.equal(model.generate(**inputs, **how), expected)
        assert vlm_fix.drafted(model).drafted


@dataclass
class Thinned(Reference):
    """Generated rows see the text and, in each key head and layer, the image columns to which text rows gave most."""

    keep: int = 0
    text_rows: bool = True
    apart: bool = True
    given_to: dict = field(default_factory=dict)  # layer -> [H, N]
    kept: dict = field(default_factory=dict)

    def weight(self, a, layer, head, row):
        first = max(self.visual) + 1 if self.text_rows else self.prompt_len - 1
        total = self.given_to.setdefault(layer, torch.zeros(4, len(self.visual), dtype=torch.float64))
        if first <= row < self.prompt_len:
            total[head] += a[self.visual]
        if row < self.prompt_len:
            return a
        group = [2 * (head // 2), 2 * (head // 2) + 1] if self.apart else range(4)
        votes = sum(total[h] for h in group).tolist()
        best = sorted(range(len(votes)), key=lambda j: (-votes[j], j))[: self.keep]
        gone = [column for j, column in enumerate(self.visual) if j not in best]
        a = a.clone()
        a[gone] = 0
        return a / a.sum()

    def mixed(self, a, layer):
        for row in range(a.shape[1]):  # the prompt's rows of all heads vote before any generated row
            for head in range(4):
                a[head, row] = self.weight(a[head, row], layer, head, row)


@pytest.mark.parametrize(
    ("options", "how"), [("", {}), (",rows=last,heads=together", {"text_rows": False, "apart": False})]
)
def test_candidates_are_those_of_the_formula(model, family, monkeypatch, options, how):
    """The draft's scores in the first round, against loops over materialised weights."""
    seen, original = [], drafting.Candidates.get_candidates

    def note(self, ids, **more):
        found = original(self, ids, **more)
        seen.append((ids, *found))
        return found

    monkeypatch.setattr(drafting.Candidates, "get_candidates", note)
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, f"draft:keep=5,tokens=4{options}"):
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    before, candidates, scores = next(x for x in seen if x[2] is not None)
    length = inputs["input_ids"].shape[1]
    assert before.shape[1] == length + 1 and candidates.shape[1] == length + 5
    run = Thinned(visual_columns(inputs["input_ids"]), length, [0, 1, 2, 3], rows="all", keep=5, **how)
    expected = teacher_forced(double(model), run, inputs, candidates[0, length:-1])[1:]
    assert float((scores[0].double() - expected).abs().max() / expected.abs().max()) < 1e-5
    plain = teacher_forced(double(model), None, inputs, candidates[0, length:-1])[1:]
    assert float((scores[0].double() - plain).abs().max() / expected.abs().max()) > 1e-2


def test_samples_have_the_models_own_distribution():
    """Three tokens of two choices each, drawn 300 times with drafts that see one image column: chi-square against p."""
    model, inputs = models.BUILD["llava"](), single("llava", [1], 0)
    start, counts = inputs["input_ids"].shape[1], dict[tuple, int]()
    how = {"max_new_tokens": 3, "do_sample": True, "top_k": 2, "temperature": 1.5}
    with vlm_fix.wrapped(model, "draft:keep=1e-9,tokens=2"):
        torch.manual_seed(0)
        for _ in range(300):
            got = tuple(model.generate(**inputs, **how)[0, start:].tolist())
            counts[got] = counts.get(got, 0) + 1
        assert vlm_fix.drafted(model).columns < 1
    p, known = {(): 1.0}, [()]
    for _ in range(3):
        grown = []
        for answer in known:
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
            with torch.no_grad():
                logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]
            values, tokens = logits.topk(2)
            for share, token in zip((values / 1.5).softmax(dim=-1).tolist(), tokens.tolist(), strict=True):
                p[(*answer, token)] = p[answer] * share
                grown.append((*answer, token))
        known = grown
    assert set(counts) <= set(known)
    chi = sum((counts.get(a, 0) - 300 * p[a]) ** 2 / (300 * p[a]) for a in known)
    assert chi < 24.3, (chi, counts, {a: p[a] for a in known})  # 7 degrees of freedom, p = .001


def test_where_nothing_is_drafted_the_answer_is_the_same_and_one_sentence_says_so(model, family):
    batch, one = make_inputs(family, [1, 2]), single(family, [1, 2], 1)
    for inputs, option, words in (
        (batch, {}, "one prompt at a time"),
        (one, {"num_beams": 2}, "do not go with beams"),
        (one, {"cache_implementation": "static"}, "a cache of kind static"),
        (one, {"use_cache": False}, "use_cache=False"),
    ):
        how = {"max_new_tokens": 4, "do_sample": False, **option}
        expected = model.generate(**inputs, **how)
        with vlm_fix.wrapped(model, "draft"), pytest.warns(UserWarning, match=words):
            assert torch.equal(model.generate(**inputs, **how), expected)


def test_what_it_cannot_do_is_one_sentence(model, family):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, "draft"), pytest.raises(VlmFixError, match="drafts itself"):
        model.generate(**inputs, max_new_tokens=3, prompt_lookup_num_tokens=2)
    for stack in itertools.permutations(("draft", "knorm:keep=3")):
        with pytest.raises(VlmFixError, match="use one of the two"):
            vlm_fix.wrap(model, list(stack))
    with pytest.raises(VlmFixError, match="sliding windows"):
        vlm_fix.wrap(families.build("gemma3"), "draft")
    assert vlm_fix.drafted(model) is None


def test_a_generator_of_the_callers_own_is_asked_where_nothing_is_drafted(model, family):
    model._get_candidate_generator = lambda **given: ("own", given)
    try:
        with vlm_fix.wrapped(model, "draft"):
            assert model._get_candidate_generator(a=1) == ("own", {"a": 1})
        assert model._get_candidate_generator(a=2) == ("own", {"a": 2})
    finally:
        del model._get_candidate_generator


def test_queries_are_let_go_after_use(model, family):
    """Of layers that are listened to nothing is kept from one forward to the next."""
    for spec in ("draft", "fastv:keep=9,layer=2", "a_vl"):
        with vlm_fix.wrapped(model, spec):
            model.generate(**single(family, [1, 2], 1), max_new_tokens=4, do_sample=False)
            kept = [queries for module in model.modules() for queries in projections.HEARD.get(module, ())]
            assert kept and not any(kept), spec
    assert not any(projections.HEARD.get(module, ()) for module in model.modules())
