"""VAR, visual attention redistribution ("See What You Are Told", Kang et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, InputEdit, Memory, Method, RowScope, Sample, VlmFixError, param
from vlm_fix.attention.edits import LayerInputReader, Unchanged, WeightEdit
from vlm_fix.attention.forms import Condition, TransferForm
from vlm_fix.families import arch_of
from vlm_fix.method import parse_layers
from vlm_fix.packing import pad_to
from vlm_fix.rows import Rows
from vlm_fix.session import PAD, Session

from .massive import first_dims, known_dims, massive_ratios, ratios
from .sinks import secondary_sinks


@dataclass
class VARMemory(Memory):
    sinks: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, n] booleans of the columns so far
    dims: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, C] detected massive dimensions


@dataclass(frozen=True)
class VAR(WeightEdit, LayerInputReader, InputEdit):
    """Moves attention from sink tokens to the other image tokens, in heads that look at the image.

    On a layer's input x, column j is a sink iff max_{d in sink_dims} |x_jd| / rms(x_j) > tau (prompt columns only, text
    included). On rows after the image, a head with image attention A[V] >= min_visual_mass whose non-sink share
    1 - A[sink & V] / A[V] is at least rho becomes
        A[sink] <- (1 - p) A[sink];   A[V \\ sink] <- A[V \\ sink] (1 + p sum A[sink] / sum A[V \\ sink]).
    Row sums stay 1; nothing happens in a layer without a visual sink.
    Source: arXiv 2503.03321; official code seilk/VisAttnSink@98e62d6, whose rho_c = 1 - rho and p_c = 1 - p. sink_dims:
    known for LLaVA-1.5, Qwen2-VL-7B and InternVL2-8B; otherwise detected per call and layer as the dimensions in which
    the first real token (BOS, the best-known sink) exceeds tau. Deviations: the official code leaks the sinks of one
    sample into the next; here they live with their cache. Its settings leave out the last layer, but the flag that says
    so is never read: layers=2-30 (of 32) is what they meant. A prompt with several images is edited after the last one.
    Generated tokens are never tested: on a kept cache earlier answers have no sinks. detector="secondary" takes the columns
    of `attention.sinks` (a later turn keeps the first one's): no dimensions to know; the rows after the image run twice.
    """

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"p": (0.2, 0.6)}
    row_scope = RowScope.AFTER_IMAGE
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.ANY_ROW
    tracks_columns: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    idle_reason: ClassVar[str] = (
        "no image token was a sink (lower tau, or give sink_dims), or no head looked at the image enough (lower rho)."
    )

    sink_dims: tuple[int, ...] | None = param(None, "dimensions of massive activations; None: known or detected")
    tau: float = param(20.0, "a column is a sink above this ratio to its RMS (at most sqrt(hidden size))", low=0)
    rho: float = param(0.5, "least non-sink share of a head's image attention", low=0, high=1)
    detector: str = param("phi", "how sinks are found", choices=("phi", "secondary"))
    life: tuple[float, ...] | None = param(None, "secondary: layers a sink lives, more than a, less than b, as 4|17")
    p: float = param(0.4, "share of the sinks' attention that is recycled", low=0, high=1)
    min_visual_mass: float = param(0.2, "least attention on the image for a head to be edited", low=0, high=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(2, arch.depth - 1)}-", "sink_dims": known_dims(arch)}

    def resolve(self, arch: Arch) -> Method:
        if any(not 0 <= d < arch.hidden for d in self.sink_dims or ()):
            dims = "|".join(map(str, self.sink_dims or ()))
            raise VlmFixError(
                f"var: sink_dims={dims} do not fit this model, which has dimensions 0 to {arch.hidden - 1}."
            )
        return super().resolve(arch)

    @property
    def neutral(self) -> bool:
        return self.p == 0

    @property
    def prepares(self) -> bool:
        return self.detector == "secondary"

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        if session.start == 0:
            found, plain = secondary_sinks(session, kwargs, self.life, self)
            chosen = ((i, x) for i, x in enumerate(found) if i in (self.layers or ()))
            session.memory(self, VARMemory).sinks.update(chosen)
            return plain.rest(session.rows_in(self.row_scope, needs_image=True).first)
        return kwargs

    def read_layer_input(self, hidden: torch.Tensor, layer: int, session: Session) -> None:
        """Find the sinks among the new prompt columns."""
        if session.start >= session.prompt_len or self.detector == "secondary":
            return
        ratio = ratios(hidden)
        memory, types = session.memory(self, VARMemory), session.types.to(ratio.device)
        if self.sink_dims is not None:
            phi = ratio[..., list(self.sink_dims)].amax(dim=-1)
        else:
            memory.dims[layer] = dims = first_dims(ratio, types, session.start, self.tau, memory.dims.get(layer))
            phi = (ratio * dims[:, None]).amax(dim=-1)
        new = torch.arange(session.start, types.shape[1], device=ratio.device)
        real = (types[:, session.start :] != PAD) & (new < session.prompt_len)  # assisted decoding adds guesses at once
        earlier = [pad_to(memory.sinks[layer], session.start)] if session.start else []
        memory.sinks[layer] = torch.cat([*earlier, (phi > self.tau) & real], dim=1)

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        a, sinks = weights, rows.memory(VARMemory).sinks[rows.layer]
        groups, tiny = rows.groups(sinks, self.groups).to(a.dtype), torch.finfo(a.dtype).tiny
        mass = torch.bmm(a.flatten(1, 2), groups[:, :4].mT)  # sinks, V \ sink, V, and (1 - rho) A[V] - A[sink & V]
        _, plain, image, gate = mass.split(1, dim=-1)
        chosen = (plain >= tiny) & (image >= self.min_visual_mass) & (gate >= (self.rho - 1) * 1e-6)
        return a.addcmul(a, torch.bmm(chosen * (mass[..., :2] / plain.clamp(min=tiny)), groups[:, 4:]).view_as(a))

    def transfer(self, rows: Rows) -> TransferForm:
        return rows.ahead(self.moves, of=rows.memory(VARMemory).sinks[rows.layer])

    def moves(self, rows: Rows) -> TransferForm:
        """From the sinks to the image's other columns."""
        sink = rows.columns(rows.memory(VARMemory).sinks[rows.layer])
        seen = sink & rows.visual
        visual = rows.visual & seen.any(dim=-1, keepdim=True)
        groups = (visual & ~sink) + 2 * seen.to(torch.uint8) + 3 * (sink & ~rows.visual).to(torch.uint8)
        share = 1 - self.rho
        some, looks = Condition(1, 0, 0, torch.finfo(torch.float32).tiny), Condition(1, 1, 0, self.min_visual_mass)
        return TransferForm(groups, 1 - self.p, self.p, (some, looks, Condition(share, share - 1, 0, -share * 1e-6)))

    def groups(self, sink: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """[B, n] booleans -> [B, 6, n]: what is summed over columns, and what is added to them."""
        visual = visual & (sink & visual).any(dim=1, keepdim=True)  # a row without a visual sink is not edited
        plain, gate = visual & ~sink, (1 - self.rho) * visual - 1.0 * (visual & sink)
        return torch.stack([sink, plain, visual, gate, self.p * plain, -self.p * sink], dim=1)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """sink_dims: where the first token's |x_d| / rms, mean over the samples, exceeds tau in half of the layers or more."""
        layers = parse_layers(self.layers or self.defaults(arch_of(model))["layers"], arch_of(model).depth, self.name)
        ratio = massive_ratios(model, layers, samples, progress)
        often = (ratio > self.tau).float().mean(dim=0) >= 0.5
        if not often.any():
            raise VlmFixError(
                f"var: this model has no massive activations: the first token's largest ratio to its RMS is "
                f"{float(ratio.max()):.1f}, tau is {self.tau:g}; nothing is to be calibrated (a lower tau, as in var:tau=4, "
                "looks for weaker ones)."
            )
        return {"sink_dims": tuple(often.nonzero()[:, 0].tolist())}
