"""How the vision tower's states move when most of an image is masked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix import Sample, VlmFixError
from vlm_fix.call import Call
from vlm_fix.families import family_of, get_part, vision_blocks
from vlm_fix.hooks import hooked


@torch.no_grad()
def masked_differences(
    model: Any, samples: Sequence[Sample], share: float, trials: int, seed: int, progress: Callable[[str, float], None]
) -> dict[int, torch.Tensor]:
    """Tower layer -> output with masked patches (mean of `trials` images) less without, [images, N, Cv] on the CPU.

    [prompts, Cv], the mean over the tokens, where images differ in size. share: of the patches, masked at random. Each
    prompt shows one image. Raises VlmFixError for pixels that are laid out in another way than these two: [images, 3, H, W],
    and [patches, values].
    """
    family = family_of(model)
    base, generator = get_part(model, family.base), torch.Generator().manual_seed(seed)
    known = inspect.signature(base.get_image_features).parameters
    blocks, found = vision_blocks(model, family), list[dict[int, torch.Tensor]]()
    side = getattr(model.config.vision_config, "patch_size", 1)
    for n, sample in enumerate(samples):
        call = Call(model, family, sample.inputs)

        def states(change: Callable[[torch.Tensor], torch.Tensor], call: Call = call) -> dict[int, torch.Tensor]:
            kept: dict[int, torch.Tensor] = {}

            def keep(i: int, module: Any, args: Any, output: Any) -> None:
                kept[i] = (output[0] if isinstance(output, tuple) else output).float().cpu()

            inputs = call.with_pixels(change)
            with hooked([b.register_forward_hook(functools.partial(keep, i)) for i, b in enumerate(blocks)]):
                base.get_image_features(**{k: v for k, v in inputs.items() if k in known})
            return kept

        clean, masked = states(lambda x: x), dict[int, torch.Tensor]()
        for _ in range(trials):
            for i, x in states(functools.partial(mask_patches, share=share, side=side, generator=generator)).items():
                masked[i] = masked.get(i, 0) + x / trials
        found.append({i: masked[i] - x for i, x in clean.items()})
        progress("masked images", (n + 1) / len(samples))
    every = [x for states_ in found for x in states_.values()]
    if all(x.dim() == 3 for x in every) and len({x.shape[1] for x in every}) == 1:
        return {i: torch.cat([f[i] for f in found]) for i in found[0]}
    return {i: torch.stack([f[i].flatten(0, -2).mean(dim=0) for f in found]) for i in found[0]}


def mask_patches(x: torch.Tensor, share: float, side: int, generator: torch.Generator) -> torch.Tensor:
    """Pixels with `share` of their patches at the mean: of an image's channel, or of the packed patches."""
    if x.dim() == 2:
        chosen = torch.randperm(len(x), generator=generator)[: int(share * len(x))].to(x.device)
        return x.index_copy(0, chosen, x.mean(dim=0, keepdim=True).expand(len(chosen), -1))
    if x.dim() != 4:
        raise VlmFixError("vti: this family lays its pixels out in a way that is not known here; use alpha_vision=0.")
    rows, columns = x.shape[2] // side, x.shape[3] // side
    hidden = torch.zeros(rows * columns, dtype=torch.bool)
    hidden[torch.randperm(len(hidden), generator=generator)[: int(share * len(hidden))]] = True
    grid = hidden.view(rows, columns).repeat_interleave(side, 0).repeat_interleave(side, 1).to(x.device)
    full = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
    full[: grid.shape[0], : grid.shape[1]] = grid
    return torch.where(full, x.mean(dim=(2, 3), keepdim=True), x)
