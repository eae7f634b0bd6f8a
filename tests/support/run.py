"""Running a model and comparing what it says."""

from __future__ import annotations

import functools

import torch
from transformers.generation.streamers import BaseStreamer

from tests.support.models import BUILD, single

VAR_TINY = "tau=2.2,min_visual_mass=0.1,rho=0.2,layers=1-3"  # random weights have no massive activations: lower gates
STEPS = 8


def greedy(model, inputs, steps=STEPS, **kwargs):
    """-> generated tokens [B, steps], raw logits [B, steps, V] of a greedy run."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **kwargs,
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), torch.stack(out.scores, 1)


def error(ours, theirs):
    """Largest difference, relative to the largest logit."""
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


OPTIONS = ({"cache_implementation": "static"}, {"prefill_chunk_size": 11}, {"prompt_lookup_num_tokens": 2})


def works_unwrapped(model, inputs, option):
    """Some versions of transformers cannot chunk a prompt with images; everything else must work."""
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    try:
        right = torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **option), expected)
    except (RuntimeError, ValueError):
        right = False
    assert right or "prefill_chunk_size" in option
    return right


@functools.cache
def works(family, number):
    """True if the model without a method can do the option with this number."""
    return works_unwrapped(BUILD[family](), single(family, [1, 2], 1), OPTIONS[number])


class Streamed(BaseStreamer):
    """A streamer that keeps the tokens of one prompt and its answer."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True
