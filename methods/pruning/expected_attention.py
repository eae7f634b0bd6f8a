"""Expected Attention: keys are kept by the attention that future queries will pay them (Devoto et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import VlmFixError, param
from vlm_fix.families import prompt_positions
from vlm_fix.pruning.kinds import Cached, CachePruner
from vlm_fix.pruning.rows import is_turned, unrotated


@dataclass(frozen=True)
class ExpectedAttention(CachePruner):
    """After the prompt, each layer keeps the image keys (and values) that queries to come are expected to look at.

    Queries before the rotary embedding are taken as Gaussian: mean mu and covariance Sigma [D, D] of each head over the
    prompt but its first `sinks` tokens. R is the rotation's mean over the next `future` positions. For column j
        z_j = (R mu)^T k_j / sqrt(D) + k_j^T (R Sigma R^T) k_j / 2D,   s_j = (mean_h softmax(z)_j + epsilon) ||v_j||,
    softmax over the prompt's columns but the sinks, mean over the query heads of a key-value head. The top `keep` of
    each image stay; sinks always do.

    Source: arXiv 2510.00636; NVIDIA/kvpress@8bb29b9 (ExpectedAttentionPress: 4 sinks, 512 positions, each head its own).
    Deviations: text keys are never dropped; the future begins at the row's next position (M-RoPE: three times the same),
    which kvpress counts in tokens; padding is left out. Ties go to the lower index.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"

    heads: str = param("each", "each key-value head chooses, or all together by their mean", choices=("each", "mean"))
    future: int = param(512, "future positions over which the rotation is averaged", low=1)
    sinks: int = param(4, "first tokens of the prompt that are left out of everything and kept", low=0)
    covariance: bool = param(True, "use Sigma, not the mean alone")
    value_norm: bool = param(True, "weight by the values' norm")
    epsilon: float = param(0.0, "added to the attention before the values' norm", low=0)

    def scores(self, cached: Cached) -> torch.Tensor:
        keys, valid = cached.keys.float(), cached.valid
        counted = valid & (valid.cumsum(dim=1) > self.sinks)  # [B, n]
        if not is_turned(cached.seen):
            raise VlmFixError(
                "expected_attention takes queries for projections that a plain rotary embedding turned, which those of "
                f"{type(cached.seen.attn).__name__} are not; take another pruner of the cache."
            )
        queries = unrotated(cached.seen.attn, cached.seen.x).float()  # [B, H, n, D]
        dim, count = queries.shape[-1], counted.sum(dim=1).clamp(min=1)[:, None, None]
        mean = (queries * counted[:, None, :, None]).sum(dim=2) / count  # [B, H, D]
        turn = self.rotation(cached, dim)[:, None]  # [B, 1, D, D]
        groups = queries.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(groups, dim=1)
        z = keys @ (turn @ mean[..., None]) / dim**0.5  # [B, H, n, 1]
        if self.covariance:
            centred = (queries - mean[:, :, None]) * counted[:, None, :, None]
            sigma = turn @ (centred.mT @ centred / count[..., None]) @ turn.mT
            z = z + ((keys @ sigma) * keys).sum(dim=-1, keepdim=True) / (2 * dim)
        a = z[..., 0].masked_fill(~counted[:, None], -torch.inf).softmax(dim=-1)
        s = a.unflatten(1, (-1, groups)).mean(dim=2)
        if self.value_norm:
            s = (s + self.epsilon) * cached.values.float().norm(dim=-1)
        s = s if self.heads == "each" else s.mean(dim=1, keepdim=True)
        return s.masked_fill((valid & ~counted)[:, None], torch.inf)

    def rotation(self, cached: Cached, dim: int) -> torch.Tensor:
        """R [B, D, D], float32."""
        host, session, x = cached.host, cached.session, cached.seen.x
        if session.kept:  # a pruner before the language model may have numbered the rest anew
            first = session.kept.last_position.reshape(-1, len(x)).amax(dim=0) + 1
        else:
            _, first = prompt_positions(host.model, host.family, session.call.inputs)
            first = first.repeat_interleave(len(x) // len(first))
        positions = (first[:, None] + torch.arange(self.future, device=first.device)).to(x.device)
        if host.family.mrope:
            positions = positions.expand(3, -1, -1)
        cos, sin = (t.float().mean(dim=1) for t in host.language.rotary_emb(x.float(), positions))
        half = torch.eye(dim // 2, device=x.device)
        swap = torch.zeros(dim, dim, device=x.device)
        swap[: dim // 2, dim // 2 :], swap[dim // 2 :, : dim // 2] = -half, half
        return torch.diag_embed(cos) + sin[..., None] * swap
