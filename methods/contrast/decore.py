"""DeCoRe, decoding by contrasting retrieval heads (Gema et al., 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, ScoreEdit, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import entropy
from vlm_fix.method import parse_heads
from vlm_fix.rows import Rows
from vlm_fix.sample import Sample

from .copying import copied


@dataclass(frozen=True)
class DeCoRe(ScoreEdit, Contrast):
    """Contrasts with the model without its retrieval heads, the more the less sure the model is.

    In the branch the listed heads' scores are set to 0 before the mask and softmax (uniform attention), on the last prompt
    row and decode rows; the prompt's other rows are shared. z = (1 + a) log p - a log p' with a = alpha H(p), H in nats.

    Source: arXiv 2410.18860; official code aryopg/DeCoRe@d1fa5a9 (50 heads of Llama's 1,024, alpha 1, no cut-off, greedy).
    Heads: `vlm-fix calibrate decore`, see `calibrate`.
    """

    name: ClassVar[str] = "decore"
    kind: ClassVar[str] = "contrast"
    form_holds: ClassVar[bool] = True
    same_in_all_layers: ClassVar[bool] = False
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.18860"
    needs_image: ClassVar[bool] = False
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    branch: str = param("negative", "always the second branch", choices=("negative",))
    head_list: tuple[str, ...] | None = param(None, "retrieval heads as layer.head, e.g. 16.29|26.9")
    alpha: float = param(1.0, "factor on the entropy", low=0)
    cap: float | None = param(None, "upper limit of the strength", low=0)
    normalised: bool = param(False, "divide the entropy by log V")
    beta: float = param(0.0, "plausibility cut-off; the paper uses none", low=0, high=1)
    share: float = param(50 / 1024, "share of all heads that `calibrate` names", low=0, high=1)

    def resolve(self, arch: Arch) -> DeCoRe:
        method = super().resolve(arch)
        assert isinstance(method, DeCoRe) and isinstance(method.layers, tuple)
        if method.entropy != "none":
            raise VlmFixError(
                f"decore: its strength grows with the entropy in any case; leave entropy={method.entropy} out."
            )
        if not method.head_list and not method.neutral:
            raise VlmFixError(
                "decore: the retrieval heads of this model are unknown; find them with `vlm-fix calibrate decore` and pass "
                "its file as calibration, or name them, as in decore:head_list=16.29|26.9."
            )
        listed = {layer for layer, _ in parse_heads(self.name, method.head_list or (), arch)}
        return dataclasses.replace(method, layers=tuple(i for i in method.layers if i in listed))

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        return scores.index_fill(1, rows.kept(self.silent), 0.0)

    def silent(self, rows: Rows) -> torch.Tensor:
        """[n] the layer's heads that are listed."""
        heads = [int(h) for layer, h in (item.split(".") for item in self.head_list or ()) if int(layer) == rows.layer]
        return torch.tensor(heads, device=rows.visual.device, dtype=torch.long)

    def form(self, rows: Rows) -> ScoreForm:
        heads = rows.session.call.model.config.get_text_config().num_attention_heads
        kept = torch.ones(heads, device=rows.visual.device).index_fill(0, rows.kept(self.silent), 0.0)
        return ScoreForm(kept.view(1, -1, 1, 1))

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.inputs

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        a = self.alpha * entropy(l.exp(), self.normalised)
        a = a if self.cap is None else a.clamp(max=self.cap)
        return plausible((l + a * (l - l_neg)).masked_fill(torch.isinf(l), -torch.inf), l, self.beta)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """Retrieval heads by copying (Wu et al., arXiv 2404.15574; nightdessert/Retrieval_Head@1012272).

        A needle of 8 tokens is hidden in a haystack of the samples' own texts and then repeated. A head scores where its
        largest weight, in the row that predicts the needle's next token, lies on that token in the haystack; its score is
        the mean over tokens and needles. Deviations: needles are token ids drawn from the samples' texts, so that any
        tokenizer will do, and are teacher-forced, so that a model that does not copy them well has heads to name, too.
        """
        hits = copied(model, samples, seed, progress)
        best = hits.flatten().argsort(descending=True, stable=True)[: max(1, round(self.share * hits.numel()))]
        if hits.max() == 0:
            raise VlmFixError("decore: no head of this model looks at what it copies; it has no retrieval heads.")
        return {
            "head_list": tuple(f"{int(i) // hits.shape[1]}.{int(i) % hits.shape[1]}" for i in best if hits.flatten()[i])
        }
