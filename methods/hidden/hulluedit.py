"""HulluEdit, evidence-consistent subspace editing (CVPR 2026)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, FinalOutputEdit, LayerInputEdit, Memory, RowScope, VlmFixError, param
from vlm_fix.rows import Rows
from vlm_fix.session import VISUAL

from .steering import scaled

EPS = 1e-6


@dataclass
class HulluEditMemory(Memory):
    states: torch.Tensor = field(
        default_factory=lambda: torch.zeros(0)
    )  # inputs [B, n, C] of the anchor, of all columns


@dataclass(frozen=True)
class HulluEdit(LayerInputEdit, FinalOutputEdit):
    """Shrinks what the final state holds beside the image's own directions, most of all what the text so far suggests.

    With Z [N, C] and T [n, C] the anchor layer's inputs of the image's tokens and of the text after it, and h [C] what the
    final norm gives for a row (n(x) = x / ||x||):
        w = softmax(cos(z_j, h) / temperature);  U [C, rank] = first right singular vectors of sqrt(w_j) (z_j - sum_i w_i z_i)
        P [C, prior_rank] = those of T (I - U U^T), centred;  h_U = U U^T h,  h_P = P P^T h,  h_R = h - h_U - h_P
        vcr = |h_U|^2 / |h|^2, at least vcr_floor;  pcr = |h_P|^2 / |h|^2, at most pcr_ceiling
        n = min(kappa (1 - vcr) / vcr, n_max);  p = min(lam pcr / (1 - pcr), p_max), 0 where pcr < pcr_threshold
        h' = h_U + h_P / (1 + n + p) + h_R / (1 + n);  h <- (1 - blend) h + blend h' (|h| / |h'|)^norm_beta
    T leaves the prompt's last token out and takes every generated one in, that of the row included. Cost: two small
    eigenproblems (of N and n rows) for every token.

    Source: official code VioAgnes/HulluEdit@4dacebe (no licence; its LLaVA-1.5 configuration for POPE, the defaults here,
    anchor 26 of 32, scaled to the depth). Deviations: it takes the first 576 positions after the first token for the image,
    here it is where the image is, and T starts after the last image; directions without variance, arbitrary there, are left
    out. Beam search is refused: the text so far belongs to a beam.
    """

    name: ClassVar[str] = "hulluedit"
    reads_image_columns: ClassVar[bool] = True
    paper: ClassVar[str] = "https://github.com/VioAgnes/HulluEdit"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"kappa": (0.25, 1.0)}
    row_scope = RowScope.ALL
    keeps_history: ClassVar[bool] = True

    kappa: float = param(0.5, "strength on what the image does not hold", low=0)
    lam: float = param(0.22, "strength on what the text suggests", low=0)
    blend: float = param(0.76, "share of the edited state", low=0, high=1)
    anchor: int | None = param(None, "layer whose input the subspaces are made of", low=0, of="layers")
    rank: int = param(8, "directions of the image", low=0)
    prior_rank: int = param(5, "directions of the text", low=0)
    temperature: float = param(1.15, "of the image tokens' weights", above=0)
    vcr_floor: float = param(0.045, "least share of the image in a state", above=0, high=1)
    pcr_ceiling: float = param(0.92, "largest share of the text in a state", low=0, high=1)
    pcr_threshold: float = param(0.015, "share of the text below which it is left alone", low=0, high=1)
    n_max: float = param(3.2, "limit of n", low=0)
    p_max: float = param(3.8, "limit of p", low=0)
    norm_beta: float = param(0.74, "how far the state's length is brought back; 1: whole", low=0, high=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"anchor": scaled(26, arch.depth), "layers": str(arch.depth - 1)}

    def resolve(self, arch: Arch) -> HulluEdit:
        method = super().resolve(arch)
        assert isinstance(method, HulluEdit)
        if method.layers != (arch.depth - 1,):
            raise VlmFixError(
                "hulluedit acts behind the last layer alone, so layers has no meaning for it; leave it out: anchor names "
                "the layer that is read."
            )
        return method

    @property
    def neutral(self) -> bool:
        return self.blend == 0 or (self.kappa == 0 and self.lam == 0)

    @property
    def sees(self) -> list[int]:
        return sorted({self.anchor, *self.layers})  # type: ignore[misc, arg-type, type-var]

    def layer_input(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if rows.layer == self.anchor:
            memory, start = rows.memory(HulluEditMemory), rows.numbers[0]
            known = memory.states[:, :start].to(x.device) if start and memory.states.numel() else x[:, :0]
            missing = x.new_zeros(
                len(x), start - known.shape[1], x.shape[-1]
            )  # columns of samples without an image alone
            memory.states = torch.cat([missing, known, x], dim=1)
        return x

    def final_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        session, states = rows.session, rows.memory(HulluEditMemory).states.to(x.device)
        first, n = session.prompt_len - 1, states.shape[1]
        image = (session.types[:, :n] == VISUAL).to(x.device)
        text = rows.after[:, 0, 0, :n].clone()
        text[:, first : first + 1] = False  # not there yet in the earlier chunks of a prompt
        new = x.clone()
        columns = torch.arange(n, device=x.device)
        for r, position in enumerate(rows.numbers):
            for b in range(len(x)) if position >= first else ():
                if bool(image[b].any()):
                    new[b, r] = self.edited(x[b, r], states[b, image[b]], states[b, text[b] & (columns <= position)])
        return new

    def edited(self, h: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A final state [C], the image's states [N, C] and the text's [n, C] -> the state, edited."""
        w = (torch.nn.functional.cosine_similarity(z, h[None], dim=-1) / self.temperature).softmax(dim=0)[:, None]
        u = principal((z - (w * z).sum(dim=0)) * w.sqrt(), self.rank)
        t = t - t @ u.T @ u
        p = principal(t - t.mean(dim=0) if len(t) else t, self.prior_rank)
        h_u, h_p = u.T @ (u @ h), p.T @ (p @ h)
        whole = h.square().sum() + EPS
        vcr = (h_u.square().sum() / whole).clamp(min=self.vcr_floor, max=1)
        pcr = (h_p.square().sum() / whole).clamp(max=self.pcr_ceiling)
        n = (self.kappa * (1 - vcr) / (vcr + EPS)).clamp(max=self.n_max)
        strength = (self.lam * pcr / (1 - pcr + EPS)).clamp(max=self.p_max) * (pcr >= self.pcr_threshold)
        new = h_u + h_p / (1 + n + strength) + (h - h_u - h_p) / (1 + n)
        new = new * ((h.norm() + EPS) / (new.norm() + EPS)) ** self.norm_beta
        return (1 - self.blend) * h + self.blend * new


def principal(x: torch.Tensor, count: int) -> torch.Tensor:
    """The first right singular vectors [<= count, C] of x [n, C], by the Gram matrix of its rows: n is far below C."""
    x = x.double()
    values, left = torch.linalg.eigh(x @ x.T)
    chosen = (
        (values > 1e-12 * values.amax().clamp(min=1e-30)).nonzero()[:, 0].flip(0)[:count] if len(x) else values.long()
    )
    return (left[:, chosen].T @ x / values[chosen].sqrt()[:, None]).float()
