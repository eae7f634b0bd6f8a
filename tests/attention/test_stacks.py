"""Attention methods beside pruners and contrasts, and on a kept cache."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, make_inputs, single
from tests.support.run import greedy
from vlm_fix import LogWeightEdit, ScoreEdit
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.kernel import Scores, edited_weights
from vlm_fix.attention.stages import LayerEdits, Stages
from vlm_fix.call import Call
from vlm_fix.families.compat import CACHE, cache_of
from vlm_fix.rows import Rows
from vlm_fix.session import TEXT, Session


def test_column_edits_beside_pruner_and_contrast_answer_batch_as_single(family, model):
    stack = ["hiprune:keep=4", "vcd:beta=0.01", "zerotuning:rate=0.2", "avar:system=0.4", "locore:beta=0.9", "hgai"]
    images, heads = [1, 2, 1], "ad_hh:threshold=0.15,head_list=0.0|1.1|3.2"
    with vlm_fix.wrapped(model, [*stack, heads, "gift:source_layer=1,layers=2-3", "spin:keep=0.5"]):
        tokens = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


def test_encoder_scores_follow_the_tokens_a_pruner_keeps(family, model):
    """Encoder scores for PAINT beside a pruner's own; the scores follow the tokens that are kept."""
    images, stack = [1, 2, 1], ["hiprune:keep=6", "paint", "tame", "act:threshold=0.06", "vcd:beta=0.01"]
    with vlm_fix.wrapped(model, stack):
        tokens = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


SECOND = ["cca", "tame", "act:threshold=0.06", "paint", "paint:alpha=1.5,head_scale=sensitive,layers=0-"]


@pytest.mark.parametrize("spec", SECOND)
def test_next_question_on_a_kept_cache_is_edited(family, model, spec):
    """The next question, asked on the first turn's cache. CCA only changes inputs: the whole prompt gives the same."""
    inputs = single(family, [2], 0)
    images = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    with vlm_fix.wrapped(model, spec):
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family == "qwen2_5_vl":
            turn["mm_token_type_ids"] = (ids == IMAGE).int()
        again = model.generate(**turn, **{CACHE: cache_of(first)}, **options)
        whole = model.generate(**turn, **images, **options)
    plain = model.generate(**turn, **images, **options)
    logits, expected, before = (torch.stack(out.logits) for out in (again, whole, plain))
    assert torch.isfinite(logits).all() and not torch.allclose(logits[0], before[0], atol=1e-3)
    if spec == "cca":
        assert torch.equal(again.sequences, whole.sequences) and torch.allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_registers_are_weighed_against_what_all_edits_leave_of_the_scores(order):
    gen = torch.Generator().manual_seed(0)
    query, key, bump, weight = (torch.randn(1, 2, n, 4, generator=gen) for n in (3, 7, 3, 3))
    bump, weight = (x @ torch.randn(4, 7, generator=gen) for x in (bump, weight))

    class Adds(ScoreEdit):
        name: ClassVar[str] = "adds"

        def edit_scores(self, scores, rows):
            return scores + bump

    class Weighs(LogWeightEdit):
        name: ClassVar[str] = "weighs"

        def log_weights(self, rows):
            return weight

    session = Session(Call(None, None, {}), prompt_len=7)
    session.advance(0, torch.full((1, 7), TEXT, dtype=torch.uint8))
    places, nothing = torch.arange(4, 7), torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    stack = [(vlm_fix.parse_spec("farsight:registers=5,sigma=0.3"), Adds(), Weighs())[i] for i in order]
    rows = [Rows(1, session, edit, places, nothing, nothing, nothing) for edit in stack]
    allowed = (torch.arange(7) <= places[:, None])[None, None]
    given = QueryRows(query, key, key, allowed, Scores(0.7, None))
    a = edited_weights(given, LayerEdits(Stages.of(stack), rows, [None] * 3))
    for h, r in itertools.product(range(2), range(3)):
        z = 0.7 * (key[0, h].double() @ query[0, h, r].double()) + bump[0, h, r].double() + weight[0, h, r].double()
        mass = z[: 5 + r].exp()
        registers = sum(math.exp(-0.3 * d) for d in range(1, 6))
        torch.testing.assert_close(a[0, h, r, : 5 + r].double(), mass / (mass.sum() + registers), rtol=0, atol=1e-6)
