"""What papers tune by hand for one model, found from labelled samples and kept in a small JSON that `wrap` reads.

A method finds its own parameters in `Method.calibrate`; `vlm-fix calibrate` makes the samples, searches strengths and
writes the file. wrap(model, "iri", calibration="iri.json") fills the fields that are not given from it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_fix.families import family_of, prompt_positions
from vlm_fix.families.compat import cache_of, with_cache
from vlm_fix.hooks import hooked, made
from vlm_fix.method import Method
from vlm_fix.sample import Sample
from vlm_fix.wrapping import wrapped

Key = TypeVar("Key")
# Molmo 2: a token's patches, counted through all images of a batch [..., patches, C]; -1 fills up
POOLED = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}


def collate(samples: Sequence[Sample], pad_id: int = 0) -> dict[str, Tensor]:
    """The samples' inputs as one left-padded batch: ids, masks [B, L]; images one after the other."""
    batch: dict[str, Tensor] = {}
    width = max(s.inputs["input_ids"].shape[1] for s in samples)
    for key in samples[0].inputs:
        rows = [s.inputs[key] for s in samples]
        if _along_prompt(samples[0], key):
            fill = pad_id if key == "input_ids" else 0
            rows = [pad(r, (width - r.shape[1], 0), value=fill) for r in rows]
        if pixels := POOLED.get(key):
            before = itertools.accumulate((s.inputs[pixels].shape[:-1].numel() for s in samples), initial=0)
            rows = [torch.where(r < 0, r, r + n) for r, n in zip(rows, before, strict=False)]
        packed = key == "pixel_values" and "target_sizes" in samples[0].inputs  # MiniCPM-V: all patches in one row
        batch[key] = torch.cat(rows, dim=-1 if packed else 0)
    return batch


def _along_prompt(sample: Sample, key: str) -> bool:
    return sample.inputs[key].shape == sample.inputs["input_ids"].shape


def batches(samples: Sequence[Sample], size: int, pad_id: int = 0) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices of the samples, their collated inputs) in batches of similar length.

    Images of other sizes (more tiles, for one) cannot be in one tensor and come in batches of their own.
    """

    def shapes(s: Sample) -> tuple[Any, ...]:
        return tuple((k, tuple(v.shape[1:])) for k, v in sorted(s.inputs.items()) if not _along_prompt(s, k))

    def order(i: int) -> tuple[Any, ...]:
        return shapes(samples[i]), samples[i].inputs["input_ids"].shape[1]

    for _, group in itertools.groupby(sorted(range(len(samples)), key=order), key=lambda i: shapes(samples[i])):
        same = list(group)
        for start in range(0, len(same), size):
            part = same[start : start + size]
            yield part, collate([samples[i] for i in part], pad_id)


@torch.no_grad()
def answer_scores(model: Any, samples: Sequence[Sample], batch_size: int = 16) -> Tensor:
    """Scores [N, 2], on the CPU, of each sample's (target, other) as first answer token.

    They are what greedy `generate` compares, so contrasts and logit edits of a wrapped model are in them; of an unwrapped
    model they are raw logits. Calls `generate`: batches of `batch_size`, one new token.
    """
    result = torch.empty(len(samples), 2)
    pad_id = model.generation_config.pad_token_id or 0
    for part, inputs in batches(samples, batch_size, pad_id):
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True, output_scores=True
        )
        for row, i in enumerate(part):
            result[i] = out.scores[0][row, [samples[i].target, samples[i].other]].float().cpu()
    return result


def accuracy(scores: Tensor) -> float:
    """Share of the questions whose right answer scores higher; scores [N, 2] of `answer_scores`."""
    return float((scores[:, 0] > scores[:, 1]).float().mean())


def sureness(scores: Tensor) -> float:
    """Mean log-probability of the right one of the two answers; a cut-off answer is bounded at -30."""
    margin = (scores[:, 0] - scores[:, 1]).nan_to_num(nan=-30.0).clamp(-30, 30)
    return float(torch.nn.functional.logsigmoid(margin).mean())


def best_value(
    model: Any,
    method: Method,
    name: str,
    values: Sequence[Any],
    samples: Sequence[Sample],
    progress: Callable[[str, float], None],
) -> Any:
    """The value of the field `name` with most right answers, then the surest; None if the model alone has them.

    Cost: one pass over the samples for each value, and one.
    """
    scores = {}
    for value in (None, *values):
        with wrapped(model, "baseline" if value is None else dataclasses.replace(method, **{name: value})):
            found = answer_scores(model, samples)
        scores[value] = (accuracy(found), sureness(found))
        progress(name, len(scores) / (len(values) + 1))
    return max(scores, key=lambda value: scores[value])


class LastRow:
    """A batch of prompts whose last row can be run again and again under the caller's hooks, at a decode step's cost.

    What only the last row computes can be changed there exactly: everything before it is in the cache (a prompt that is
    not causal, or whose rows read images elsewhere, is run whole, so hooks must write to row -1 only). `inputs` is what
    `collate` makes.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor]):
        self.model, self.inputs, family = model, inputs, family_of(model)
        self.cache = None
        if family.causal and not family.crosses:
            self.positions, _ = prompt_positions(model, family, inputs)
            size = inputs["input_ids"].shape
            before = {k: v[:, :-1] if v.shape == size else v for k, v in inputs.items()}
            with torch.no_grad():
                out = model(**before, position_ids=self.positions[..., :-1], use_cache=True)
            self.cache = cache_of(out)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[B, V] float32 logits of the answer's first token."""
        if self.cache is None:
            return self.model(**self.inputs).logits[:, -1].float()
        step = {
            "input_ids": self.inputs["input_ids"][:, -1:],
            "attention_mask": self.inputs["attention_mask"],
            "position_ids": self.positions[..., -1:],
        }
        # a copy: sliding-window caches cannot be cropped
        return self.model(**with_cache(step, copy.deepcopy(self.cache))).logits[:, -1].float()

    def outputs(self, modules: Mapping[Key, torch.nn.Module]) -> tuple[Tensor, dict[Key, Tensor]]:
        """`logits`, and what each of `modules` puts out in the last row, [B, C]."""
        kept: dict[Key, Tensor] = {}

        def keep(key: Key, module: Any, args: Any, output: Any) -> None:
            kept[key] = made(args, output)[:, -1].clone()

        with hooked([m.register_forward_hook(functools.partial(keep, key)) for key, m in modules.items()]):
            return self.logits(), kept
