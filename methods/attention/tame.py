"""TAME, dynamic token propagation mechanism ("Intervening Anchor Token", Tang et al., ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlm_fix import ColumnEdit, ColumnFactors, Memory, QueryKeyReader, RowScope, param
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.traces import row_factor, sharpening, sizes
from vlm_fix.rows import Rows
from vlm_fix.session import PAD
from vlm_fix.wing import engine_of


@dataclass
class TAMEMemory(Memory):
    """Of the running forward, by layer: the factor [B, 1, q, 1] of each row; the keys' trace [B], and of how many columns."""

    factors: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    counted: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TAME(ColumnEdit, QueryKeyReader):
    """Sharpens attention by the size of the queries and keys, which is said to keep anchor tokens from spreading.

        z <- (1 + gamma / log tr(Q Q^T)) (1 + gamma / log tr(K K^T)) z, before the mask and softmax, on every row,
    with tr(X X^T) = sum of |x|^2, mean over the heads, of the rotated queries of this forward and of the keys so far
    (those that a sliding window still holds).

    Source: openreview zGb4WgCW5i; official code Everlyn-Labs/ANTRP@84b9910, whose LlamaAttention holds just this with
    gamma .8 in every layer. Uncertain: the paper intervenes in the eigenspectrum of W_Q W_K, and the code takes the
    traces of activations instead; that its tables come from this formula is not known. Deviations: the code averages
    the traces over the batch, here each sample has its own, without padding; a decode row has its own query trace however
    many rows run at once; traces below e count as e, since the factor has a pole at 1. A later turn on a kept cache has the
    query trace of its own rows alone, as earlier turns' queries are gone.
    """

    name: ClassVar[str] = "tame"
    paper: ClassVar[str] = "https://openreview.net/forum?id=zGb4WgCW5i"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"gamma": (0.4,)}
    row_scope = RowScope.ALL
    tracks_columns: ClassVar[bool] = True
    needs_image: ClassVar[bool] = False
    same_in_all_layers: ClassVar[bool] = False

    gamma: float = param(0.8, "strength: share that 1 / log(trace) adds to the scores, for queries and for keys", low=0)

    @property
    def neutral(self) -> bool:
        return self.gamma == 0

    def read_queries_and_keys(self, inputs: QueryRows, rows: Rows) -> None:
        """Compute the factors of this forward's rows."""
        session, q, k = rows.session, inputs.query, inputs.key
        memory, layer, end = rows.memory(TAMEMemory), rows.layer, session.types.shape[1]
        if rows.prefill:
            session.need_whole_prompt(self.name)
        # nobody moves the rows of a cache about where generate has one row for each prompt
        steady = engine_of(session.call.model).call is session.call and len(q) == session.call.batch
        known = memory.keys.get(layer) if memory.counted.get(layer) == session.start and steady else None
        if known is not None and q.shape[2] == 1 and k.shape[2] >= end:
            factor, memory.keys[layer] = row_factor(q, k, session.start, known, self.gamma)
            memory.factors[layer], memory.counted[layer] = factor, end
            return
        real = session.types != PAD
        queries = sizes(q) * real[:, session.start :].to(q.device)  # [B, q]
        keys = sizes(k) * rows.columns(real)[:, 0, 0]  # [B, K]
        prompt = rows.positions < session.prompt_len  # these rows share their traces
        queries = torch.where(prompt, (queries * prompt).sum(dim=1, keepdim=True), queries)
        hidden = max(0, end - k.shape[2])  # columns that a sliding window has left behind
        last = rows.positions.clamp(min=session.prompt_len - 1) - hidden
        traces = queries, keys.cumsum(dim=1)[:, last.clamp(max=k.shape[2] - 1)]
        factors = [sharpening(trace, self.gamma) for trace in traces]
        memory.factors[layer] = (factors[0] * factors[1])[:, None, :, None]
        memory.keys[layer], memory.counted[layer] = traces[1][:, -1], end

    def column_factors(self, rows: Rows) -> ColumnFactors:
        factors = rows.memory(TAMEMemory).factors[rows.layer]
        first, count = rows.numbers[0] - rows.session.start, len(rows.positions)
        return ColumnFactors(row_factor=factors if count == factors.shape[2] else factors[:, :, first : first + count])
