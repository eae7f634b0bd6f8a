"""Nullu, null space of HalluSpace (Yang et al., CVPR 2025), and any other subspace that MLPs must not write to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, MLPRawEdit, RowScope, Sample, VlmFixError, param
from vlm_fix.families import arch_of, family_of, get_part
from vlm_fix.hidden.push import without_span
from vlm_fix.rows import Rows
from vlm_fix.tensors import Tensors

from .baking import project_mlp
from .files import Source, by_layer, place_of
from .pairs import answer_states
from .steering import scaled


@dataclass(frozen=True)
class Nullu(MLPRawEdit):
    """Keeps the MLPs from writing into a subspace: their output is projected onto its complement, in every row.

    P_l [C, C]: the projector on the first `rank` rows of layer l's matrix in `file`, made orthonormal. With m [C] an MLP's
    output:  m <- m - P_l m,  the same as  W_down <- (I - P_l) W_down, which `vlm-fix export nullu:file=FILE OUT` writes into
    a checkpoint that any engine loads, at no cost. A file of CIPHER's kind works too.
    `calibrate` (HalluSpace): d_i = (h_i(truthful) - h_i(hallucinated)) / 2 for pairs i of captions of one image, h_i [C] layer
    l's output averaged over the tokens; the rows are the first right singular vectors of D_l [pairs, C], not centred.

    Source: arXiv 2412.13817; official code Ziwei-Zheng/Nullu@dcb1ef4: rank 4, layers 16 to 31 of 32, scaled here to the
    depth; LURE's pairs, which are not here. As in its scripts (and its option "mean"), tokens of prompt and image are
    averaged too: `tokens=answer` takes the caption alone, `last` its last token. Deviation: a bias of W_down is
    projected with it, so that both forms are equal; in LLaVA-1.5 it has none. A prompt without an image is edited too.
    """

    name: ClassVar[str] = "nullu"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13817"
    needs_image: ClassVar[bool] = False
    calibrates_on: ClassVar[str] = "pairs"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"rank": (2, 8)}
    row_scope = RowScope.ALL

    file: Source | None = param(None, "the subspace: safetensors, rows [k, C] for each layer; by calibrate")
    rank: int = param(4, "rows of it that are taken away; 0: none", low=0)
    tokens: str = param("mean", "calibrate: the tokens of a pair that are compared", choices=("mean", "answer", "last"))

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{scaled(16, arch.depth)}-"}

    def resolve(self, arch: Arch) -> Nullu:
        method = super().resolve(arch)
        assert isinstance(method, Nullu) and isinstance(method.layers, tuple)
        if method.file is None and not method.neutral:
            raise VlmFixError(
                "nullu: the subspace of this model is unknown; run `vlm-fix calibrate nullu --model NAME --out nullu.json` and "
                "pass calibration='nullu.json', or name a safetensors file: nullu:file=FILE."
            )
        if method.neutral:
            return method
        known = by_layer(method.file, arch, self.name)  # type: ignore[arg-type]
        if place_of(method.file) == "attention_output":  # type: ignore[arg-type]
            raise VlmFixError(
                f"nullu: {method.file} is of attention outputs by its manifest; give a subspace of MLPs or layers."
            )
        rows = {i: orthonormal(known[i][: self.rank]) for i in method.layers if i in known}
        layers = tuple(i for i, q in rows.items() if len(q))
        if not layers:
            raise VlmFixError(
                f"nullu: {method.file} holds nothing but zeros, if anything, for the layers {', '.join(map(str, method.layers))}."
            )
        return dataclasses.replace(method, layers=layers, file=Tensors({str(i): rows[i] for i in layers}))

    @property
    def neutral(self) -> bool:
        return self.rank == 0

    @property
    def control(self) -> str:
        if self.neutral or not isinstance(self.file, Tensors):
            return ""
        taken = [len(self.file.named[str(i)]) for i in self.layers]  # type: ignore[union-attr]
        much = f"rank={taken[0]}" if len(set(taken)) == 1 else f"ranks={'|'.join(map(str, taken))}"
        return f"random_subspace:{much},layers={'|'.join(map(str, self.layers))}"  # type: ignore[arg-type]

    def mlp_raw(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert isinstance(self.file, Tensors)
        return without_span(x, self.file.on(str(rows.layer), x.device))

    def bake(self, model: Any) -> None:
        """Project the MLP weights of an unwrapped model in place."""
        method = self.resolve(arch_of(model))
        layers = get_part(model, family_of(model).language).layers
        for i in () if method.neutral else method.layers or ():
            project_mlp(layers[i], method.file.named[str(i)])  # type: ignore[index, union-attr]

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """file: as many rows as there are pairs, at most 16. Cost: two forwards a pair."""
        states = answer_states(model, samples, self.tokens, progress)  # [pairs, 2, depth, C]: truthful, hallucinated
        apart = (states[:, 0] - states[:, 1]) / 2
        rows = {
            f"layers.{i}": torch.linalg.svd(apart[:, i], full_matrices=False)[2][:16] for i in range(apart.shape[1])
        }
        return {"file": Tensors(rows)}


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows [<= k, C] that span the same as rows [k, C]."""
    _, size, v = torch.linalg.svd(rows.double(), full_matrices=False)
    return v[size > 1e-6 * size.max()].float()
