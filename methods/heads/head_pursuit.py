"""Head Pursuit, attention heads that write a concept, found by sparse coding (Basile et al., NeurIPS 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import HeadEdit, RowScope, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.families import attention_modules, family_of, get_part, language_head, output_projection
from vlm_fix.method import parse_heads
from vlm_fix.rows import Rows
from vlm_fix.sample import Sample

from .pursuit import explained, written_rows


@dataclass(frozen=True)
class HeadPursuit(HeadEdit):
    """Scales the outputs of the heads whose writing is best explained by the words of a concept.

    o_h <- factor o_h before o_proj, for the heads in `head_list`: 5 brings the concept out, -1 suppresses it.
    `calibrate`: while the model describes images, head h adds Y = o_h W_O,h [n, C] to the residual stream, mean-centred over
    the n rows. D [k, C]: unembedding rows of the concept's words, L2-normalised. Simultaneous orthogonal matching pursuit:
        R = Y;  repeat `atoms` times: j = argmax_j ||R D_j||_1 over unused j;  R = Y - Y projected on the chosen D
    Heads are ranked by explained variance 1 - ||R||^2 / ||Y||^2; the `top` first are taken.

    Source: arXiv 2510.21518; its repository was not to be had. Left open here and made parameters: the number of atoms,
    the rows that are scaled (`prompt_rows`), the number of heads (the paper edits 8 to 32, about 1 %). A word stands for
    its first token. The rows Y are those that predict the first 16 tokens of greedy descriptions.
    """

    name: ClassVar[str] = "head_pursuit"
    kind: ClassVar[str] = "heads"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.21518"
    needs_image: ClassVar[bool] = False
    calibrates_on: ClassVar[str] = "captions"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"factor": (2.0,)}

    factor: float = param(5.0, "factor on the outputs of the heads: 5 enhances the concept, -1 suppresses it")
    head_list: tuple[str, ...] | None = param(None, "heads of the concept as layer.head, e.g. 16.29|26.9; by calibrate")
    prompt_rows: str = param("last", "prompt rows that are scaled in the first pass", choices=("last", "all"))
    concept: tuple[str, ...] | None = param(None, "calibrate: words of the concept; None: COCO's 80 objects")
    top: int | None = param(None, "calibrate: heads that are taken; None: 1 % of all, at least one", low=1)
    atoms: int = param(10, "calibrate: words that may explain a head together", low=1)

    def resolve(self, arch: Arch) -> HeadPursuit:
        method = super().resolve(arch)
        assert isinstance(method, HeadPursuit) and isinstance(method.layers, tuple)
        if method.head_list is None and not method.neutral:
            raise VlmFixError(
                "head_pursuit: the concept's heads are unknown for this model; run `vlm-fix calibrate head_pursuit --model "
                "NAME --out heads.json` and pass calibration='heads.json', or name them: head_pursuit:head_list=16.29|26.9."
            )
        listed = parse_heads(self.name, method.head_list or (), arch)
        return dataclasses.replace(
            method, layers=tuple(i for i in method.layers if i in {layer for layer, _ in listed})
        )

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.factor == 1 or self.head_list == () or self.layers == ()

    def edit_heads(self, outputs: torch.Tensor, rows: Rows) -> torch.Tensor:
        return outputs * rows.kept(self.scales)

    def scales(self, rows: Rows) -> torch.Tensor:
        """[H, 1, 1]: the factor of each head."""
        scale = torch.ones(rows.session.call.model.config.get_text_config().num_attention_heads)
        for item in self.head_list or ():
            layer, _, head = item.partition(".")
            if int(layer) == rows.layer:
                scale[int(head)] = self.factor
        return scale.to(rows.visual.device)[:, None, None]

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """head_list, from samples whose prompts ask for a description. Cost: a 16-token generation per sample."""
        ids = list(dict.fromkeys(samples[0].vocabulary.values()))
        if not ids:
            raise VlmFixError(
                "head_pursuit: the tokenizer knows none of the concept's words; name others with concept=."
            )
        family = family_of(model)
        modules, vectors = attention_modules(get_part(model, family.language)), language_head(model, family).weight
        heads = model.config.get_text_config().num_attention_heads
        written = written_rows(model, [*modules.values()], samples, 16, progress)
        dictionary = normalize(vectors[ids].detach().float(), dim=-1)
        shares: dict[str, float] = {}
        for done, ((i, attn), rows) in enumerate(zip(modules.items(), written, strict=True), 1):
            weight = output_projection(attn).weight.detach().float()  # [C, heads * D]
            size = weight.shape[1] // heads
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                y = rows[:, part].to(weight.device) @ weight[:, part].T
                shares[f"{i}.{h}"] = explained(y - y.mean(dim=0), dictionary.to(weight.device), self.atoms)
            progress("matching pursuit", done / len(modules))
        count = self.top or max(1, round(0.01 * len(shares)))
        return {"head_list": tuple(sorted(shares, key=lambda k: -shares[k])[:count])}
