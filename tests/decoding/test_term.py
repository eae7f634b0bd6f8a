"""The size of a contrast's term: float64 loops over the branches recomputed at every step, and the control that matches it."""

from __future__ import annotations

import math

import pytest
import torch

import vlm_fix
from tests.support.models import PAD, VOCAB, make_inputs, single
from tests.support.references import base as ref
from tests.support.run import STEPS, error, greedy
from vlm_fix.decoding.contrast import plausible

IMAGES, SPEC = [1, 2, 1], "vcd:beta=0.05"


def distributions(model, twin, method, inputs, answer):
    """Per step of one answer: (log p, log p') in float64, from passes over prompt and answer without a cache."""
    call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), inputs)
    noised = {**inputs, "pixel_values": method.noised(inputs["pixel_values"], call)}
    pair = (ref.teacher_forced(twin, None, each, answer).log_softmax(-1) for each in (inputs, noised))
    return list(zip(*pair, strict=True))


def by_hand(steps, alpha, beta):
    """Sum of squared deviations and degrees of freedom of alpha (log p - log p') over the tokens with p >= beta max p."""
    squares, dof = 0.0, 0
    for p, q in steps:
        top = max(math.exp(x) for x in p.tolist())
        d = [alpha * float(p[v] - q[v]) for v in range(len(p)) if math.exp(float(p[v])) >= beta * top]
        mean = sum(d) / len(d)
        squares += sum((x - mean) ** 2 for x in d)
        dof += len(d) - 1
    return squares, dof


def pooled(model, twin, method, answers):
    """`by_hand` of all (inputs, answer tokens): a step for every token of an answer."""
    parts = [
        by_hand(distributions(model, twin, method, inputs, answer[:-1]), method.alpha, method.beta)
        for inputs, answer in answers
    ]
    return sum(s for s, _ in parts), sum(n for _, n in parts)


def check(term, squares, dof):
    assert dof > 10 and term.dof == dof
    assert term.squares == pytest.approx(squares, rel=1e-4)
    assert term.sd == pytest.approx(math.sqrt(squares / dof), rel=1e-4)


@pytest.mark.parametrize("beta", [0, 0.05, 0.6])
def test_greedy_batch_is_the_loop_over_its_rows(family, model, beta):
    spec = f"vcd:alpha=1.5,beta={beta}"
    twin, method = ref.double(model), vlm_fix.parse_spec(spec)
    with vlm_fix.wrapped(model, spec):
        assert vlm_fix.contrast_term(model) is None  # no call yet
        tokens, _, scores = greedy(model, make_inputs(family, IMAGES))
        term = vlm_fix.contrast_term(model)
    assert vlm_fix.contrast_term(model) is None  # unwrapped
    left = scores.isfinite().sum(-1)
    assert (left.min(), left.max()) == (VOCAB, VOCAB) if beta == 0 else left.max() < VOCAB
    assert beta < 0.6 or (left == 1).any(), "some row and step must have one token left"
    answers = [(single(family, IMAGES, row), tokens[row]) for row in range(3)]
    check(term, *pooled(model, twin, method, answers))
    assert 0.05 < term.sd < 20


def test_rows_behind_their_end_do_not_count(family, model):
    """Two tokens of the free answers made end tokens: rows stop at the first of them, the longest goes on."""
    inputs, twin, method = make_inputs(family, IMAGES), ref.double(model), vlm_fix.parse_spec(SPEC)
    with vlm_fix.wrapped(model, SPEC):
        free = greedy(model, inputs)[0]
        ends = [next(t for t in row[1:].tolist() if t not in free[2]) for row in free[:2]]
        tokens = greedy(model, inputs, eos_token_id=ends, pad_token_id=PAD)[0]
        term = vlm_fix.contrast_term(model)
    lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), STEPS) for row in free.tolist()]
    assert min(lengths) < STEPS and lengths[2] == STEPS
    assert [row[n:] for row, n in zip(tokens.tolist(), lengths, strict=True)] == [[PAD] * (STEPS - n) for n in lengths]
    answers = [(single(family, IMAGES, row), tokens[row, :n]) for row, n in enumerate(lengths)]
    check(term, *pooled(model, twin, method, answers))


def test_several_samples_of_one_prompt(family, model):
    one, twin, method = single(family, IMAGES, 0), ref.double(model), vlm_fix.parse_spec(SPEC)
    with vlm_fix.wrapped(model, SPEC):
        torch.manual_seed(4)
        tokens = model.generate(**one, max_new_tokens=5, do_sample=True, num_return_sequences=3)[:, -5:]
        term = vlm_fix.contrast_term(model)
        assert len({tuple(row) for row in tokens.tolist()}) > 1
        check(term, *pooled(model, twin, method, [(one, answer) for answer in tokens]))
        model.generate(**one, max_new_tokens=1, do_sample=False)  # a new call starts at nothing
        check(vlm_fix.contrast_term(model), *pooled(model, twin, method, [(one, tokens[0, :1])]))
        model.generate(**one, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
        assert vlm_fix.contrast_term(model) is None  # drafts are scored from made-up distributions


def test_beams_are_the_loop_over_what_was_combined(family, model, monkeypatch):
    """The distributions of every beam and step as the method was given them, pooled by loops."""
    seen, real = [], vlm_fix.registry.get_method("vcd").combine_at

    def combine_at(self, step, l, *negatives):
        seen.extend(zip(l.double(), negatives[0].double(), strict=True))
        return real(self, step, l, *negatives)

    monkeypatch.setattr(vlm_fix.registry.get_method("vcd"), "combine_at", combine_at)
    with vlm_fix.wrapped(model, SPEC):
        model.generate(**make_inputs(family, IMAGES), max_new_tokens=5, num_beams=3, do_sample=False)
        term = vlm_fix.contrast_term(model)
    assert len(seen) == 5 * 3 * 3
    check(term, *by_hand(seen, 1.0, 0.05))


def test_a_constant_and_what_was_forbidden_before_do_not_count():
    """Two rows by hand: deviations (-1, 1) and one token left; a constant of 100 and a token at -inf change nothing."""
    from vlm_fix.decoding.term import Term

    inf = torch.inf
    main = torch.tensor([[-1.0, -2.0, -3.0, -inf], [-1.0, -2.0, -3.0, -4.0]])
    added = torch.tensor([[3.0, 5.0, -inf, 1.0], [-inf, 7.0, -inf, -inf]])
    term, none = Term(None), torch.zeros(2, 0, dtype=torch.long)
    term.add(main, main + added + 100, none)
    assert (term.squares, term.dof, term.sd) == (2.0, 1, math.sqrt(2))
    one = Term(9)
    one.add(main, main + added, torch.tensor([[9, 1], [1, 1]]))  # the first row has ended
    assert (one.squares, one.dof, one.sd) == (0.0, 0, None)
    assert (Term([9]).squares, Term([9]).dof, Term([9]).sd) == (0.0, 0, None)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("spec", ["vcd:beta=0.3", "crops:beta=0.3", "owl:beta=0.3"])
def test_gated_rows_do_not_water_the_term_down(family, model, spec, beams, monkeypatch):
    """With a gate that falls both ways, the term is that of the contrasted rows alone, by loops over what was combined."""
    kind, seen = vlm_fix.registry.get_method(spec.partition(":")[0]), []
    inputs, how = make_inputs(family, IMAGES), {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with vlm_fix.wrapped(model, f"{spec},gate=1"):
        l = greedy(model, inputs)[1]
    l = plausible(l, l, 0.3) if kind.name == "crops" else l  # whose gate looks at what the cut-off leaves
    gate, real = float(l.softmax(-1).amax(-1).median()), kind.contrasted

    def contrasted(self, step, l, *negatives):
        new = real(self, step, l, *negatives)
        sure = torch.isclose(new, l).all(dim=1)
        seen.extend(zip(l.double(), new.double(), sure.tolist(), strict=True))
        return new

    monkeypatch.setattr(kind, "contrasted", contrasted)
    with vlm_fix.wrapped(model, f"{spec},gate={gate}"):
        model.generate(**inputs, **how)
        term = vlm_fix.contrast_term(model)
    squares, dof = 0.0, 0
    for l, new, sure in seen:
        d = [] if sure else [float(b - a) for a, b in zip(l, new, strict=True) if math.isfinite(b)]
        squares += sum((x - sum(d) / len(d)) ** 2 for x in d)
        dof += max(len(d) - 1, 0)
    assert 0 < sum(sure for *_, sure in seen) < len(seen) and term.gated[0] > 0
    assert (term.dof, term.squares) == (dof, pytest.approx(squares, rel=1e-3))


def test_noise_has_the_size_that_it_was_given(family, model):
    """Scores less log-probabilities of the control, row by row without their mean, at the size of a measured term."""
    inputs = make_inputs(family, IMAGES)
    with vlm_fix.wrapped(model, "vcd:beta=0"):
        greedy(model, inputs)
        sd = vlm_fix.contrast_term(model).sd
    with vlm_fix.wrapped(model, f"gaussian_logits:sigma={sd},seed=4"):
        _, logits, scores = greedy(model, inputs)
        assert vlm_fix.contrast_term(model) is None
    squares = 0.0
    for p, z in zip(logits.double().log_softmax(-1).flatten(0, 1), scores.double().flatten(0, 1), strict=True):
        d = [float(a - b) for a, b in zip(z, p, strict=True)]
        squares += sum((x - sum(d) / len(d)) ** 2 for x in d)
    dof = 3 * STEPS * (VOCAB - 1)
    assert math.sqrt(squares / dof) == pytest.approx(sd, rel=4 / math.sqrt(2 * dof))  # four standard errors


def test_a_neutral_contrast_has_no_term(family, model):
    with vlm_fix.wrapped(model, "vcd:alpha=0"):
        greedy(model, make_inputs(family, IMAGES), 2)
        assert vlm_fix.contrast_term(model) is None


def test_measuring_changes_no_bit(family, model, monkeypatch):
    from vlm_fix.decoding.term import Term

    inputs = make_inputs(family, IMAGES)
    with vlm_fix.wrapped(model, SPEC):
        measured = greedy(model, inputs)
        monkeypatch.setattr(Term, "add", lambda *_: None)
        plain = greedy(model, inputs)
    assert error(measured[2].nan_to_num(neginf=0.0), plain[2].double().nan_to_num(neginf=0.0)) == 0
    assert all(torch.equal(a, b) for a, b in zip(measured, plain, strict=True))
