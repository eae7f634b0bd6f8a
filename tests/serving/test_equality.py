"""Every served method in vLLM against Hugging Face's generate: the same tokens, log-probabilities within 1e-4.

Each day 5 of 20 scenes are compared, other ones than the day before; VLM_FIX_SERVING_SCENES=all compares all of them, and
VLM_FIX_SERVING_SCENES=3 those of day 3.
"""

from __future__ import annotations

import datetime
import os

import pytest

from tests.serving.cases import LITTLE, PRUNERS, SPECS, filled
from tests.serving.support import CAPTION, QUESTION, Case, cases, differences

DAY = os.environ.get("VLM_FIX_SERVING_SCENES") or str(datetime.date.today().toordinal())
PROMPTS = cases(20) if DAY == "all" else [*cases(20)[int(DAY) % 4 * 5 :]][:5]
MIXED = [
    *cases(4),
    Case((), CAPTION),
    Case((1, 2), CAPTION),
    Case((3,), CAPTION),
    Case((4, 5, 6), QUESTION.format("cat")),
    Case((), "Is there a dog?"),
    Case((3,), QUESTION.format("boat")),
]


@pytest.fixture(scope="module")
def plain(hf):
    return hf.answers([], PROMPTS, 16)


@pytest.mark.parametrize("spec", SPECS)
def test_a_served_method_answers_as_in_generate(engine, hf, plain, spec):
    engine.use(filled(spec))
    theirs = hf.answers(filled(spec).split("+"), PROMPTS, 16)
    assert not differences(PROMPTS, engine.answers(PROMPTS, 16), theirs)
    if spec not in LITTLE:
        assert differences(PROMPTS, plain, theirs), "the spec does not act, so that nothing was compared"


@pytest.mark.parametrize(
    "spec",
    [
        "pai:alpha=1",
        "var:sink_dims=0|1|2,tau=1.5,rho=0,min_visual_mass=0",
        "gift",
        "vhr",
        "iri",
        "deco",
        "vcd",
        "icd",
        "hulluedit:kappa=1",
        "memvr:threshold=0.05,ratio=0.5",
        "rudder:layers=3,alpha=1",
        "farsight",
        "pade:lam=1",
        "vista",
        "decore",
        "layercake",
    ],
)  # fmt: skip
def test_mixed_requests_that_arrive_while_others_are_answered(engine, hf, spec):
    """Prompts of text, of one and of several images, each in another step than the one before."""
    engine.use(spec)
    theirs = [hf.answers(spec.split("+"), [c], 12)[0] for c in MIXED]
    assert not differences(MIXED, engine.staggered(MIXED, every=2, words=12), theirs)


@pytest.mark.parametrize("spec", PRUNERS)
def test_pruned_images_take_fewer_placeholders_and_answer_as_in_generate(pruned, hf, spec):
    pruned.use(spec)
    asked = [*PROMPTS[:8], Case((1, 2), CAPTION), Case((), CAPTION)]
    outputs = pruned.llm.generate(
        [pruned.prompt(c) for c in asked], [pruned.params(c, 1) for c in asked], use_tqdm=False
    )
    for case, output in zip(asked, outputs, strict=True):
        assert sum(token == 4 for token in output.prompt_token_ids) == 16 * len(case.scenes)
    assert not differences(asked, pruned.answers(asked, 16), hf.answers(spec.split("+"), asked, 16))


def test_sampling_with_a_seed_is_the_same_for_a_request_alone_and_in_a_batch(engine):
    from vllm import SamplingParams

    engine.use("vcd")
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=12) for i in range(4)]
    prompts = [engine.prompt(c) for c in cases(4)]
    together = [o.outputs[0].token_ids for o in engine.llm.generate(prompts, params, use_tqdm=False)]
    alone = [
        engine.llm.generate([p], [s], use_tqdm=False)[0].outputs[0].token_ids
        for p, s in zip(prompts, params, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("spec", ["vcd", "m3id", "deco", "vcd:gate=0.9+deco"])
def test_a_penalty_acts_on_what_generate_would_give_it(engine, hf, spec):
    """Logits where a method acts on these: a repetition penalty divides positive scores and multiplies negative ones."""
    engine.use(spec)
    asked, stack = cases(6), spec.split("+")
    mine = engine.answers(asked, 16, repetition_penalty=1.3)
    theirs = hf.answers(stack, asked, 16, repetition_penalty=1.3)
    assert [a.tokens for a in mine] == [a.tokens for a in theirs]
    assert [a.tokens for a in theirs] != [a.tokens for a in hf.answers(stack, asked, 16)]
