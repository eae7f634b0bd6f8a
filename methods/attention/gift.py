"""GIFT, gaze shift-guided cross-modal fusion enhancement (Qi et al., 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, InputEdit, PromptStart, RowScope, Sample, Unchanged, VlmFixError, WeightEdit, param
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.attention.halves import raised
from vlm_fix.attention.preview import PlainWeights, preview
from vlm_fix.calibration.search import best_value
from vlm_fix.call import Call
from vlm_fix.rows import Rows
from vlm_fix.session import Session
from vlm_fix.words import TEMPLATE, check_template, template_columns

from .saliency import GIFTMemory, add_shifts, counted, enhanced


@dataclasses.dataclass(frozen=True)
class GIFT(WeightEdit, PromptStart, InputEdit):
    """Amplifies attention to what the eyes turned to while the question was read, and to the question by as much.

    At `source_layer`, for query tokens q (the question after the images): shift = sum_q relu(A[q, V] - A[q-1, V]).
    The H/2 heads with the largest sum are averaged, clamped to mean +- 3 std over V and scaled to m in [0, 1].
    In `layers`, on the last prompt row and decode rows, after softmax:
        Hv = top H/2 heads by A[V].sum:     A[Hv, V] *= exp(alpha m);   c = what A[Hv, V].sum grew by, over all of Hv
        Hq = top H/2 heads by A[query].sum: A[Hq, query] *= c;          every row renormalised.

    Source: arXiv 2510.22067, official code at e20b8a9: source layer 11, layers 12-22, alpha 5 for LLaVA-1.5-7B; 10,
    14-20 and 5 for 13B; 14, 5-18 and 4 for Qwen2-VL-7B; scaled to the depth of other models.
    Deviations: the official code keeps the query's content words, by a part-of-speech tagger; pos="content" does so with
    NLTK's tagger and the tokenizer beside the model (`vlm_fix.words`). It leaves out the template by number: after the
    image 2 tokens (LLaVA-1.5) or 1 (Qwen2-VL), 5 at the end; here by its ids: end marks of images, the model's end of a turn,
    LLaVA-1.5's " ASSISTANT:". Another template counts as question, unless its numbers are given: `template=2|5`. So do earlier
    turns (on a kept cache: not for the map). The map never counts the first token after the image: no text row is before it.
    As in the official code it comes before the edit: from the same pass where no edited layer lies below the source
    layer, else from one without edits, from which the last row then goes on. std is the population's. No contrast: m = 0.
    """

    name: ClassVar[str] = "gift"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.22067"
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.PROMPT_ROWS
    tracks_columns: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.5, 1.0)}

    alpha: float | None = param(None, "strength: the most salient column's weight grows by exp(alpha)", low=0, high=50)
    source_layer: int | None = param(None, "layer whose attention gives the map", low=0, of="layers")
    pos: str = param("all", "words of the question that count: all, or content words only", choices=("all", "content"))
    template: tuple[int, ...] | None = param(None, TEMPLATE)
    edit_source: bool | None = param(None, "edit the source layer as well; None: if `layers` holds it")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        if arch.family.mrope:
            depth, source, first, last, alpha = 28, 14, 5, 18, 4.0
        else:
            depth, source, first, last, alpha = (40, 10, 14, 20, 5.0) if arch.depth == 40 else (32, 11, 12, 22, 5.0)
        scaled = [min(arch.depth - 1, round(x / depth * arch.depth)) for x in (source, first, last)]
        source = min(arch.attention, key=lambda i: abs(i - scaled[0]))
        return {"alpha": alpha, "source_layer": source, "layers": f"{scaled[1]}-{scaled[2]}"}

    def resolve(self, arch: Arch) -> GIFT:
        method = super().resolve(arch)
        assert isinstance(method, GIFT) and isinstance(method.layers, tuple) and method.source_layer is not None
        source = method.source_layer
        check_template("gift", method.template)
        if source not in arch.attention:
            raise VlmFixError(f"gift: source_layer={source} has no attention weights; layers {arch.attention} do.")
        edit = source in method.layers if method.edit_source is None else method.edit_source
        layers = {*method.layers} - {source} | ({source} if edit else set())
        if not layers:
            raise VlmFixError("gift: edit_source=false leaves no layer to edit; name more layers.")
        layers |= set() if min(layers) < source else {source}
        return dataclasses.replace(method, layers=tuple(sorted(layers)), edit_source=edit)

    @property
    def prepares(self) -> bool:
        """True if a layer below the source layer is edited: the map then takes a pass of its own."""
        return isinstance(self.layers, tuple) and self.layers[0] < (self.source_layer or 0)

    @property
    def row_scope(self) -> RowScope:
        return RowScope.LAST if self.prepares else RowScope.AFTER_IMAGE

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def on_prompt(self, session: Session, call: Call) -> None:
        """Forget the question of an earlier turn on a kept cache."""
        session.forget(self)

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        if session.start >= session.prompt_len or max(session.last_visual) < 0:
            return kwargs
        return preview(session, kwargs, self, PlainWeights(self, self.source_layer or 0, self.read)).rest()

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        if rows.layer == self.source_layer and rows.prefill and not self.prepares:
            self.read(weights, rows)
        m, question = rows.memory(GIFTMemory).saliency, rows.memory(GIFTMemory).question
        if m is None or question is None or (rows.layer == self.source_layer and not self.edit_source):
            return weights
        new, last = enhanced(weights, *self.factors(m, question, rows), rows), rows.session.prompt_len - 1
        return new if rows.numbers[0] >= last else torch.where((rows.positions >= last)[:, None], new, weights)

    def form_of_scores(self, scores: Callable[[], torch.Tensor], rows: Rows) -> ScoreForm | None:
        """Factors of weights that are renormalised are logarithms added to scores."""
        memory = rows.memory(GIFTMemory)
        if rows.prefill or memory.saliency is None or memory.question is None or rows.session.padded:
            return None
        if rows.layer == self.source_layer and not self.edit_source:
            return ScoreForm()
        groups, pair = rows.ahead(self.columns, of=memory.saliency)
        return ScoreForm(bias=torch.bmm(raised(scores(), groups), pair)[:, :, None])

    def columns(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The image, the question and alpha m, [B, 3, K]; the last and the second of them, [B, 2, K]."""
        memory = rows.memory(GIFTMemory)
        assert memory.saliency is not None and memory.question is not None
        m, query = self.factors(memory.saliency, memory.question, rows)
        parts = [x[:, 0, 0].float() for x in (rows.visual, query, m * rows.visual)]
        return torch.stack(parts, dim=1), torch.stack([parts[2], parts[1]], dim=1)

    def read(self, a: torch.Tensor, rows: Rows) -> None:
        """Add the shifts of these rows [B, H, R, K]; after the prompt's last one, make the saliency map."""
        memory = rows.memory(GIFTMemory)
        memory.question = ~template_columns(rows.session.whole, self.template).to(a.device)
        add_shifts(memory, a, rows, counted(rows.session, memory.question, self.pos))

    def factors(self, m: torch.Tensor, question: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha m and the question's columns, [B, 1, 1, K] both."""
        m = (self.alpha or 0.0) * rows.columns(m, -1 if self.prepares else self.source_layer)
        return m, rows.after & ~rows.generated & rows.columns(question, -1)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """source_layer: the one with most right answers, then the surest. Cost: up to 2 x depth + 1 passes over the samples."""
        depth = model.config.get_text_config().num_hidden_layers
        best = best_value(model, self, "source_layer", range(depth), samples, progress)
        if best is None:
            raise VlmFixError("gift: with no source layer this model answers these questions better; use others.")
        return {"source_layer": best}
