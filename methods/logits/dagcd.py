"""DAGCD, dynamic attention-guided context decoding (Huang et al., 2025), the part without training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import pad

from vlm_fix import Arch, Memory, Method, VlmFixError, WeightReader, param
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step
from vlm_fix.rows import Rows
from vlm_fix.session import TEXT, Session
from vlm_fix.words import TEMPLATE, check_template, template_columns


@dataclass
class DAGCDMemory(Memory):
    weights: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, H, R, P] of one forward's rows
    read_at: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> Session.types of that forward
    chosen: torch.Tensor | None = None  # [B, heads] among the heads of all layers


@dataclass(frozen=True)
class DAGCD(WeightReader, LogitEdit):
    """Adds to likely next tokens what attention puts on the same tokens in the context, the more the less sure the model is.

    u_h[v] = mean of head h's weights, in the row that predicts, over the context columns that hold token v, made to sum
    to 1 over the context's tokens; U[v] = sum of u_h over the heads for the v of rank <= top_rank, made to sum to 1;
    p' = p + alpha H(p) / log |vocabulary| U. A row whose likeliest token ends the answer is left alone.

    The context is text of the prompt: image columns hold no token. Heads: the `heads` with most weight on the context,
    of all `layers`, in the prompt's last row; a prompt keeps them for its answer.

    Source: official code uestc-huangyw/DAGCD@45d09c9 (alpha 2 for base and 4 for chat models, 10 heads, top_rank 10).
    Deviations: the official heads, their weights and the detector that leaves out columns are trained on 2,000 samples;
    here the heads are chosen as above and count alike, and no column is left out. The official context is a passage, found
    by its text; here the chat template around the question is left out where its ids are known (`vlm_fix.words`) or its
    numbers given (`template=2|5`). The official code takes the argmax; p' divided by its sum serves all modes. The
    official end tokens also include spaces and line ends.
    """

    name: ClassVar[str] = "dagcd"
    kind: ClassVar[str] = "logits"
    needs_image: ClassVar[bool] = False
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (1.0, 2.0)}

    alpha: float = param(4.0, "strength", low=0)
    heads_used: int = param(10, "number of heads", low=1)
    top_rank: int = param(10, "ranks of the next token that may gain", low=1)
    context: str = param("question", "the question after the images, or all text", choices=("question", "text"))
    template: tuple[int, ...] | None = param(None, TEMPLATE)
    end_tokens: tuple[int, ...] | None = param(None, "ids that end an answer; None: the model's")

    def resolve(self, arch: Arch) -> Method:
        check_template("dagcd", self.template)
        method = super().resolve(arch)
        assert isinstance(method, DAGCD) and isinstance(method.layers, tuple)
        fewer = self.heads_used > arch.heads * len(method.layers)
        if fewer and self.heads_used != type(self)().heads_used:  # the default takes all that a small model has
            raise VlmFixError(
                f"dagcd: heads_used={self.heads_used} is more than the {arch.heads * len(method.layers)} heads of its layers; "
                "lower it."
            )
        return method

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        a, session, memory = weights, rows.session, rows.memory(DAGCDMemory)
        seen = pad(a, (max(0, session.types.shape[1] - a.shape[-1]), 0))[..., : session.prompt_len]
        if memory.read_at.get(rows.layer) is session.types:  # a further chunk of the rows of one forward
            seen = torch.cat([memory.weights[rows.layer], seen], dim=2)
        memory.weights[rows.layer], memory.read_at[rows.layer] = seen, session.types

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        session = step.session
        assert isinstance(self.layers, tuple)
        memory, last = session.memory(self, DAGCDMemory), session.prompt_len - 1
        row = last + step.index - max(session.start, last)
        ids, inside = self.context_of(session)
        ids, inside = ids.to(l.device), inside.to(l.device)

        def of_row(r: int) -> torch.Tensor:  # [B, layers H, P] weights on the context
            return (
                torch.cat([memory.weights[i][:, :, r].to(l) for i in self.layers or () if isinstance(i, int)], dim=1)
                * inside[:, None]
            )

        if (
            memory.chosen is None or not step.index
        ):  # without a cache every step holds the prompt's last row, as its first
            first = (of_row(0).sum(dim=-1) * 2**16).round()  # a context of the whole prompt has weight 1 in every head
            memory.chosen = first.argsort(dim=-1, descending=True, stable=True)[:, : self.heads_used]
        weights = of_row(row)
        weights = weights.gather(1, memory.chosen[..., None].expand(-1, -1, weights.shape[2]))
        end = self.end_tokens or step.host.model.generation_config.eos_token_id or ()
        ends = torch.tensor([end] if isinstance(end, int) else list(end), device=l.device)
        return torch.where(torch.isin(l.argmax(dim=-1), ends)[:, None], l, self.guided(l, weights, ids, inside))

    def context_of(self, session: Session) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, P] of the prompt's columns, and which of them are context."""
        ids, types = session.ids()[:, : session.prompt_len], session.types[:, : session.prompt_len]
        inside = types == TEXT
        if self.context == "question":
            last = torch.tensor(session.last_visual, device=types.device)[:, None]
            inside = inside & (torch.arange(types.shape[1], device=types.device) > last)
            inside = inside & ~template_columns(session, self.template)[:, : session.prompt_len].to(types.device)
        return ids, inside

    def guided(self, l: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Logits [B, V], weights [B, n, P] of the heads, ids and booleans [B, P] -> scores [B, V] on the level of the logits."""
        level = l.logsumexp(dim=-1, keepdim=True)
        l = l - level
        words, place = ids.unique(return_inverse=True)
        count = torch.zeros(len(l), len(words), device=l.device).scatter_add(1, place, inside.float())
        sums = torch.zeros(*weights.shape[:2], len(words), device=l.device, dtype=weights.dtype)
        mean = sums.scatter_add(2, place[:, None].expand(weights.shape), weights) / count[:, None].clamp(min=1)
        share = (mean / mean.sum(dim=-1, keepdim=True).clamp(min=1e-8)).sum(dim=1)
        p = l.exp()
        least = p.topk(min(self.top_rank, p.shape[1]), dim=-1).values[:, -1:]
        share = share * (p[:, words] >= least) * (l[:, words] > -torch.inf)
        share = share / share.sum(dim=-1, keepdim=True).clamp(min=1e-8)
        entropy = -(p * l).nan_to_num(0.0).sum(dim=-1, keepdim=True) / math.log(l.shape[1])
        return (p.index_add(1, words, self.alpha * entropy * share)).log() + level
