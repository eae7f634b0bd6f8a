"""LayerCake, token-aware contrast within the layers (Zhu et al., 2025)."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, Layers, RowScope, VlmFixError, WeightEdit, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.method import parse_layers
from vlm_fix.rows import Rows
from vlm_fix.session import TEXT

FUNCTION_WORDS = """about above after again all also and any are because been before being below between both but can cannot could
did does doing down during each few for from further had has have having her here hers herself him himself his how into its
itself just may might more most must myself nor not now off once only other our ours ourselves out over own same shall
she should some such than that the their theirs them themselves then there these they this those through too under
until very was were what when where which while who whom whose why will with would you your yours yourself"""


@dataclass(frozen=True)
class LayerCake(WeightEdit, Contrast):
    """Contrasts with the model that overlooks punctuation in early layers and content words in middle layers.

    In the branch, for text columns j of the prompt and the answer: A[i, j] = 0 where j is punctuation, the layer in
    `punctuation_layers` and A[i, j] > punctuation_above, or j a content word, the layer in `concept_layers` and
    A[i, j] > concept_above; each row is divided by its sum. z = (1 + alpha) log p - alpha log p', tokens with
    p < beta max p cut off.

    Source: arXiv 2507.04404, its text only (announced code: Styxiian/LayerCake, not to be had). The paper names a
    strength, a cut-off, two thresholds and two layer ranges; their values were not to be had either: the defaults are
    choices made here, and thresholds are read as least weights. Written for text models: images are left alone.
    Types are those of single tokens: punctuation has no letter or digit; a content word, or piece of one, has three or
    more letters and is no English function word. They come from the tokenizer in the model's directory, or as ids.
    """

    name: ClassVar[str] = "layercake"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.04404"
    needs_image: ClassVar[bool] = False
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    branch: str = param("negative", "always the second branch", choices=("negative",))
    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    punctuation_layers: Layers = param(None, "layers that overlook punctuation; the first eighth")
    concept_layers: Layers = param(None, "layers that overlook content words; the second quarter")
    punctuation_above: float = param(0.0, "least weight on punctuation that is taken away", low=0, high=1)
    concept_above: float = param(0.0, "least weight on content words that is taken away", low=0, high=1)
    prompt_rows: str = param("all", "rows of the prompt that overlook them", choices=("last", "all"))
    punctuation: tuple[int, ...] | None = param(None, "token ids of punctuation", of="token ids")
    concepts: tuple[int, ...] | None = param(None, "token ids of content words", of="token ids")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        depth, middle = arch.depth, arch.depth // 4
        return {
            "punctuation_layers": tuple(range(max(1, depth // 8))),
            "concept_layers": tuple(range(middle, max(middle + 1, depth // 2))),
        }

    def resolve(self, arch: Arch) -> LayerCake:
        method = super().resolve(arch)
        assert isinstance(method, LayerCake) and isinstance(method.layers, tuple)
        early, middle = (
            parse_layers(x, arch.depth, self.name) for x in (method.punctuation_layers, method.concept_layers)
        )
        layers = tuple(i for i in method.layers if i in early or i in middle)
        return dataclasses.replace(method, layers=layers, punctuation_layers=early, concept_layers=middle)

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        a = weights
        gone = torch.zeros_like(a, dtype=torch.bool)
        types, ids = rows.session.types, rows.session.ids()
        for kind, layers, least in (
            (0, self.punctuation_layers, self.punctuation_above),
            (1, self.concept_layers, self.concept_above),
        ):
            if rows.layer in (layers or ()):
                chosen = torch.isin(ids, self.tokens(rows.session.call.model, kind).to(ids.device)) & (types == TEXT)
                gone |= rows.columns(chosen) & (a > least)
        left = a.masked_fill(gone, 0.0)
        total = left.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, left / total.clamp(min=torch.finfo(a.dtype).tiny), a)

    def tokens(self, model: Any, kind: int) -> torch.Tensor:
        """Ids of punctuation (0) or content words (1)."""
        given = (self.punctuation, self.concepts)[kind]
        if given is not None:
            return torch.tensor(given)
        try:
            return _sorted_tokens(model.config.name_or_path)[kind]
        except (OSError, ValueError) as problem:
            raise VlmFixError(
                f"layercake needs the model's tokenizer, but {model.config.name_or_path!r} has none: load the model from "
                "its directory or hub name, or give token ids as layercake:punctuation=1|2,concepts=3|4."
            ) from problem

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.inputs

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        z = (1 + self.alpha) * l - self.alpha * l_neg
        return plausible(z.masked_fill(torch.isinf(l), -torch.inf), l, self.beta)


@functools.lru_cache(maxsize=4)
def _sorted_tokens(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    special, function = set(tokenizer.all_special_ids), set(FUNCTION_WORDS.split())
    punctuation: list[int] = []
    concepts: list[int] = []
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        word = text.strip()
        if word and i not in special:
            if all(unicodedata.category(c)[0] in "PS" for c in word):
                punctuation.append(i)
            elif word.isalpha() and len(word) > 2 and word.lower() not in function:
                concepts.append(i)
    return torch.tensor(punctuation), torch.tensor(concepts)
