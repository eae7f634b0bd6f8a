"""ZeroTuning, tuning the initial token's attention (Han et al., 2025)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import ColumnEdit, ColumnFactors, RowScope, VlmFixError, param, wrapped
from vlm_fix.arch import Arch
from vlm_fix.calibration.search import answer_scores, sureness
from vlm_fix.rows import Rows
from vlm_fix.sample import Sample
from vlm_fix.session import PAD


@dataclass(frozen=True)
class ZeroTuning(ColumnEdit):
    """Rescales the attention that every row pays to the first token (BOS, the best-known sink).

    A[:, h, :, 0] <- rate A[:, h, :, 0], rows renormalised, for h in `head_indices`: the same as z[..., 0] += log(rate).
    rate < 1 hands the sink's attention to all other columns in proportion, rate > 1 takes from them.

    Source: arXiv 2505.11739; official code FeijiangHan/ZeroTuning@51df35b (for language models; here it also runs on
    prompts without an image). Rate and heads are found by search on labelled data, there is no common value: the
    default .6 on all heads is only a place to start. Column 0 is each sample's first token that is not padding.
    `calibrate`, supervised: each head alone at rates 1.5 and .6; of the heads that gain at 1.5 and those that gain at .6
    the larger group (at equal size, the larger gain) is tuned together, at the best of that side's `RATES`. Gain is the
    mean log-probability of the right answer: the paper's accuracy ties too often on few questions.
    """

    name: ClassVar[str] = "zerotuning"
    form_holds: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.11739"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"rate": (0.8, 1.3)}
    row_scope = RowScope.ALL
    needs_image: ClassVar[bool] = False

    rate: float = param(0.6, "factor on the attention to the first token, before the row is renormalised", low=1e-6)
    head_indices: tuple[int, ...] | None = param(None, "heads that are tuned in each of the layers; None: all")

    def resolve(self, arch: Arch) -> ZeroTuning:
        method = super().resolve(arch)
        assert isinstance(method, ZeroTuning)
        for head in method.head_indices or ():
            if not 0 <= head < arch.heads:
                raise VlmFixError(f"zerotuning: head {head} does not exist; the model has heads 0 to {arch.heads - 1}.")
        return method

    @property
    def neutral(self) -> bool:
        return self.rate == 1 or self.head_indices == ()

    def column_factors(self, rows: Rows) -> ColumnFactors:
        types = rows.session.types
        first = (types != PAD).int().argmax(dim=1, keepdim=True)
        column = rows.columns(torch.zeros_like(types, dtype=torch.bool).scatter(1, first, True))
        heads = None
        if self.head_indices is not None:
            count = rows.session.call.model.config.get_text_config().num_attention_heads
            heads = torch.zeros(count, device=column.device)
            heads[list(self.head_indices)] = 1
        return ColumnFactors(bias=column * math.log(self.rate), heads=heads)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """rate and head_indices. Cost: 2 x heads + 6 passes over the samples."""
        heads = model.config.get_text_config().num_attention_heads
        plain = sureness(answer_scores(model, samples))

        def gain(rate: float, chosen: tuple[int, ...]) -> float:
            with wrapped(model, dataclasses.replace(self, rate=rate, head_indices=chosen)):
                return sureness(answer_scores(model, samples)) - plain

        gains: dict[float, dict[int, float]] = {rate: {} for rate in RATES}
        for head in range(heads):
            for rate, found in gains.items():
                found[head] = gain(rate, (head,))
            progress("heads one by one", (head + 1) / heads)
        helpful = {rate: {h: g for h, g in found.items() if g > 0} for rate, found in gains.items()}
        side = max(RATES, key=lambda rate: (len(helpful[rate]), sum(helpful[rate].values())))
        group, together = tuple(helpful[side]), {}
        for i, rate in enumerate(RATES[side] if group else ()):
            together[rate] = gain(rate, group)
            progress("rates", (i + 1) / len(RATES[side]))
        best = max(together, key=lambda rate: together[rate], default=1.0)
        if together.get(best, 0.0) <= 0:
            raise VlmFixError("zerotuning: no rate on the first token helps this model on these questions.")
        return {"rate": best, "head_indices": group}


RATES = {1.5: (1.2, 1.5, 2.0, 3.0, 5.0), 0.6: (0.8, 0.6, 0.4, 0.2, 0.1)}  # probe of each side -> rates of the search
