"""AD-HH, adaptive deactivation of hallucination heads (Yang et al., ICLR 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Unchanged, VlmFixError, WeightEdit, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import Condition, TransferForm
from vlm_fix.calibration.search import LastRow, batches
from vlm_fix.families import attention_modules, family_of, get_part, output_projection
from vlm_fix.hooks import hooked
from vlm_fix.method import parse_heads
from vlm_fix.rows import Rows
from vlm_fix.sample import Sample

# (layers, heads) of the language model -> "layer.head" of LLaVA-1.5 7B and 13B
KNOWN = {
    (32, 32): "16.29 26.9 13.31 15.10 20.12 30.9 19.18 17.0 18.9 26.28 19.27 18.26 15.25 14.16 31.26 15.24 31.3 "
    "22.20 27.29 17.28",
    (40, 40): "0.8 29.27 23.18 20.11 36.26 19.37 22.16 22.34 21.31 20.34 37.11 17.25 35.10 17.5 15.26 0.22 19.5 "
    "19.0 14.1 23.20 21.6 30.24 26.27 21.32 15.28 15.31 19.30 20.8 19.14 14.9 39.26 25.1 18.32 17.27 "
    "39.32",
}


@dataclass(frozen=True)
class ADHH(WeightEdit):
    """Cuts the text off from heads that are known to hallucinate, at steps where they lean on it.

    For each listed head, on the last prompt row and decode rows: if sum A[h, T] >= threshold, A[h, T] <- 0, without
    renormalising; T are the text columns after the image, generated tokens included.

    Source: "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular Attribution and
    Intervention"; its official code at 841fc1b (threshold .4; 20 heads for LLaVA-1.5-7B, 35 for 13B; its
    list for LLaVA-34B, with threshold=0.5, is not built in: head_list takes it). `calibrate` ranks
    heads by contrastive influence: with s(h) the fall of a given answer's log-probability when head h writes zeros in the
    row that predicts it, the mean of s over questions answered wrong (the hallucination) less its mean over those answered
    right; the `top` heads above 0 are taken. The paper does this with the objects of a model's own captions. Deviation: the
    official code sums the mass over the whole batch; here each sample decides for itself.
    """

    name: ClassVar[str] = "ad_hh"
    paper: ClassVar[str] = "https://openreview.net/forum?id=Bjq4W7P2Us"
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.ANY_ROW
    idle_reason: ClassVar[str] = "no listed head gave the text after the image that much attention; lower threshold."

    threshold: float = param(0.4, "attention on the text after the image that cuts a head off; above 1: never", low=0)
    head_list: tuple[str, ...] | None = param(None, "hallucination heads as layer.head, e.g. 16.29|26.9")

    top: int | None = param(None, "calibrate: heads that are taken at most; None: 2 % of all, at least one", low=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        vicuna = arch.family.name == "llava" and arch.text_type == "llama" and arch.vocab in range(32000, 32128)
        known = KNOWN.get((arch.depth, arch.heads)) if vicuna else None
        return {"head_list": tuple(known.split())} if known else {}

    def resolve(self, arch: Arch) -> ADHH:
        method = super().resolve(arch)
        assert isinstance(method, ADHH) and isinstance(method.layers, tuple)
        if method.head_list is None and not method.neutral:
            raise VlmFixError(
                "ad_hh: the hallucination heads of this model are unknown; run `vlm-fix calibrate ad_hh --model NAME --out "
                "heads.json` and pass calibration='heads.json', or name them, as in ad_hh:head_list=16.29|26.9."
            )
        listed = {layer for layer, _ in parse_heads(self.name, method.head_list or (), arch)}
        return dataclasses.replace(method, layers=tuple(i for i in method.layers if i in listed))

    @property
    def neutral(self) -> bool:
        return self.threshold > 1 or self.layers == ()

    def listed(self, rows: Rows) -> torch.Tensor:
        """[H, 1, 1] True for the layer's heads that are listed."""
        heads = range(rows.session.call.model.config.get_text_config().num_attention_heads)
        listed = [f"{rows.layer}.{head}" in (self.head_list or ()) for head in heads]
        return torch.tensor(listed, device=rows.visual.device)[:, None, None]

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        a = weights
        listed = rows.kept(self.listed)
        leaning = (a * rows.after).sum(dim=-1, keepdim=True) >= self.threshold
        return a.masked_fill(listed & leaning & rows.after, 0)

    def transfer(self, rows: Rows) -> TransferForm:
        return rows.ahead(self.cuts)

    def cuts(self, rows: Rows) -> TransferForm:
        """The text after the image, in listed heads."""
        text = 2 * (rows.kept(self.listed) & rows.after).to(torch.uint8)
        return TransferForm(text, 0.0, 0.0, (Condition(0, 1, 0, self.threshold),))

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """head_list. Cost: one pass over the samples and a decode step for each head."""
        attention = attention_modules(get_part(model, family_of(model).language))
        heads = model.config.get_text_config().num_attention_heads
        falls: dict[tuple[int, int], torch.Tensor] = {}
        wrong, done = [], 0
        for part, inputs in batches(samples, 16, model.generation_config.pad_token_id or 0):
            run, rows = LastRow(model, inputs), torch.arange(len(part))
            ids = torch.tensor([[samples[i].target, samples[i].other] for i in part])
            before = run.logits().cpu().log_softmax(-1).gather(1, ids)
            wrong.append(before[:, 1] >= before[:, 0])
            answer = ids[rows, wrong[-1].long()]
            said = before[rows, wrong[-1].long()]
            for layer, module in attention.items():
                for head in range(heads):
                    with hooked([_silence(output_projection(module), head, heads)]):
                        fall = said - run.logits().cpu().log_softmax(-1)[rows, answer]
                    falls[layer, head] = torch.cat([falls.get((layer, head), fall[:0]), fall])
            done += len(part)
            progress("heads one by one", done / len(samples))
        miss = torch.cat(wrong)
        if miss.all() or not miss.any():
            raise VlmFixError(
                f"ad_hh: {int(miss.sum())} of {len(miss)} questions were answered wrong; heads are found by comparing wrong "
                "answers with right ones: use more or other questions."
            )
        influence = {key: float(fall[miss].mean() - fall[~miss].mean()) for key, fall in falls.items()}
        ranked = sorted((k for k, v in influence.items() if v > 0), key=lambda k: -influence[k])
        if not ranked:
            raise VlmFixError("ad_hh: no head supports this model's wrong answers more than its right ones.")
        count = self.top or max(1, round(0.02 * len(influence)))
        return {"head_list": tuple(f"{layer}.{head}" for layer, head in ranked[:count])}


def _silence(projection: torch.nn.Module, head: int, heads: int) -> Any:
    """Hook that zeroes one head's output in the last row, before the output projection."""

    def zero(module: torch.nn.Module, args: Any) -> Any:
        x = args[0].clone()
        size = x.shape[-1] // heads
        x[:, -1, head * size : (head + 1) * size] = 0
        return (x, *args[1:])

    return projection.register_forward_pre_hook(zero)
