"""Attention Buckets: the answer is agreed between several rotary bases (Chen et al., ACL 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.call import Call
from vlm_fix.decoding.bases import RotaryBranches
from vlm_fix.decoding.kinds import Negative


@dataclass(frozen=True)
class AttentionBuckets(RotaryBranches):
    """Reads the prompt once more for each rotary base and averages the next-token distributions.

    Rotary attention between two tokens rises and falls with their distance, and a token in a trough is overlooked; with
    another base the troughs lie elsewhere. p_m [V] is the next token's distribution with the base b_m times the model's own
    (b_0 = 1): p = sum_m w_m p_m, w_m = 1 / n, or with weights="confidence" max(p_m) / sum max(p).

    Source: arXiv 2312.04455 (the official code was not found). The paper searches its bases for a model so that the peaks of one
    fall into the troughs of others; the defaults here are this file's choice, from its range of 1 to 2.5. How the
    distributions are weighed is a parameter. Bases are ratios: frequency i of n becomes f_i b^(-i / n), which is that of base
    b B for plain and linearly scaled embeddings; where a checkpoint scales single frequencies (YaRN, Llama 3) its scaling
    stays. Each base has a cache of its own: n times the memory, and the forwards of n prompts.
    """

    name: ClassVar[str] = "attention_buckets"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.04455"
    needs_image: ClassVar[bool] = False

    bases: tuple[float, ...] = param((1.75, 2.5), "further rotary bases, in units of the model's own")
    weights: str = param("equal", "weights of the distributions", choices=("equal", "confidence"))

    @property
    def neutral(self) -> bool:
        return all(base == 1 for base in self.bases)

    @property
    def passes(self) -> int:
        return 1 + len(self.bases) if self.contrasts else 1

    @property
    def ratios(self) -> dict[str, float]:
        return {f"base{i}": base for i, base in enumerate(self.bases, 1)}

    def branches(self, call: Call) -> dict[str, Negative]:
        return {name: Negative(call.inputs) for name in self.ratios}

    def combine_at(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        every = torch.stack([l, *negatives])  # [n, B, V]
        sure = every.amax(dim=-1, keepdim=True) if self.weights == "confidence" else torch.zeros_like(every[..., :1])
        return (every + sure - sure.logsumexp(dim=0)).logsumexp(dim=0)
