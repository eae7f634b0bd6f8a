"""pine: any order of adjacent images gives the same logits; scores against complex rotations in float64 loops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import single
from tests.support.references.base import Reference, double, teacher_forced, visual_columns
from tests.support.run import error, greedy
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of
from vlm_fix.methods.procedures.pictures import image_blocks, in_order


def adjacent(model, family, count=3):
    """One prompt with its images side by side."""
    inputs = single(family, [count], 0)
    blocks = image_blocks(Call(model, arch_of(model).family, dict(inputs)))[0]
    between = {c for (_, end), (start, _) in itertools.pairwise(blocks) for c in range(end, start)}
    keep = [c for c in range(inputs["input_ids"].shape[1]) if c not in between]
    return {k: v[:, keep] if v.shape == inputs["input_ids"].shape else v for k, v in inputs.items()}


def test_any_order_of_the_images_gives_the_same_logits(model, family):
    inputs = adjacent(model, family)
    call = Call(model, arch_of(model).family, dict(inputs))
    prompts = [in_order(call, image_blocks(call), [order]) for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2))]
    plain = [greedy(model, prompt, 4)[1] for prompt in prompts]
    assert max(error(plain[0], p.double()) for p in plain[1:]) > 1e-2, "the order must matter to the model"
    with vlm_fix.wrapped(model, "pine"):
        led = [greedy(model, prompt, 4) for prompt in prompts]
    assert all(torch.equal(led[0][0], tokens) for tokens, *_ in led)
    assert max(error(led[0][1], logits.double()) for _, logits, _ in led[1:]) < 1e-4


@dataclass
class Loops(Reference):
    """Positions as whole numbers, rotations as complex numbers; one row of one head after the other."""

    blocks: tuple = ()  # (first, last) of each image

    def visible(self, mask):
        new = mask.clone()
        for (a, b), (c, d) in itertools.permutations(self.blocks, 2):
            new[a:b, c:d] = 0
        return new

    def projected(self, q, k, layer):
        self.qk = q, k

    def scores(self, z, layer):
        q, k = (self.bare(x) for x in self.qk)
        heads, length = z.shape[:2]
        first, end = self.blocks[0][0], self.blocks[-1][1]
        region = [c for a, b in self.blocks for c in range(a, b)]
        size = [b - a for a, b in self.blocks]
        raw = torch.einsum("hrd,hcd->hrc", q, k.conj()).real * 16**-0.5
        owner = {c: m for m, (a, b) in enumerate(self.blocks) for c in range(a, b)}
        for h in range(heads):
            between = {}
            for i, (a, b) in enumerate(self.blocks):
                other = [c for c in region if owner[c] != i]
                w = raw[h, a:b][:, other].softmax(dim=-1)
                s = [
                    w[:, [other.index(c) for c in range(*self.blocks[j])]].mean() if j != i else 1e9
                    for j in range(len(size))
                ]
                between[i] = sorted(range(len(size)), key=lambda j, s=s: -float(s[j]))
            for r in range(first, length):
                if r in owner:
                    order, place = between[owner[r]], r + end - self.blocks[owner[r]][1]
                else:
                    w = raw[h, r, region].softmax(dim=-1)
                    s = [w[[region.index(c) for c in range(a, b)]].mean() for a, b in self.blocks]
                    order, place = sorted(range(len(size)), key=lambda j, s=s: -float(s[j])), r
                at, back = torch.arange(length), 0
                for j in order:
                    a, b = self.blocks[j]
                    at[a:b] = torch.arange(end - back - size[j], end - back)
                    back += size[j]
                turn = torch.exp(1j * (place - at)[:, None] * self.theta)
                z[h, r] = (q[h, r] * turn * k[h].conj()).sum(dim=-1).real * 16**-0.5

    def bare(self, x):
        """[H, L, D] -> [H, L, D / 2] complex, without positions."""
        half = x.shape[-1] // 2
        self.theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        return torch.complex(x[..., :half], x[..., half:]) * torch.exp(
            -1j * torch.arange(x.shape[1])[:, None] * self.theta
        )


def test_logits_of_loops(models):
    model = models["llava"]
    inputs = adjacent(model, "llava", 2)
    with vlm_fix.wrapped(model, "pine"):
        tokens, logits, _ = greedy(model, inputs, 3)
    ids, start = inputs["input_ids"], visual_columns(inputs["input_ids"])[0]
    blocks = ((start, start + 36), (start + 36, start + 72))
    run = Loops(visual_columns(ids), ids.shape[1], [0, 1, 2, 3], rows="all", blocks=blocks)
    expected = teacher_forced(double(model), run, inputs, tokens[0, :-1])
    assert error(logits[0], expected) < 1e-4
    assert error(teacher_forced(double(model), None, inputs, tokens[0, :-1]), expected) > 1e-2


def test_a_single_image_is_answered_as_ever(model, family):
    inputs = single(family, [1], 0)
    plain = greedy(model, inputs, 3)
    with vlm_fix.wrapped(model, "pine"):
        led = greedy(model, inputs, 3)
    assert torch.equal(plain[0], led[0]) and error(led[1], plain[1].double()) < 1e-5


def test_windows_are_refused():
    model = families.build("gemma3")
    with (
        vlm_fix.wrapped(model, "pine"),
        pytest.raises(VlmFixError, match="pine:mask=false|pine needs each image as one run"),
    ):
        model.generate(**families.prompt("gemma3", [2]), max_new_tokens=2)
