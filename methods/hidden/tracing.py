"""Causal tracing: how much of a right answer's probability each part of a model gives back to a run on a noised image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix import Sample, VlmFixError
from vlm_fix.calibration.search import LastRow, batches
from vlm_fix.call import Call
from vlm_fix.families import family_of, get_part
from vlm_fix.hidden.wing import writers
from vlm_fix.hooks import hooked, overwrite


def recovery_rates(
    model: Any,
    samples: Sequence[Sample],
    parts: dict[str, str],
    noise: float,
    seed: int,
    progress: Callable[[str, float], None],
) -> dict[str, tuple[float, ...]]:
    """For each name in `parts`, of what a layer writes (a place of `writers`): the recovery rate of each layer, see `IRI`.

    noise: in standard deviations of an image's own pixel values. VlmFixError where no answer is unsettled by it.
    """
    layers = get_part(model, (family := family_of(model)).language).layers
    seeds = torch.randint(2**62, (len(samples),), generator=torch.Generator().manual_seed(seed)).tolist()
    spots = {(name, i): writers(layer)[parts[name]] for name in parts for i, layer in enumerate(layers)}
    gain = dict.fromkeys(spots, 0.0)
    lost, used, done = 0.0, 0, 0
    for part, inputs in batches(samples, 16, model.generation_config.pad_token_id or 0):
        target, other = (torch.tensor([getattr(samples[i], n) for i in part]) for n in ("target", "other"))
        logits, kept = LastRow(model, inputs).outputs(spots)
        clean = logits.cpu().softmax(-1)
        noised = [_noised(Call(model, family, samples[i].inputs), noise, seeds[i]) for i in part]
        corrupt_run = LastRow(model, {**inputs, "pixel_values": torch.cat(noised)})
        rows = torch.arange(len(part))
        corrupt = corrupt_run.logits().cpu().softmax(-1)[rows, target]
        right = (clean[rows, target] > clean[rows, other]) & (clean[rows, target] > corrupt)
        lost += float((clean[rows, target] - corrupt)[right].sum())
        used += int(right.sum())
        for spot, module in spots.items():
            with hooked([overwrite(module, kept[spot])]):
                patched = corrupt_run.logits().cpu().softmax(-1)[rows, target]
            gain[spot] += float((patched - corrupt)[right].sum())
        done += len(part)
        progress("causal tracing", done / len(samples))
    if not used:
        raise VlmFixError(
            "iri: no question was answered right and then unsettled by the noise; use more or easier questions, or "
            "more noise (iri:noise=5)."
        )
    return {name: tuple(round(gain[name, i] / lost, 6) for i in range(len(layers))) for name in parts}


def _noised(call: Call, scale: float, seed: int) -> torch.Tensor:
    """Pixel values plus noise of `scale` times their own standard deviation."""
    noise = torch.Generator().manual_seed(seed)
    return call.with_pixels(lambda x: x + scale * x.std() * torch.randn(x.shape, generator=noise).to(x))["pixel_values"]
