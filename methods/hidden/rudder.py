"""RUDDER, residual-update directed decoding regulation (Zou et al., ICML 2026)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import Arch, AttentionOutputEdit, LayerInputEdit, Memory, RowScope, param
from vlm_fix.hidden.push import NONE, Gate, pushed
from vlm_fix.rows import Rows
from vlm_fix.session import PAD

from .steering import scaled


@dataclass
class RUDDERMemory(Memory):
    stream: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> its input of this forward's rows [B, R, C]
    total: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> sum over prompt rows [B, C]
    weight: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> sum of the rows' weights [B, 1]
    direction: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> v [B, 1, C], once the prompt was read


@dataclass(frozen=True)
class RUDDER(AttentionOutputEdit, LayerInputEdit):
    """Reminds each new token of what attention brought to the prompt, the more the closer the token is to it already.

    In one layer, with A_i [C] the attention output of prompt row i (image and text) and h [C] the layer's input in a row:
        v = n(sum_i w_i A_i),  n(x) = x / ||x||,  w_i = ||A_i|| or 1 (`pool`)                             (CARD)
        s = cos(h, v),  a = softplus(k s + c),  b = softplus(-k s + c),  g = a / (a + b) in [gate_low, 1]   (Beta gate)
        h + A <- h + A + alpha ||h|| g v;  with `absolute` in place of alpha ||h||: the paper's alpha_max
    on the row that predicts the first token and all decode rows; gated=false: g = 1 (RUDDER-Add). No pass more.

    Source: arXiv 2511.10292v2; code Akko000/RUDDER-Residual-Update-Directed-DEcoding-Regulation-@2eab1e9: layer 30 of 32,
    alpha_max 20, k 5 for LLaVA-1.5-7B (Idefics2: 28, 8, 5; Qwen2.5-VL: 25 to 27, 5, 5), c 1, g in [.05, 1]. alpha is ours, a
    share of the stream's length, since alpha_max fits one model. Ambiguous: the paper's s is of the hidden state, the
    code's of the attention output (`gate_on`); the code pools A_i less the layer's normed input, the paper A_i alone, as
    here. The paper's pool is the weighted one or the mean. Deviation: on a kept cache the earlier answer is not pooled.
    """

    name: ClassVar[str] = "rudder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.10292"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.1, 0.5)}
    row_scope = RowScope.ALL

    alpha: float = param(0.25, "most that is added, as a share of the residual stream's length", low=0)
    absolute: float | None = param(
        None, "most that is added, as a length (the paper's alpha_max), instead of alpha", low=0
    )
    k: float = param(5.0, "steepness of the gate", low=0)
    c: float = param(1.0, "concentration of the gate")
    gate_low: float = param(0.05, "least value of the gate", low=0, high=1)
    gated: bool = param(True, "scale by the gate; false: RUDDER-Add")
    gate_on: str = param("stream", "whose cosine opens the gate", choices=("stream", "attention"))
    pool: str = param("weighted", "how prompt rows are pooled", choices=("weighted", "mean"))

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": str(scaled(30, arch.depth))}

    @property
    def neutral(self) -> bool:
        return self.absolute == 0 if self.absolute is not None else self.alpha == 0

    @property
    def control(self) -> str:
        return "" if self.neutral else self.spec().replace(self.name, "random_reminder", 1)

    def layer_input(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        rows.memory(RUDDERMemory).stream[rows.layer] = x
        return x

    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        memory, session, i = rows.memory(RUDDERMemory), rows.session, rows.layer
        if rows.prefill:
            prompt = rows.positions < session.prompt_len
            real = (session.types != PAD).to(x.device)[:, rows.positions] & prompt  # [B, R]
            w = (x.norm(dim=-1) if self.pool == "weighted" else torch.ones_like(x[..., 0])) * real
            memory.total[i] = memory.total.get(i, 0) + (w[..., None] * x).sum(dim=1)
            memory.weight[i] = memory.weight.get(i, 0) + w.sum(dim=1, keepdim=True)
            memory.direction[i] = normalize(memory.total[i] / memory.weight[i].clamp(min=1e-12), dim=-1)[:, None]
        if rows.numbers[-1] < session.prompt_len - 1:
            return x
        y = self.reminded(x, memory.stream[i], memory.direction[i], i)
        if rows.numbers[0] >= session.prompt_len - 1:
            return y
        return torch.where((rows.positions >= session.prompt_len - 1)[:, None], y, x)

    def reminded(self, x: torch.Tensor, h: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        """Attention outputs and inputs of a layer [B, R, C], its v [B, 1, C] -> the attention outputs with the reminder."""
        return pushed(
            x,
            v,
            self.alpha if self.absolute is None else self.absolute,
            relative=self.absolute is None,
            keep_norm=False,
            gate=Gate("beta", self.k, self.c, self.gate_low) if self.gated else NONE,
            length_of=h,
            cosine_of=h if self.gate_on == "stream" else x,
        )
