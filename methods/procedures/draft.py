"""Sparse-to-Dense: the model drafts with few image columns and verifies with all (Zhang et al., ACL 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.decoding.drafting import Drafter
from vlm_fix.pruning.kinds import share_of
from vlm_fix.pruning.rows import Seen, received
from vlm_fix.session import Session


@dataclass(frozen=True)
class Draft(Drafter):
    """Decodes several tokens a step, and none that the model would not have said: a speed-up without another answer.

    With A [H, R, N] a layer's softmax attention from the R text rows after the images to the N image columns of the prompt,
    s_gj = sum_{h of g, r} A_hrj for key-value head g: the draft's cache keeps all text columns and the `keep` image columns
    of highest s, layer by layer. From it `tokens` candidates are decoded; one forward of the whole model over its whole cache
    verifies them: greedy keeps those that are its own argmax, sampling keeps candidate x with probability
    min(1, p(x) / q(x)) and draws the first that is not kept from max(0, p - q) (Leviathan et al., 2023), so that every
    token is distributed as the model's own. Both caches then forget what was not kept. transformers' assisted generation
    runs the loop.

    Source: arXiv 2505.19155 (no official code). Ambiguities: which rows vote (`rows`), and whether the heads of a layer
    choose together (`heads`). Deviation: generate's own processors act on the draft, contrasts and edits of logits do not;
    they act on what is verified, so that they cost acceptance, never the answer. One prompt at a time: a batch, beams and
    caches that are not dynamic are decoded without drafts, with one warning. Sampling has the model's distribution, not the
    tokens of the same seed; below float32 a verification may round ties otherwise than single steps do, as all assisted
    generation. `vlm_fix.drafted(model)` tells the tokens per verification.
    """

    name: ClassVar[str] = "draft"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.19155"
    needs_image: ClassVar[bool] = True

    tokens: int = param(5, "candidates drafted before each verification; 0: none", low=0)
    keep: float = param(0.25, "image columns the draft sees: a count (> 1) or a share in (0, 1]", above=0, counts=True)
    rows: str = param(
        "text", "rows whose attention chooses: all text after the images, or the last", choices=("text", "last")
    )
    heads: str = param("each", "each key-value head chooses, or all together", choices=("each", "together"))

    @property
    def neutral(self) -> bool:
        return self.tokens == 0

    @property
    def length(self) -> int:
        return self.tokens

    def keeps(self, seen: Seen, session: Session, visual: torch.Tensor) -> torch.Tensor:
        rows, last = torch.zeros_like(visual), session.prompt_len - 1
        rows[:, min(session.last_visual[0] + 1, last) if self.rows == "text" else last :] = True
        scores = received(seen, rows, torch.ones_like(visual))  # a single prompt has no padding
        if self.heads == "together":
            scores = scores.sum(dim=1, keepdim=True)
        count = share_of(self.keep, int(visual.sum()))
        order = scores.masked_fill(~visual[:, None], -1).sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)
