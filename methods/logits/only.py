"""ONLY, one-layer intervention ("One-Layer Intervention Sufficiently Mitigates Hallucinations", Wan et al., ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, Memory, QueryKeyReader, VlmFixError, WeightReader, param
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step
from vlm_fix.families import get_part, output_projection
from vlm_fix.hidden.wing import mlp_of
from vlm_fix.rows import Rows
from vlm_fix.session import PAD


@dataclass
class ONLYMemory(Memory):
    value: torch.Tensor | None = None  # [B, Hkv, K, D] of the layer, while it runs
    output: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # tokens generated before a row -> its text output [B, C]


@dataclass(frozen=True)
class ONLY(WeightReader, QueryKeyReader, LogitEdit):
    """Makes a second distribution of one layer's text-minded heads, and adds or subtracts it by how far it lies off.

    With a_h [K] the weights of head h of layer e in the row that predicts, over the text T (without the first column) and
    the image V, each part without its outliers (0 where a > mean + std of the part):
        r_h = H(a_h[T]) / H(a_h[V]), H the entropy of the normalised part;  heads with r_h < mean r write nothing
        c = o_proj of what the others write;  x the last layer's input:  y = norm_in(c) + .2 x;  y <- y + MLP(norm(y))
        l' = head(final norm(y)) + .5 l;   d = sum |softmax(l) - softmax(l')|
        z = l + alpha_add l' where d < gamma, else (1 + alpha) l - alpha l';  tokens with p < beta max p are cut off
    No pass more: one attention row, one MLP and one language head for each token.

    Source: arXiv 2507.00898; official code zifuwan/ONLY@109bffe (its modified Llama; layer 0, alpha_add 3, alpha 1, beta .1,
    gamma .2 for yes/no questions and .25 for captions on LLaVA-1.5; d is twice the total variation distance). The image
    columns are where the image is, not at fixed places. It takes one prompt at a time and samples only; here every mode.
    """

    name: ClassVar[str] = "only"
    kind: ClassVar[str] = "logits"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.00898"
    needs_image: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    alpha: float = param(1.0, "contrast strength, where the two distributions lie far apart", low=0)
    alpha_add: float = param(3.0, "weight of the second distribution, where they are close", low=0)
    gamma: float = param(0.2, "distance up to which it is added", low=0, high=2)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    last: int | None = param(None, "the layer whose MLP is run on it; auto: the last", low=0, of="layers")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": str(arch.attention[0]), "last": arch.depth - 1}

    def resolve(self, arch: Arch) -> ONLY:
        method = super().resolve(arch)
        assert isinstance(method, ONLY) and isinstance(method.layers, tuple)
        if len(method.layers) != 1:
            raise VlmFixError(
                f"only reads the heads of one layer, not of {len(method.layers)}; give one, as in layers=0."
            )
        return method

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.alpha_add == 0

    def read_queries_and_keys(self, inputs: QueryRows, rows: Rows) -> None:
        memory = rows.memory(ONLYMemory)
        memory.value, memory.output = inputs.value, {}

    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        session, memory = rows.session, rows.memory(ONLYMemory)
        value = memory.value
        assert value is not None
        if rows.numbers.stop == session.start + session.length:  # the last chunk of rows
            memory.value = None
        real = session.types != PAD
        real = real & (real.cumsum(dim=1) > 1)  # without the first column
        text = rows.columns(real) & ~rows.visual
        a = self.textual(weights, text, rows.visual)
        groups = a.shape[1] // value.shape[1]
        out = (a @ value.to(a.dtype).repeat_interleave(groups, dim=1)).transpose(1, 2).flatten(2)  # [B, R, H D]
        model = session.call.model
        project = output_projection(get_part(model, session.call.family.language).layers[rows.layer].self_attn)
        written = project(out.to(project.weight.dtype))
        for r, position in enumerate(rows.numbers):
            memory.output[position - session.prompt_len + 1] = written[:, r]

    def textual(self, a: torch.Tensor, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Weights [B, H, R, K] -> those without outliers, of the heads that see more in the text. Masks [B, 1, 1, K]."""
        entropies = []
        for part in (text, image):
            part = part & (a > 0)  # columns that this row sees
            count = part.sum(dim=-1, keepdim=True)
            mean = (a * part).sum(dim=-1, keepdim=True) / count.clamp(min=1)
            std = (((a - mean).square() * part).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
            a = a.masked_fill(part & (a > mean + std), 0)
            p = a * part / (a * part).sum(dim=-1, keepdim=True)
            entropies.append(-(p * (p + 1e-6).log()).sum(dim=-1))
        ratio = entropies[0].nan_to_num(nan=0.0) / entropies[1].nan_to_num(nan=torch.inf)  # [B, H, R]
        return a.masked_fill((ratio < ratio.mean(dim=1, keepdim=True))[..., None], 0)

    @property
    def exits(self) -> tuple[int, ...]:
        return (self.last,)  # type: ignore[return-value]

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        output = step.session.memory(self, ONLYMemory).output.get(step.index)
        if output is None:
            return l
        model, family = step.session.call.model, step.session.call.family
        language = get_part(model, family.language)
        y = after_last_layer(language.layers[self.last], output, step.state(self.exits[0]))
        second = step.head(y, True).float().to(l.device) + 0.5 * l
        far = (l.exp() - second.softmax(dim=-1)).abs().sum(dim=-1, keepdim=True) >= self.gamma
        z = torch.where(far, (1 + self.alpha) * l - self.alpha * second, l + self.alpha_add * second)
        z = plausible(z.masked_fill(torch.isinf(l), -torch.inf), l, self.beta)
        return torch.where(step.session.shown(l.device), z, l)


def after_last_layer(layer: Any, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y of ONLY [B, C]: the last layer's own norms and MLP on a text output c, with a fifth of its input x."""
    names = (
        ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        if hasattr(layer, "pre_feedforward_layernorm")
        else ("post_attention_layernorm", "post_mlp_layernorm")
    )
    before, behind = getattr(layer, names[0], None), getattr(layer, names[1], None)
    if before is None or not hasattr(layer, "input_layernorm"):
        raise VlmFixError(
            f"only: {type(layer).__name__} has norms in places that are not known here; use another method."
        )
    y = layer.input_layernorm(c.to(x)) + 0.2 * x
    added = mlp_of(layer)(before(y)[:, None])
    added = (added[0] if isinstance(added, tuple) else added).view_as(y)
    return y + (added if behind is None else behind(added))
