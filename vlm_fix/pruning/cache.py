"""Cache layers that hold fewer columns than the sequence has."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from vlm_fix.errors import VlmFixError


class Owner:
    """Whether the pruner that shortened a cache is still on its model: one for all copies of the cache."""

    on = True

    def remove(self) -> None:
        """The pruner goes, as a hook does."""
        self.on = False

    def __deepcopy__(self, memo: Any) -> Owner:
        return self


class ShortLayer(DynamicLayer):
    """A cache layer that holds `dropped` columns fewer than the sequence has; it reports the sequence's length."""

    dropped = 0
    owner: Owner | None = None

    @classmethod
    def of(cls, layer: Any, dropped: int, owner: Owner | None = None) -> ShortLayer:
        """A DynamicLayer as a ShortLayer."""
        if type(layer) is not DynamicLayer:
            raise VlmFixError(
                f"dropping tokens does not work with a {type(layer).__name__} of the cache; use the default dynamic cache."
            )
        short = cls()
        short.__dict__.update(layer.__dict__)
        short.dropped = dropped
        short.owner = owner or short.owner
        return short

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.owner is not None and not self.owner.on:  # nobody fits masks and positions to what is left
            raise VlmFixError(
                "a pruner that is no longer on the model dropped tokens of this cache: start without the cache."
            )
        return super().update(*args, **kwargs)

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.dropped if length else 0


class SplitLayer(ShortLayer):
    """A ShortLayer that can lay columns aside: `keys` and `values` are what a step computes, the rest stays stored."""

    aside: tuple[torch.Tensor, torch.Tensor] | None = None  # keys, values [B, Hkv, r, D]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.aside:
            keys, values = (t.repeat_interleave(repeats, dim=0) for t in self.aside)
            self.aside = keys, values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise VlmFixError(_ONE_WAY)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:  # type: ignore[override]
        raise VlmFixError(_ONE_WAY)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise VlmFixError(_ONE_WAY)


_ONE_WAY = (
    "this pruner chooses what a step computes by the steps before it, so that its cache cannot be rolled back, nor its "
    "rows moved: decode greedily or by sampling, or take another pruner."
)


def take(parts: Any, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `index` [B, Hkv or 1, m] of keys and values [B, Hkv, n, D]: row by row, far faster than gather on a CPU."""
    batch, heads, n, _ = parts[0].shape
    first = n * torch.arange(batch * heads, device=index.device).view(batch, heads, 1)
    keys, values = (torch.nn.functional.embedding(first + index, x.flatten(0, 2)) for x in parts)
    return keys, values
