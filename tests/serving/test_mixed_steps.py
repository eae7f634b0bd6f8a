"""What is computed together in a step: which requests are one batch, where their keys come from, and what vLLM need not compute.

Each path is seen to be taken, and answers as generate does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from tests.serving.support import CAPTION, PATH, QUESTION, Case, answer_of, cases, differences
from vlm_fix.attention.edits import Changes
from vlm_fix.call import Call
from vlm_fix.memory import Memory
from vlm_fix.serving import logits
from vlm_fix.serving.groups import Group
from vlm_fix.serving.plugin import planned
from vlm_fix.serving.sessions import BatchSession, LastRows, WholePrompts, joined, row_of, session_of
from vlm_fix.serving.settings import Settings
from vlm_fix.session import TEXT, VISUAL, Session
from vlm_fix.words import template_columns

ASKED = [*cases(4), Case((5, 6), CAPTION), Case((7,), CAPTION)]  # captions of one length, questions, two images
CAPTIONS = [Case((i,), CAPTION) for i in range(3)]  # long answers: of a question there are two tokens


@contextlib.contextmanager
def edited_groups() -> Iterator[list[Group]]:
    """The groups that are edited in the first layer while this lasts, step by step."""
    seen: list[Group] = []
    before = Group.edit

    def edit(group, *args):
        if not any(group is other for other in seen):
            seen.append(group)
        return before(group, *args)

    Group.edit = edit
    try:
        yield seen
    finally:
        Group.edit = before


@contextlib.contextmanager
def own_kernel() -> Iterator[list[int]]:
    """How many tokens vLLM's own attention was called for, call by call."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as Impl

    called: list[int] = []
    before = Impl.forward

    def forward(self, layer, query, *args, **kwargs):
        called.append(len(query))
        return before(self, layer, query, *args, **kwargs)

    Impl.forward = forward
    try:
        yield called
    finally:
        Impl.forward = before


@pytest.mark.parametrize(
    "spec", ["pai:alpha=1", "spin:keep=0.5", "hgai", "vhr+pai", "random_direction:strength=0.5,prompt_rows=last+pai"]
)
def test_last_rows_of_prompts_of_all_lengths_are_one_batch_on_the_keys_of_their_forward(engine, hf, spec):
    engine.use(spec)
    with edited_groups() as groups:
        mine = engine.answers(ASKED, 8)
    assert not differences(ASKED, mine, hf.answers(spec.split("+"), ASKED, 8))
    first = [g for g in groups if isinstance(g.session, LastRows)]
    assert max(len(g.requests) for g in first) == len(ASKED)
    assert all(g.spans is not None and len(g.tokens) == len(g.requests) for g in first)
    assert len({count for g in first for _, count in g.spans}) == 3
    assert all(isinstance(g.session, BatchSession) for g in groups), "no prompt is by itself"


def test_prompts_with_and_without_images_are_one_batch_where_a_method_needs_none(engine, hf):
    """vhr leaves text alone, locore does not."""
    spec, asked = "vhr+locore:beta=1", [Case((), CAPTION), *ASKED[:3], Case((), QUESTION.format("dog"))]
    engine.use(spec)
    with edited_groups() as groups:
        mine = engine.answers(asked, 8)
    theirs = [hf.answers(spec.split("+") if c.scenes else ["locore:beta=1"], [c], 8)[0] for c in asked]
    assert not differences(asked, mine, theirs)
    assert max(len(g.requests) for g in groups if isinstance(g.session, LastRows)) == len(asked)


@pytest.mark.parametrize("spec", ["gift", "var:sink_dims=0|1|2,tau=1.5,rho=0,min_visual_mass=0"])
def test_what_is_remembered_by_column_is_remembered_of_prompts_of_one_length(engine, hf, spec):
    engine.use(spec)
    with edited_groups() as groups:
        mine = engine.answers(ASKED, 8)
    assert not differences(ASKED, mine, hf.answers([spec], ASKED, 8))
    first = [g for g in groups if isinstance(g.session, LastRows | WholePrompts)]
    assert max(len(g.requests) for g in first) == 3
    assert all(len({s.prompt_len for s in g.session.sessions}) == 1 for g in first)


@pytest.mark.parametrize(
    "spec", ["vaf:enhance=1.5", "zerotuning", "rudder:layers=3,alpha=1+vaf:enhance=1.5", "memvr:threshold=0.05+vaf"]
)
def test_whole_prompts_of_one_length_are_one_batch(engine, hf, spec):
    engine.use(spec)
    with edited_groups() as groups:
        mine = engine.answers(ASKED, 8)
    assert not differences(ASKED, mine, hf.answers(spec.split("+"), ASKED, 8))
    whole = [g for g in groups if isinstance(g.session, WholePrompts)]
    assert max(len(g.requests) for g in whole) == 3 and all(g.spans is not None for g in whole)
    assert all(len(g.tokens) == g.session.length * len(g.requests) for g in whole)


def test_a_chunk_before_the_last_is_left_alone_and_the_last_takes_its_keys_from_pages(cached, hf):
    cached.use("pai:alpha=1")
    with edited_groups() as groups:
        mine = cached.answers(ASKED, 8)
    assert not differences(ASKED, mine, hf.answers(["pai:alpha=1"], ASKED, 8))
    assert all(isinstance(g.session, BatchSession) for g in groups), "a chunk without its prompt's last row was edited"
    assert any(isinstance(g.session, LastRows) and g.spans is None for g in groups)


def test_prompts_whose_beginning_is_cached_are_one_batch_on_their_pages(cached, hf):
    """Their images lie in the blocks that are cached, so that no step waits for an image."""
    asked = [Case((i,), " ".join([CAPTION] * (7 + i))) for i in range(3)]
    cached.use("pai:alpha=1")
    cached.answers(asked, 1)
    with edited_groups() as groups:
        outputs = cached.llm.generate(
            [cached.prompt(c) for c in asked], [cached.params(c, 8) for c in asked], use_tqdm=False
        )
    assert all(o.num_cached_tokens == 96 for o in outputs)
    assert not differences(asked, [answer_of(o) for o in outputs], hf.answers(["pai:alpha=1"], asked, 8))
    first = [g for g in groups if isinstance(g.session, LastRows)]
    assert [len(g.requests) for g in first] == [3] and first[0].spans is None
    assert len({s.prompt_len for s in first[0].session.sessions}) == 3


def test_whole_and_cached_prompts_of_one_step_are_two_batches(cached, hf):
    cached.use("pai:alpha=1")
    plain = [Case((), CAPTION), Case((), QUESTION.format("dog"))]
    known = Case((0,), " ".join([CAPTION] * 7))
    cached.answers([known], 1)
    asked = [plain[0], known, plain[1]]
    with edited_groups() as groups:
        mine = cached.answers(asked, 8)
    assert not differences(asked, mine, hf.answers(["pai:alpha=1"], asked, 8))
    assert [g.spans is None for g in groups if isinstance(g.session, LastRows)] == [True]  # text alone is not edited


def test_vllm_computes_no_row_that_is_written_over(engine, hf):
    """In steps of decode rows alone, in the layers that are edited; a neighbour without the method needs its rows."""
    spec = "pai:alpha=1,layers=2-3"
    engine.use(spec)
    depth = engine.served.engine.arch.depth
    asked = CAPTIONS
    with own_kernel() as called:
        mine = engine.answers(asked, 8)
    assert not differences(asked, mine, hf.answers([spec], asked, 8))
    assert sum(count == 3 for count in called) == 7 * (depth - 2)
    neighbour = [*asked[:2], Case(asked[2].scenes, asked[2].question, "off")]
    with own_kernel() as called:
        mine = engine.answers(neighbour, 8)
    theirs = [*hf.answers([spec], asked[:2], 8), *hf.answers([], asked[2:], 8)]
    assert not differences(neighbour, mine, theirs)
    assert sum(count == 3 for count in called) == 7 * depth


@pytest.mark.parametrize("spec", ["vhr", "visual_topk:k=5", "var:sink_dims=0|1|2,tau=1.5,rho=0,min_visual_mass=0"])
def test_it_does_where_a_method_starts_from_its_output_or_may_leave_it(engine, spec):
    engine.use(spec)
    with own_kernel() as called:
        engine.answers(CAPTIONS, 4)
    assert sum(count == 3 for count in called) == 3 * engine.served.engine.arch.depth


def test_text_only_passes_of_a_step_are_one_forward_and_each_question_is_read_once(engine, hf, monkeypatch):
    engine.use("vhr")
    beside, runs = engine.served.beside, []
    before = beside.run
    monkeypatch.setattr(
        beside, "run", lambda forward, *args: (runs.append(len(forward.lines)), before(forward, *args))[1]
    )
    theirs = hf.answers(["vhr"], ASKED, 8)
    beside.forget()
    assert not differences(ASKED, engine.answers(ASKED, 8), theirs)
    assert runs == [3]  # a caption and two questions, without their images
    assert not differences(ASKED, engine.answers(ASKED, 8), theirs)
    assert runs == [3]
    engine.llm.llm_engine.reset_encoder_cache()  # what is called after new weights
    assert not differences(ASKED, engine.answers(ASKED, 8), theirs)
    assert runs == [3, 3]


def test_few_prompts_of_text_are_kept(engine, monkeypatch):
    from vlm_fix.serving import beside as module

    engine.use("vhr")
    beside = engine.served.beside
    beside.forget()
    monkeypatch.setattr(module, "READ", 2)
    engine.answers([Case((0,), QUESTION.format(word)) for word in ("dog", "car", "boat")], 1)
    assert len(beside.read) == 2


def test_exits_are_made_some_rows_at_a_time(engine, hf, monkeypatch):
    monkeypatch.setattr(logits, "EXITS", 4)
    engine.use("deco+dola")
    asked = cases(6)
    assert not differences(asked, engine.answers(asked, 8), hf.answers(["deco", "dola"], asked, 8))


def test_exits_of_each_row_are_its_own(monkeypatch):
    monkeypatch.setattr(logits, "EXITS", 2)
    inputs = {i: torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2)}
    weights, places, read = torch.randn(4, 7), [8, 3, 5, 0, 1], []

    def head(x, norm):
        read.append(len(x))
        return (x.square() if norm else x) @ weights

    exits = logits.Exits(head, inputs, places)
    for i, place in enumerate(places):
        for layer in (1, 2):
            for norm in (True, False):
                torch.testing.assert_close(exits.of(i, layer, norm), head(inputs[layer][[place]], norm))
    assert sorted(n for n in read if n > 1) == [2] * 8  # five rows are two, two and one


@dataclass
class Noted(Memory):
    rows: torch.Tensor | None = None
    by_layer: dict[int, torch.Tensor] = field(default_factory=dict)
    number: int = 0


def test_a_batch_gives_each_request_what_it_would_remember_alone():
    own = [{"m": Noted(torch.full((1, 2), i), {3: torch.full((1, 2, 2), i)}, 7)} for i in (1.0, 2.0)]
    together = joined(own)
    assert together["m"].rows.shape == (2, 2)
    for i, alone in enumerate(own):
        back = row_of(together, i)["m"]
        assert torch.equal(back.rows, alone["m"].rows) and torch.equal(back.by_layer[3], alone["m"].by_layer[3])
        assert back.number == 7
    noted = Changes({1: True}, True)
    copied = row_of({"c": noted}, 0)["c"]
    copied.in_layer[1] = False
    assert noted.in_layer == {1: True} and copied.in_decode_rows


def test_keys_of_a_forward_are_found_wherever_its_prompts_lie():
    tokens = torch.arange(20.0).view(20, 1, 1).expand(20, 2, 3)
    session = Session(SimpleNamespace(), prompt_len=4)

    def given(spans, columns):
        return Group(SimpleNamespace(), session, [0], [0], columns, spans).given(tokens)[:, 0, :, 0].tolist()

    assert given([(2, 3), (5, 3)], 3) == [[2, 3, 4], [5, 6, 7]]
    assert given([(5, 3), (2, 3)], 3) == [[5, 6, 7], [2, 3, 4]]  # not in order
    assert given([(2, 3), (9, 3)], 3) == [[2, 3, 4], [9, 10, 11]]  # with others between them
    assert [row[:n] for row, n in zip(given([(0, 4), (4, 2)], 4), (4, 2), strict=True)] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("kind", [WholePrompts, LastRows])
def test_the_words_of_prompts_of_one_length_are_each_prompts_own(kind):
    engine = planned(Settings(("gift",)), PATH, None, False)
    image = int(engine.tokens[0])
    sessions = []
    for first in (2, 5, 9):
        ids = torch.arange(20, 40)[None].clone()
        ids[0, first : first + 4] = image
        ids[0, -1] = engine.model.config.get_text_config().eos_token_id
        call = Call(engine.model, engine.family, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        sessions.append(session_of(call, torch.where(ids == image, VISUAL, TEXT).to(torch.uint8)))
        sessions[-1].go_to(0, 20)
    with engine.acting(sessions[0]):
        alone = [template_columns(session, (1, 2)) for session in sessions]
        joint = template_columns(kind(sessions), (1, 2))
    assert torch.equal(joint, torch.cat(alone)) and len({str(x) for x in alone}) == 3
