"""What an attention layer is called with, and the part of it that some of its rows need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward, use_gqa_in_sdpa

from .scores import Scores


class QueryRows(NamedTuple):
    """Some query rows of a layer with all keys and values; grouped-query heads are not repeated.

    allowed: [B or 1, 1 or H, R, K], booleans or an additive float mask; None: every column.
    first: row i sees the columns up to first + i, and `allowed` is made for a `part` of the rows alone: no L x L matrix.
    """

    query: torch.Tensor  # [B, H, R, D]
    key: torch.Tensor  # [B, Hkv, K, D]
    value: torch.Tensor  # [B, Hkv, K, D]
    allowed: torch.Tensor | None
    scores: Scores
    first: int | None = None

    def part(self, part: slice, width: int | None = None) -> QueryRows:
        """A part of the rows, with their mask; width: with so many of the columns, the first ones."""
        rows = self._replace(query=self.query[:, :, part], first=None)
        if self.first is not None:
            columns = torch.arange(self.key.shape[2], device=self.key.device)
            places = torch.arange(self.first, self.first + self.query.shape[2], device=self.key.device)[part]
            rows = rows._replace(allowed=(columns <= places[:, None])[None, None])
        elif self.allowed is not None:
            rows = rows._replace(allowed=self.allowed[:, :, part])
        if width is None or width >= self.key.shape[2]:
            return rows
        allowed = rows.allowed if rows.allowed is None else rows.allowed[..., :width]
        return rows._replace(key=rows.key[:, :, :width], value=rows.value[:, :, :width], allowed=allowed)

    def of_heads(self, heads: Sequence[int]) -> QueryRows:
        """Some of the query heads, each with a key head of its own."""
        chosen = list(heads)
        own = [h * self.key.shape[1] // self.query.shape[1] for h in chosen]
        allowed = self.allowed
        if allowed is not None and allowed.shape[1] > 1:
            allowed = allowed[:, chosen]
        return self._replace(
            query=self.query[:, chosen], key=self.key[:, own], value=self.value[:, own], allowed=allowed
        )


@dataclass(slots=True)
class AttentionInputs:
    """The arguments of transformers' attention interface: query [B, H, q, D], key and value [B, Hkv, K, D]."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None = None  # None: D ** -0.5
    dropout: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)  # sliding_window, is_causal, softcap, ...

    @property
    def scores(self) -> Scores:
        scaling = self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        return Scores(scaling, self.kwargs.get("softcap"))

    @property
    def windowed(self) -> bool:
        """True if some columns are out of reach: a prompt in a layer with a sliding window, any row of one with chunks."""
        kinds, layer = (
            getattr(x, name, None)
            for x, name in ((getattr(self.module, "config", None), "layer_types"), (self.module, "layer_idx"))
        )
        if kinds and layer is not None and kinds[layer] == "chunked_attention":
            return True
        return self.query.shape[2] > 1 and self.kwargs.get("sliding_window") is not None

    def sdpa(self) -> torch.Tensor:
        """All rows by SDPA, without edits: [B, q, H, D]."""
        query, key = self.query, self.key
        if query.shape[2] == 1 and self.kwargs.get("position_bias") is None:  # the same call, with one view less
            grouped = getattr(self.module, "num_key_value_groups", 1) > 1
            if not grouped or use_gqa_in_sdpa(self.mask, key, self.value):
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, key, self.value, self.mask, self.dropout, scale=self.scaling, enable_gqa=grouped
                )
                return out.view(len(out), 1, query.shape[1], -1)
        how = {"dropout": self.dropout, "scaling": self.scaling, **self.kwargs}
        return sdpa_attention_forward(self.module, self.query, self.key, self.value, self.mask, **how)[0]

    def allowed(self, first: int) -> torch.Tensor | None:
        """The mask of the rows from `first` on; no mask means causal, as SDPA reads it."""
        count, width = self.query.shape[2], self.key.shape[2]
        if self.mask is not None and not first and self.mask.shape[-1] == width:
            return self.mask
        if self.mask is not None:
            return self.mask[:, :, first:, :width]
        if count == 1:
            return None
        columns = torch.arange(width, device=self.key.device)
        rows = torch.arange(first, count, device=self.key.device)
        return (columns[None] <= rows[:, None])[None, None]

    def of_heads(self, heads: Sequence[int]) -> AttentionInputs:
        """The same of some query heads, each with a key head of its own."""
        rows = self.rows_from(0).of_heads(heads)
        module: Any = SimpleNamespace(
            config=getattr(self.module, "config", None),
            layer_idx=getattr(self.module, "layer_idx", None),
            num_key_value_groups=1,
            is_causal=getattr(self.module, "is_causal", True),
            training=self.module.training,
        )
        return replace(self, module=module, query=rows.query, key=rows.key, value=rows.value, mask=rows.allowed)

    def rows_from(self, first: int, end: int | None = None) -> QueryRows:
        """The rows from `first` on, up to `end`."""
        query = self.query[:, :, first:] if first else self.query
        causal = self.mask is None and self.query.shape[2] > 1
        allowed = None if causal else self.allowed(first)
        rows = QueryRows(query, self.key, self.value, allowed, self.scores, first if causal else None)
        return rows if end is None else rows.part(slice(0, end - first))
