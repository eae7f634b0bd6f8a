"""IRI, intermediate representation injection, and FCCT, the causal tracing behind it (Li et al., AAAI 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, AttentionOutputEdit, Memory, MLPOutputEdit, Sample, VlmFixError, param
from vlm_fix.hidden.push import pushed
from vlm_fix.rows import Rows
from vlm_fix.session import Session

from .tracing import recovery_rates

PARTS = {"rr_attention": "attention_output", "rr_mlp": "mlp_output"}
LAMBDAS = {"llava": (0.26, 0.16), "llava_next": (0.15, 0.08)}


@dataclass
class IRIMemory(Memory):
    sums: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # rates -> sum of RR_k a_k over its sources so far [B, R, C]
    injected: bool = False


@dataclass(frozen=True)
class IRI(AttentionOutputEdit, MLPOutputEdit):
    """Repeats what the causally most important layers wrote in later important layers, at the length it had there.

    With a_l the attention output of layer l [C], on the last prompt row and decode rows, src the `sources` layers of
    largest recovery rate RR and tgt the `targets` largest: for l in tgt with an earlier k in src,
        b_l = a_l + lambda_a sum_{k in src, k < l} RR_k a_k;    a_l <- b_l ||a_l|| / ||b_l||;
    the same for MLP outputs with their own rates and lambda_m. a_k is what layer k computed, before its own injection.
    `calibrate` (FCCT): RR_l = (P_patched - P_corrupt) / (P_clean - P_corrupt), P the probability of the right answer,
    where the corrupt run sees a noised image and the patched run gets the clean a_l in its last row. `layers` leaves out
    targets, never sources.

    Source: arXiv 2511.05923, no code found; lambda .26/.16 for LLaVA-1.5, .15/.08 for LLaVA-NeXT, .20/.10 for Qwen-VL-Chat
    (taken for Qwen2.5-VL); 3 and 10 of 32 layers, scaled to the depth. Left open by the paper, chosen here: RR is the ratio
    of means over the questions that are answered right and lose probability under the noise; the noise is Gaussian, `noise`
    standard deviations of the image's own pixel values.
    """

    name: ClassVar[str] = "iri"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.05923"
    idle_reason: ClassVar[str] = "no target layer comes after a source layer; raise targets or sources."
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"lambda_a": (0.1, 0.5)}

    lambda_a: float | None = param(None, "strength of the attention injection", low=0)
    lambda_m: float | None = param(None, "strength of the MLP injection", low=0)
    rr_attention: tuple[float, ...] | None = param(None, "recovery rate of each layer's attention, by calibrate")
    rr_mlp: tuple[float, ...] | None = param(None, "recovery rate of each layer's MLP, by calibrate")
    sources: int | None = param(None, "layers that are injected: those of largest rate", low=1)
    targets: int | None = param(None, "layers that are injected into: those of largest rate", low=1)
    noise: float = param(3.0, "calibrate: noise on the image, in standard deviations of its pixel values", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        a, m = (0.20, 0.10) if arch.family.mrope else LAMBDAS.get(arch.family.name, LAMBDAS["llava"])
        count = {"sources": max(1, round(3 / 32 * arch.depth)), "targets": max(2, round(10 / 32 * arch.depth))}
        return {"lambda_a": a, "lambda_m": m, **count}

    def resolve(self, arch: Arch) -> IRI:
        method = super().resolve(arch)
        assert isinstance(method, IRI)
        for name in PARTS:
            rates = getattr(method, name)
            if rates is None and not method.neutral:
                raise VlmFixError(
                    "iri: the recovery rates of this model are unknown; run `vlm-fix calibrate iri --model NAME --out "
                    "iri.json` and pass calibration='iri.json' (--calibration iri.json)."
                )
            if rates is not None and len(rates) != arch.depth:
                raise VlmFixError(f"iri: {name} holds {len(rates)} rates; this model has {arch.depth} layers.")
        return method

    @property
    def neutral(self) -> bool:
        return self.lambda_a == 0 and self.lambda_m == 0

    @property
    def sees(self) -> list[int]:
        return sorted({*self.layers, *(i for name in PARTS for i in self.ranked(name)[: self.sources])})  # type: ignore[misc]

    def ranked(self, rates: str) -> list[int]:
        """Layers, the largest recovery rate first."""
        return sorted(range(len(rate := getattr(self, rates))), key=lambda i: -rate[i])

    def changed_something(self, session: Session) -> bool:
        return session.memory(self, IRIMemory).injected

    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.injected(x, rows, "rr_attention", self.lambda_a or 0.0)

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.injected(x, rows, "rr_mlp", self.lambda_m or 0.0)

    def injected(self, x: torch.Tensor, rows: Rows, rates: str, strength: float) -> torch.Tensor:
        """[B, R, C] -> [B, R, C]; remembers the sources' outputs of this forward."""
        rate, memory, layer, order = getattr(self, rates), rows.memory(IRIMemory), rows.layer, self.ranked(rates)
        sources, targets = order[: self.sources], {*order[: self.targets]} & {*self.layers}  # type: ignore[misc]
        earlier = memory.sums[rates].to(x.device) if layer > min(sources) else None
        if layer in sources:
            memory.sums[rates] = rate[layer] * x if earlier is None else torch.add(earlier, x, alpha=rate[layer])
        if layer not in targets or earlier is None or not strength:
            return x
        memory.injected = True
        return pushed(x, earlier, strength, relative=False)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """FCCT: rr_attention and rr_mlp, a rate per layer. One clean and one noised pass and 2 x depth decode steps."""
        return recovery_rates(model, samples, PARTS, self.noise, seed, progress)
