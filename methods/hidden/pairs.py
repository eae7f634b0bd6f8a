"""Hidden states of a truthful and a hallucinated answer to the same prompt, of which directions are made."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix import Sample, VlmFixError
from vlm_fix.families import family_of, get_part, prompt_positions
from vlm_fix.families.compat import cache_of, with_cache
from vlm_fix.hooks import hooked


@torch.no_grad()
def answer_states(
    model: Any, samples: Sequence[Sample], tokens: str, progress: Callable[[str, float], None]
) -> torch.Tensor:
    """Layer outputs [pairs, 2, depth, C] float32 on the CPU, of each sample's truthful and hallucinated answer.

    tokens: "last" for the answer's last token; "answer" for the mean over the answer; "mean" over prompt and answer.
    """
    pairs = [s for s in samples if s.answers]
    if not pairs:
        raise VlmFixError(
            "no sample holds a truthful and a hallucinated answer; give pairs of captions (--pairs FILE)."
        )
    family, states = family_of(model), []
    layers = get_part(model, family.language).layers
    for n, sample in enumerate(pairs):
        positions, following = prompt_positions(model, family, sample.inputs)
        prompt, out = _outputs(model, layers, {**sample.inputs, "position_ids": positions})
        for ids in sample.answers or ():
            ids = ids.to(model.device)
            size = sample.inputs["input_ids"].shape[1] + ids.shape[1]
            places = following[:, None] + torch.arange(ids.shape[1], device=ids.device)
            step = {
                "input_ids": ids,
                "attention_mask": torch.ones(1, size, dtype=torch.long, device=ids.device),
                "position_ids": places.expand(3, -1, -1) if family.mrope else places,
            }
            rows, _ = _outputs(model, layers, with_cache(step, copy.deepcopy(cache_of(out))))
            rows = rows[:, -1:] if tokens == "last" else torch.cat([prompt, rows], 1) if tokens == "mean" else rows
            states.append(rows.mean(dim=1).cpu())
        progress("pairs", (n + 1) / len(pairs))
    return torch.stack(states).unflatten(0, (len(pairs), 2))


def _outputs(model: Any, layers: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Outputs [depth, n, C] of all layers in one forward, and what it returns."""
    kept: dict[int, torch.Tensor] = {}

    def keep(i: int, module: Any, args: Any, output: Any) -> None:
        kept[i] = (output[0] if isinstance(output, tuple) else output)[0].float()

    with hooked([layer.register_forward_hook(functools.partial(keep, i)) for i, layer in enumerate(layers)]):
        out = model(**inputs, use_cache=True)
    return torch.stack([kept[i].to(kept[0].device) for i in range(len(layers))]), out
