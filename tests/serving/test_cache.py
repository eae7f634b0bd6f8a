"""Chunked prefill, the prefix cache, preemption and settings of single requests, with PAI on the last rows."""

from __future__ import annotations

import pytest

from tests.serving.support import CAPTION, QUESTION, Case, answer_of, cases, differences

PROMPTS = cases(6)
PAI = ["pai:alpha=1"]


def test_prompts_in_chunks(cached, hf):
    """A prompt of 76 tokens takes two steps of at most 48, and its image may lie in both."""
    asked = [*PROMPTS, Case((1, 2), CAPTION), Case((), CAPTION)]
    cached.llm.reset_prefix_cache()
    assert not differences(asked, cached.answers(asked), hf.answers(PAI, asked))


def test_a_second_request_takes_the_prompt_from_the_cache(cached, hf):
    cached.llm.reset_prefix_cache()
    first = cached.answers(PROMPTS)
    outputs = cached.llm.generate(
        [cached.prompt(c) for c in PROMPTS], [cached.params(c) for c in PROMPTS], use_tqdm=False
    )
    assert all(o.num_cached_tokens for o in outputs)
    assert not differences(PROMPTS, [answer_of(o) for o in outputs], first)


def test_edited_rows_are_never_given_to_a_longer_prompt(cached, hf):
    """A prompt that goes on with another's answer: its columns are prompt rows, which PAI leaves alone."""
    cached.llm.reset_prefix_cache()
    case = PROMPTS[0]
    from vllm import SamplingParams

    text = cached.prompt(case)
    answered = (
        cached.llm.generate([text], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].outputs[0].text
    )
    longer = {**text, "prompt": text["prompt"] + answered + " and"}
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    warm = cached.llm.generate([longer], params, use_tqdm=False)[0]
    cached.llm.reset_prefix_cache()
    cold = cached.llm.generate([longer], params, use_tqdm=False)[0]
    assert warm.num_cached_tokens == 64 and not cold.num_cached_tokens  # one block more would hold edited rows
    assert not differences([case], [answer_of(warm)], [answer_of(cold)])


def test_requests_switch_the_method_off_or_change_its_strength(cached, hf):
    """In one batch, and without touching their neighbours."""
    asked = [
        PROMPTS[0],
        Case(PROMPTS[1].scenes, CAPTION, "off"),
        Case(PROMPTS[2].scenes, CAPTION, {"alpha": 0.3}),
        Case(PROMPTS[3].scenes, CAPTION, {"pai": {"alpha": 2}}),
        Case(PROMPTS[4].scenes, CAPTION, {"pai": "off"}),
        Case(PROMPTS[5].scenes, CAPTION, "alpha=0.3"),
    ]
    plain = [Case(c.scenes, c.question) for c in asked]
    specs = [PAI, [], ["pai:alpha=0.3"], ["pai:alpha=2"], [], ["pai:alpha=0.3"]]
    theirs = [hf.answers(spec, [c])[0] for spec, c in zip(specs, plain, strict=True)]
    assert not differences(asked, cached.answers(asked), theirs)


@pytest.mark.parametrize(
    "xargs, words",
    [
        ({"alpha": "much"}, "no number"),
        ({"alpha": True}, "no number"),
        ({"layers": "0-"}, "cannot change for one request"),
        ({"vcd": {"alpha": 1}}, "runs pai"),
        ({"alpha": -1}, "at least 0"),
        ("on", 'give "off"'),
        ([1], 'give "off"'),
        ({}, 'give "off"'),
        ({"gamma": 1.5}, "started without"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(cached, xargs, words):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=words):
        cached.answers([Case((0,), CAPTION, xargs)])


def test_preempted_requests_go_on_as_if_they_had_not_been(hf):
    """The cache holds fewer blocks than the requests need, so that some are thrown out and computed again."""
    from tests.serving.support import Vllm

    small = Vllm("pai:alpha=1+m3id", num_gpu_blocks_override=12, max_model_len=128)
    asked = [Case((i,), " ".join([CAPTION] * 5)) for i in range(5)]  # 92 tokens: soon each needs a fourth block
    preempted = []
    scheduler = small.llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (
        preempted.append(request),
        before(request, *args, **kwargs),
    )[1]
    assert not differences(asked, small.answers(asked, 30), hf.answers(["pai:alpha=1", "m3id"], asked, 30))
    assert preempted


def test_an_aborted_request_leaves_nothing_behind(engine, hf):
    engine.use("vcd")
    llm = engine.llm.llm_engine
    llm.add_request("gone", engine.prompt(PROMPTS[0]), engine.params(PROMPTS[0], 30))
    for _ in range(5):
        llm.step()
    llm.abort_request(["gone"])
    assert not differences(PROMPTS[1:3], engine.answers(PROMPTS[1:3]), hf.answers(["vcd"], PROMPTS[1:3]))
    assert not [name for name in engine.served.requests if name.startswith("gone")]


def test_question_about_a_cached_image(cached, hf):
    cached.llm.reset_prefix_cache()
    cached.answers([Case((0,), CAPTION)])
    other = [Case((0,), QUESTION.format("dog")), Case((0,), QUESTION.format("kite"))]
    assert not differences(other, cached.answers(other), hf.answers(PAI, other))


def test_images_are_seen_once_more_where_the_cache_covers_them(hf):
    """A second branch and a pass with the image: vLLM sends no pixels of an image whose columns are cached."""
    from tests.serving.support import Vllm

    engine = Vllm("vcd", max_num_batched_tokens=48)
    asked = [*PROMPTS[:3], Case((1, 2), CAPTION)]
    for spec in ("vcd", "vista:prompt_rows=last"):
        engine.use(spec)
        theirs = hf.answers([spec], asked[:3]) + hf.answers([spec], asked[3:])
        assert not differences(asked, engine.answers(asked), theirs)
        outputs = engine.llm.generate(
            [engine.prompt(c) for c in asked], [engine.params(c) for c in asked], use_tqdm=False
        )
        assert [o.num_cached_tokens for o in outputs] == [64, 64, 64, 128]
        assert not differences(asked, [answer_of(o) for o in outputs], theirs)
