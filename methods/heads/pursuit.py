"""Which words explain what a head writes: matching pursuit, and the rows that it wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix.calibration.search import batches
from vlm_fix.families import output_projection
from vlm_fix.hooks import hooked
from vlm_fix.sample import Sample


def explained(y: torch.Tensor, dictionary: torch.Tensor, atoms: int) -> float:
    """Share of the variance of y [n, C] that SOMP explains with at most `atoms` of the unit rows of dictionary [k, C]."""
    residual, unused = y, torch.ones(len(dictionary), dtype=torch.bool, device=y.device)
    basis: list[torch.Tensor] = []
    for _ in range(min(atoms, *dictionary.shape)):
        j = int((residual @ dictionary.T).abs().sum(dim=0).masked_fill(~unused, -1).argmax())
        unused[j] = False
        q = dictionary[j]
        for _ in range(2):  # twice is enough for an orthogonal basis
            for b in basis:
                q = q - (q @ b) * b
        if float(q.norm()) < 1e-4:  # a word that the chosen ones already span
            continue
        basis.append(q / q.norm())
        residual = residual - (residual @ basis[-1])[:, None] * basis[-1]
    total = y.square().sum()
    return float(1 - residual.square().sum() / total) if total > 0 else 0.0


def written_rows(
    model: Any, modules: Sequence[Any], samples: Sequence[Sample], tokens: int, progress: Callable[[str, float], None]
) -> list[torch.Tensor]:
    """Per self-attention module, head outputs before o_proj [n, heads * D] of rows that predict greedy answers."""
    kept: list[list[torch.Tensor]] = [[] for _ in modules]
    seen: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep(i: int) -> Any:
        return lambda module, args: seen[i].append(args[0][:, -1].float().cpu())

    config, done = model.generation_config, 0
    with hooked([output_projection(attn).register_forward_pre_hook(keep(i)) for i, attn in enumerate(modules)]):
        for part, inputs in batches(samples, 16, config.pad_token_id or 0):
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, disable_compile=True)
            new = out[:, inputs["input_ids"].shape[1] :].cpu()
            ends = torch.tensor([] if config.eos_token_id is None else config.eos_token_id).reshape(-1)
            ended = torch.isin(new, ends).long().cumsum(dim=1) - torch.isin(new, ends).long()
            for i in range(len(kept)):
                kept[i].append(torch.stack(seen[i], dim=1)[ended == 0])
                seen[i].clear()
            done += len(part)
            progress("descriptions", done / len(samples))
    return [torch.cat(rows) for rows in kept]
