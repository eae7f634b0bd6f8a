"""What every contrast can do besides: a gate on the model's own confidence, and the scaling by its entropy."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import vlm_fix
from tests.support.models import make_inputs, single
from tests.support.references import base as ref
from tests.support.references.contrast import distribution
from tests.support.run import error, greedy
from tests.support.tensors import OBJECTS
from vlm_fix.decoding import branch

IMAGES, STEPS = [1, 2, 1], 6
SPECS = ["vcd:beta=0.01", "icd:tokens=11|12|13,beta=0.1", "sid:beta=0", "decore:head_list=1.0|1.3|2.2|3.1",
         "pai:alpha=0.5,gamma=1.5", "m3id:decay=0.3,beta=0.01", "causalmm:vision=none"]  # fmt: skip

MODES = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}]


def top(model, inputs):
    """Greedy top probabilities [B, STEPS] of the model alone."""
    return greedy(model, inputs, STEPS)[1].softmax(-1).amax(-1)


@pytest.mark.parametrize("entropy", ["none", "nats", "normalised"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.partition(":")[0])
def test_scores_equal_loops_and_both_sides_of_the_gate_are_seen(family, model, spec, entropy):
    inputs, twin, rest = single(family, IMAGES, 1), ref.double(model), ""
    if entropy != "none":
        if spec.startswith("decore"):
            with pytest.raises(vlm_fix.VlmFixError, match="grows with the entropy in any case"):
                vlm_fix.wrap(model, f"{spec},entropy={entropy}")
            return
        rest = f",entropy={entropy}"
    with vlm_fix.wrapped(model, spec + rest):
        first = greedy(model, inputs, STEPS)[1].softmax(-1).amax(-1)[0]
    bound = float(first[0]) + 1e-3  # the first token is contrasted
    whole = f"{spec}{rest},gate={min(bound, 0.99)}"
    with vlm_fix.wrapped(model, whole):
        tokens, logits, scores = greedy(model, inputs, STEPS)
        term = vlm_fix.contrast_term(model)
    kept = 0
    for t in range(STEPS):
        own, theirs = logits[0, t].log_softmax(-1), distribution(model, twin, whole, inputs, tokens[0, :t])
        cut, ours = torch.isinf(theirs), scores[0, t].log_softmax(-1)
        assert torch.equal(torch.isinf(ours), cut) and error(ours[~cut], theirs[~cut]) < 1e-5
        sure = float(own.exp().max()) >= min(bound, 0.99)
        assert torch.allclose(ours, own, atol=1e-6) == sure, (
            "a row is left as it is where the model is sure, and only there"
        )
        kept += sure
    assert term.gated == (kept, STEPS)


def test_gate_falls_both_ways_in_a_batch_and_rows_do_not_touch_each_other(family, model):
    inputs = make_inputs(family, IMAGES)
    bound = float(top(model, inputs).median())
    with vlm_fix.wrapped(model, f"vcd:beta=0.01,gate={bound},entropy=nats"):
        _, logits, scores = greedy(model, inputs, STEPS)
        term = vlm_fix.contrast_term(model)
        rows = [greedy(model, single(family, IMAGES, i), STEPS)[2][0] for i in range(3)]
    sure = logits.softmax(-1).amax(-1) >= bound
    assert term.gated == (int(sure.sum()), 3 * STEPS) and 0 < int(sure.sum()) < 3 * STEPS
    for i, alone in enumerate(rows):
        assert torch.equal(torch.isinf(alone), torch.isinf(scores[i]))
        assert torch.allclose(alone, scores[i], atol=2e-4)
    assert torch.equal(scores[sure].log_softmax(-1), logits[sure].log_softmax(-1)), "no bit of a gated row"


GATED = ["vcd", "crops", "owl", "m3id", "marine:objects=" + str(OBJECTS), "decore:head_list=1.0", "attention_buckets"]


@pytest.mark.parametrize("spec", GATED, ids=lambda s: s.partition(":")[0])
def test_a_gated_step_hands_on_the_logits_as_they_are(family, model, spec):
    """Not as log-probabilities: a repetition penalty, which looks at signs, then says what it says to the plain model."""
    inputs, options = make_inputs(family, IMAGES), {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.5}
    plain = model.generate(**inputs, **options)
    with vlm_fix.wrapped(model, spec + (":" if ":" not in spec else ",") + "gate=0.001"):
        _, logits, scores = greedy(model, inputs, 3)
        assert torch.equal(scores, logits)
        assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("spec", ["vcd:beta=0", "crops:beta=0", "m3id", "owl", "sid:beta=0"])
def test_a_contrast_whose_gate_never_opened_is_told_once(family, model, spec, options):
    inputs, options = make_inputs(family, IMAGES), {"max_new_tokens": 3, "do_sample": False, **options}
    for gate, said in ((0.001, 1), (1.0, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with vlm_fix.wrapped(model, spec + (":" if ":" not in spec else ",") + f"gate={gate}"):
                model.generate(**inputs, **options)
                model.generate(**inputs, **options)
        told = [str(w.message) for w in caught if "changed nothing" in str(w.message)]
        assert len(told) == said and all(f"as sure as gate={gate:g} asks" in text for text in told)


@pytest.mark.parametrize("options", MODES, ids=lambda o: next(iter(o), "greedy"))
@pytest.mark.parametrize("spec", ["sid:beta=0.01", "icd:tokens=11|12|13"])
def test_a_branch_that_nobody_needs_waits_and_catches_up(family, model, spec, options, monkeypatch):
    """Steps at which all rows are sure are left out of the branch, and none of its later scores shows it."""
    inputs, runs, forward = single(family, IMAGES, 1), [], branch.Branch._forward
    monkeypatch.setattr(branch.Branch, "_forward", lambda self, *a: runs.append(1) or forward(self, *a))
    bound = float(top(model, inputs)[0].sort().values[1])  # most steps are sure

    def run():
        torch.manual_seed(2)
        runs.clear()
        more = {"max_new_tokens": STEPS, "do_sample": False, **options}
        return model.generate(**inputs, **more).tolist(), len(runs)

    with vlm_fix.wrapped(model, f"{spec},gate={bound}"):
        tokens, few = run()
        monkeypatch.setattr(branch.Branch, "may_wait", False)
        expected, many = run()
    assert tokens == expected and few <= many
    if not options:
        assert few < many == STEPS


def test_defaults_leave_positions_specs_and_other_methods_alone(models):
    vcd = vlm_fix.registry.get_method("vcd")
    assert vcd(0.5, 0.2) == vlm_fix.parse_spec("vcd:alpha=0.5,beta=0.2") and vcd(0.5).given == {"alpha"}
    assert vcd(0.5, gate=0.9).spec() == "vcd:gate=0.9,alpha=0.5"
    for bad in ("gate=0", "gate=1.1", "entropy=yes"):
        with pytest.raises(vlm_fix.VlmFixError, match="vcd: (gate|entropy)"):
            vlm_fix.parse_spec(f"vcd:{bad}")
    with pytest.raises(vlm_fix.VlmFixError, match="pai: gate and entropy act on its contrast, which these parameters"):
        vlm_fix.wrap(models["llava"], "pai:gate=0.5")
    with pytest.raises(vlm_fix.VlmFixError, match="no parameter"):
        vlm_fix.parse_spec("deco:gate=0.5")


def test_three_tokens_by_hand():
    """p = (.6, .3, .1) against q = (.5, .1, .4); H(p) = .8979."""
    p, q = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
    h = -sum(v * math.log(v) for v in (0.6, 0.3, 0.1))

    def scores(spec):
        return vlm_fix.parse_spec(spec).contrasted(0, p, q)[0].tolist()

    assert scores("vcd:beta=0.4,gate=0.6") == p[0].tolist()
    assert scores("vcd:beta=0.4,gate=0.61") == scores("vcd:beta=0.4")
    expected = [math.log(0.6) + h * math.log(1.2), math.log(0.3) + h * math.log(3), -math.inf]
    assert scores("vcd:beta=0.4,entropy=nats") == pytest.approx(expected)
    expected = [
        math.log(0.6) + h / math.log(3) * math.log(1.2),
        math.log(0.3) + h / math.log(3) * math.log(3),
        -math.inf,
    ]
    assert scores("vcd:beta=0.4,entropy=normalised") == pytest.approx(expected)
