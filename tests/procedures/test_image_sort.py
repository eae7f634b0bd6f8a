"""image_sort: the order that images come in does not matter; scores and orders against loops in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations

import pytest
import torch

import vlm_fix
from tests.support.models import GRIDS, make_inputs, single
from tests.support.references.base import Reference, double, teacher_forced
from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.errors import VlmFixError
from vlm_fix.methods.procedures.pictures import image_blocks, in_order
from vlm_fix.wing import engine_of

IMAGES, HOW = [1, 3], {"max_new_tokens": 5, "do_sample": False}


def refined(model, inputs, spec):
    with vlm_fix.wrapped(model, spec):
        engine = engine_of(model)
        return {**inputs, **engine.wing(ProcedureWing).refine(Call(model, engine.family, dict(inputs)))}


def call_of(model, inputs):
    with vlm_fix.wrapped(model, "baseline"):
        from vlm_fix.families import arch_of

        return Call(model, arch_of(model).family, dict(inputs))


def moved(model, inputs, order):
    """The prompt of one row with its images in another order."""
    call = call_of(model, inputs)
    return in_order(call, image_blocks(call), [order])


def test_images_move_with_their_tokens(model, family):
    """By hand: three images of different sizes, their blocks and pixels."""
    inputs = single(family, IMAGES, 1)
    ids, new = inputs["input_ids"][0].tolist(), moved(model, inputs, (2, 0, 1))
    if family == "llava":
        assert new["input_ids"][0].tolist() == ids
        assert torch.equal(new["pixel_values"], inputs["pixel_values"][[2, 0, 1]])
        return
    sizes = [h * w for h, w in (GRIDS[1], GRIDS[2], GRIDS[0])]  # the first row's image comes before
    starts, blocks = [i for i, token in enumerate(ids) if token == 93], []
    for start, size in zip(starts, sizes, strict=True):
        blocks.append(ids[start : start + size // 4 + 2])
    between = [ids[a + len(b) : c] for a, b, c in zip(starts, blocks, [*starts[1:], len(ids)], strict=True)]
    expected = ids[: starts[0]] + [t for i, o in enumerate((2, 0, 1)) for t in blocks[o] + between[i]]
    assert new["input_ids"][0].tolist() == expected
    parts = inputs["pixel_values"].split(sizes)
    assert torch.equal(new["pixel_values"], torch.cat([parts[i] for i in (2, 0, 1)]))
    assert torch.equal(new["image_grid_thw"], inputs["image_grid_thw"][[2, 0, 1]])


@pytest.mark.parametrize("spec", ["image_sort", "image_sort:toward=ends,per=token,layers=1-2"])
def test_the_order_that_images_come_in_does_not_matter(model, family, spec):
    inputs = single(family, IMAGES, 1)
    prompts = [moved(model, inputs, order) for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2))]

    def answers():
        return {tuple(model.generate(**prompt, **HOW)[0, -5:].tolist()) for prompt in prompts}

    assert len(answers()) > 1, "the order must matter to the model, else this shows nothing"
    with vlm_fix.wrapped(model, spec):
        assert len(answers()) == 1


@dataclass
class Seen(Reference):
    row: dict = field(default_factory=dict)  # (layer, head) -> the last row

    def weight(self, a, layer, head, row):
        self.row[layer, head] = a.clone()
        return a


def attention(twin, inputs, blocks, layers, per):
    """Per image, in the order of the prompt."""
    ids = inputs["input_ids"][0]
    run = Seen([0], len(ids), layers)  # its last row alone
    teacher_forced(twin, run, inputs, ids[:0])
    scores = []
    for first, last in blocks:
        columns = [j for j in range(first, last) if int(ids[j]) == 90]
        mean = sum(sum(float(a[j]) for j in columns) for a in run.row.values()) / len(run.row)
        scores.append(mean if per == "image" else mean / len(columns))
    return scores


@pytest.mark.parametrize("orders", ["all", "given"])
@pytest.mark.parametrize(("toward", "per", "layers"), [("end", "image", (0, 1, 2, 3)), ("ends", "token", (1, 3))])
def test_against_loops(model, family, orders, toward, per, layers):
    inputs, twin = single(family, IMAGES, 1), double(model)
    order = (0, 1, 2)
    for _ in range(2 if orders == "given" else 1):
        totals = dict.fromkeys(range(3), 0.0)
        tried = list(permutations(range(3))) if orders == "all" else [order]
        for now in tried:
            new = moved(model, inputs, now)
            found = attention(twin, new, image_blocks(call_of(model, new))[0], list(layers), per)
            for image, score in zip(now, found, strict=True):
                totals[image] += score / len(tried)
        low, middle, high = sorted(order, key=lambda i: totals[i])
        order = (low, middle, high) if toward == "end" else (middle, low, high)
    names = "|".join(map(str, layers))
    got = refined(model, inputs, f"image_sort:orders={orders},rounds=2,toward={toward},per={per},layers={names}")
    expected = moved(model, inputs, order)
    assert all(torch.equal(got[k], expected[k]) for k in ("input_ids", "pixel_values"))


def test_a_batch_equals_single_runs_and_one_image_is_told(model, family):
    with vlm_fix.wrapped(model, "image_sort"):
        rows = model.generate(**make_inputs(family, IMAGES), **HOW)[:, -5:]
        for i in range(2):
            with pytest.warns(UserWarning, match="holds several images") if i == 0 else pytest.MonkeyPatch.context():
                assert torch.equal(model.generate(**single(family, IMAGES, i), **HOW)[0, -5:], rows[i])


def test_too_many_images_are_one_sentence(model, family):
    inputs = single(family, [5], 0)
    with vlm_fix.wrapped(model, "image_sort"), pytest.raises(VlmFixError, match="use orders=given"):
        model.generate(**inputs, **HOW)
    with vlm_fix.wrapped(model, "image_sort:orders=given"):
        model.generate(**inputs, **HOW)
