"""ASCD, attention-steerable contrastive decoding (Wang et al., AAAI 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, ScoreEdit, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.engine import Engine
from vlm_fix.method import parse_heads
from vlm_fix.recorder import Recorder
from vlm_fix.rows import Rows
from vlm_fix.sample import Sample
from vlm_fix.scope import of_main
from vlm_fix.session import Session


@dataclass(frozen=True)
class ASCD(ScoreEdit, Contrast):
    """Contrasts a model whose text-centric heads look at the image with one that overlooks the image tokens it looks at most.

    z [H, K]: raw scores of the row that predicts the next token, before the mask and softmax; V its n image columns.
      main branch:   z[h, V] <- z[h, V] + boost |z[h, V]| in the heads of `head_list`;
      other branch:  in each head the `critical` share of V with the largest z: z <- z - damp |z|.
    z = (1 + alpha) l - alpha l', tokens with p < beta max p cut off; l and p are the steered main branch's.

    Source: arXiv 2506.14766, of which the abstract was to be had; its code, BroJunn/ASCD, was not. The formula is that of the
    copy in feibinuonuo/dg-ascd-repro@3867c9e (steer_mode "abs"), and so are the values: boost .625 and 32 heads for
    LLaVA-1.5, .5 and 64 for Qwen2.5-VL-7B, damp 1, critical .1, alpha 1, beta .1; the paper's own were not seen.
    Heads: `vlm-fix calibrate ascd`, see `calibrate`. Deviations: several images of a prompt are ranked together; at least
    one column is critical; equal scores go to the lower column. Its greedy search cuts off like its sampling.
    """

    name: ClassVar[str] = "ascd"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.14766"
    on_logits: ClassVar[bool] = True
    same_in_all_layers: ClassVar[bool] = False
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    branch: str = param("both", "always both branches", choices=("both",))
    head_list: tuple[str, ...] | None = param(None, "text-centric heads as layer.head, e.g. 16.29|26.9")
    boost: float | None = param(None, "share of |z| added to image columns in these heads; .625, with M-RoPE .5", low=0)
    damp: float = param(1.0, "share of |z| taken from critical image columns in the other branch", low=0)
    critical: float = param(0.1, "image columns that are critical: a count (> 1) or a share", above=0, counts=True)
    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    text: str = param("all", "text whose weight `calibrate` compares with the image's", choices=("all", "after"))
    share: float | None = param(None, "share of all heads that `calibrate` names; 32 of 1,024, with M-RoPE 64 of 784",
                                above=0, high=1)  # fmt: skip

    def defaults(self, arch: Arch) -> dict[str, Any]:
        boost, share = (0.5, 64 / 784) if arch.family.mrope else (0.625, 32 / 1024)
        return {"boost": boost, "share": share}

    def resolve(self, arch: Arch) -> ASCD:
        method: Any = super().resolve(arch)
        if not method.head_list and method.boost:
            raise VlmFixError(
                "ascd: the text-centric heads of this model are unknown; find them with `vlm-fix calibrate ascd` and pass its "
                "file as calibration, name them, as in ascd:head_list=16.29|26.9, or leave them out: boost=0."
            )
        parse_heads(self.name, method.head_list or (), arch)
        return method  # type: ignore[no-any-return]

    @property
    def neutral(self) -> bool:
        return self.boost == 0 and (self.alpha == 0 or self.damp == 0)

    @property
    def contrasts(self) -> bool:
        return self.alpha > 0

    def acts_in(self, branch: str) -> bool:
        return bool(self.boost) if of_main(branch) else self.damp > 0

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        if of_main(rows.session.branch):
            chosen = rows.kept(self.centric) & rows.visual
            return torch.where(chosen, scores + (self.boost or 0.0) * scores.abs(), scores)
        seen = scores.masked_fill(~rows.visual, -torch.inf)
        rank = seen.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        count = rows.visual.sum(dim=-1, keepdim=True)
        most = (self.critical * count).long().clamp(min=1) if self.critical <= 1 else int(self.critical)
        return torch.where((rank < most) & rows.visual, scores - self.damp * scores.abs(), scores)

    def centric(self, rows: Rows) -> torch.Tensor:
        """[1, H, 1, 1] True for the layer's heads that are listed."""
        heads = range(rows.session.call.model.config.get_text_config().num_attention_heads)
        listed = {tuple(map(int, item.split("."))) for item in self.head_list or ()}
        return torch.tensor([(rows.layer, h) in listed for h in heads], device=rows.visual.device).view(1, -1, 1, 1)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.inputs

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """Text-centric heads by vote: those most often among the `share` of all heads with the largest text / image weight.

        The weights are those of the prompt's last row, of the model as it is; each sample votes once. Equal votes go by the
        mean rank, then to the lower layer and head. The paper is said to take 500 images and 32 votes of each.
        """
        engine = Engine(model, [])
        count = engine.arch.depth * engine.arch.heads
        votes, ranks = torch.zeros(2, count, dtype=torch.float64)
        share = self.share if self.share is not None else self.defaults(engine.arch)["share"]
        wanted = max(1, round(share * count))
        engine.install(idle=True)
        try:
            for n, sample in enumerate(samples):
                looking = TextOverImage(self.text, engine.arch.depth, engine.arch.heads)
                with torch.no_grad():
                    engine.run_prompt(dict(sample.inputs), looking)
                order = looking.ratio.flatten().cpu().argsort(descending=True, stable=True)
                rank = order.argsort().double()
                votes, ranks = votes + (rank < wanted).double(), ranks + rank / len(samples)
                progress("prompts", (n + 1) / len(samples))
        finally:
            engine.remove()
        best = sorted(range(count), key=lambda i: (-float(votes[i]), float(ranks[i]), i))[:wanted]
        return {"head_list": tuple(f"{i // engine.arch.heads}.{i % engine.arch.heads}" for i in sorted(best))}


class TextOverImage(Recorder):
    """ratio [layers, heads]: of the last row, the weight on text over that on the image; layers without weights: -1."""

    def __init__(self, text: str, depth: int, heads: int):
        self.text, self.ratio = text, torch.full((depth, heads), -1.0)

    def first_row(self, session: Session) -> int:
        return session.length - 1

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        row, masks = weights[0, :, -1].float(), session.masks(weights.shape[-1], weights.device)
        visual = masks["visual"][0, 0, 0]
        text = masks["after"][0, 0, 0] if self.text == "after" else ~visual
        tiny = torch.finfo(row.dtype).tiny
        self.ratio[layer] = ((row * text).sum(dim=-1) / (row * visual).sum(dim=-1).clamp(min=tiny)).cpu()
