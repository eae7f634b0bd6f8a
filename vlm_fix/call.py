"""One generate call, or one forward outside of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_fix.families import image_token_ids
from vlm_fix.packing import left_pack


@dataclass
class Call:
    """One generate call: its inputs, as the user gave them or a Procedure refined them, and the encoder's scores waiting
    for the prefill."""

    model: Any
    family: Any
    inputs: dict[str, Any]  # input_ids [B, L], attention_mask [B, L], pixel_values, image_grid_thw, ...
    cache: Any = None  # of an earlier turn, as the user passed it
    vision: list[Any] = field(default_factory=list)  # pruning.encoder.ImageTokens, in image order
    views: list[Any] = field(default_factory=list)  # the same with the encoder layers that other methods ask for
    processors: list[Any] = field(default_factory=list)  # ours of the scores, before all of generate's own
    scored: bool = False  # True once generate has asked for them
    broken: torch.Tensor | bool = False  # True, or NaN, once no token of a row had a finite score

    def check_scores(self, scores: torch.Tensor) -> None:
        """Note whether a row of scores [B, V] has NaN or no finite one; on an accelerator nobody waits for the answer."""
        best = scores.amax(dim=-1)
        if scores.device.type == "cpu":
            self.broken = self.broken or not bool(best.isfinite().all())
        else:  # 0 x best is NaN unless best is finite, and so is what NaN is added to
            self.broken = best * 0 if self.broken is False else torch.add(self.broken, best, alpha=0)

    @property
    def is_broken(self) -> bool:
        """True once no token of a row had a finite score. This waits for the device."""
        return self.broken if isinstance(self.broken, bool) else bool(self.broken.isnan().any())

    @property
    def batch(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def without_images(self) -> dict[str, torch.Tensor]:
        """The prompt with the image tokens taken out (their begin and end markers stay), left-padded again."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        tokens = torch.tensor(image_token_ids(self.model, self.family), device=ids.device)
        index, kept = left_pack(mask.bool() & ~torch.isin(ids, tokens))
        inputs = {"input_ids": ids.gather(1, index).masked_fill(~kept, 0), "attention_mask": kept.long()}
        for name in ("token_type_ids", "moe_mm_token_type_ids"):  # the latter sends an image's markers to its experts
            if name in self.inputs:
                inputs[name] = self.inputs[name].gather(1, index).masked_fill(~kept, 0)
        return inputs

    def with_pixels(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same prompt with `change` applied to pixel_values."""
        pixels = self.inputs["pixel_values"]
        if pixels.dim() < 5:
            return {**self.inputs, "pixel_values": change(pixels)}
        real = (pixels != 0).flatten(-3).any(dim=-1)  # [images, tiles], [rows, images, tiles]: blank tiles are padding
        return {**self.inputs, "pixel_values": pixels.index_put((real,), change(pixels[real]))}
