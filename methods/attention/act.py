"""ACT, attention calibration technique ("Unveiling and Harnessing Hidden Attention Sinks", Yu et al., ICML 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import FewColumnsEdit, Memory, QueryKeyReader, RowScope, Unchanged, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import Condition, TransferForm
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.kernel import column_means
from vlm_fix.families import arch_of
from vlm_fix.inputs import InputEdit
from vlm_fix.method import parse_heads
from vlm_fix.rows import Rows
from vlm_fix.sample import Sample
from vlm_fix.session import PAD, Session
from vlm_fix.wing import engine_of

from .sinks import in_heads, secondary_sinks
from .sweep import better_heads

TINY = torch.finfo(torch.float32).tiny


@dataclass
class ACTMemory(Memory):
    sinks: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, H, n] booleans, in the edited heads


@dataclass(frozen=True)
class ACT(FewColumnsEdit, QueryKeyReader, InputEdit):
    """Takes attention from sinks other than the first one and hands it to all other columns in proportion.

    While the prompt is read, column j of head h is a sink iff the mean of A[h, i, j] over the rows i that see it exceeds
    `threshold`; the first sink (BOS) is left alone. On every row, for the heads in `head_list`:
        A[sink] <- beta A[sink];   A[rest] <- A[rest] (1 + (1 - beta) sum A[sink] / sum A[rest]).
    Rows sum to 1. sinks="secondary": the columns of `attention.sinks` instead; the rows from the first one on run twice.

    Source: arXiv 2406.15765; official code GATECH-EIC/ACT@a267af7 (threshold .1, beta .4, layers 2-30 of 32; for open
    answers threshold=0.15, layers=2-31). It is made for language models and runs without an image too. The heads come from
    a sweep, one head at a time (`vlm-fix calibrate act`); the default, all of them, is only a place to start. Deviations:
    in the official code decode rows look for sinks in themselves and sum up to almost 2; here they use the prompt's and sum
    to 1. Sinks are sought in the weights before any edit of the layer; a later turn on a kept cache seeks them in its rows.
    """

    name: ClassVar[str] = "act"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15765"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"beta": (0.2, 0.8)}
    row_scope = RowScope.ALL
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.ANY_ROW
    tracks_columns: ClassVar[bool] = True
    needs_image: ClassVar[bool] = False
    idle_reason: ClassVar[str] = "no column but the first was a sink of its heads; lower threshold."

    beta: float = param(0.4, "share of a sink's attention that it keeps", low=0, high=1)
    threshold: float = param(0.1, "a column is a sink above this mean attention", low=0, high=1)
    head_list: tuple[str, ...] | None = param(None, "heads as layer.head, e.g. 5.0|7.12; None: all heads of `layers`")
    sinks: str = param("mass", "how sinks are found", choices=("mass", "secondary"))
    life: tuple[float, ...] | None = param(
        None, "secondary: lives more than a, fewer than b layers, as a|b; None: 4|depth - 15"
    )

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(2, arch.depth - 1)}-{max(min(2, arch.depth - 1), arch.depth - 2)}"}

    def resolve(self, arch: Arch) -> ACT:
        heads = parse_heads(self.name, self.head_list or (), arch)
        base = self if self.layers is not None or not heads else dataclasses.replace(self, layers="0-")
        method = super(ACT, base).resolve(arch)
        assert isinstance(method, ACT) and isinstance(method.layers, tuple)
        listed = {layer for layer, _ in heads} if self.head_list is not None else set(method.layers)
        return dataclasses.replace(method, layers=tuple(i for i in method.layers if i in listed))

    @property
    def neutral(self) -> bool:
        return self.beta == 1 or self.head_list == () or (self.threshold == 1 and self.sinks == "mass")

    @property
    def prepares(self) -> bool:
        return self.sinks == "secondary"

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        if session.start == 0:
            found, plain = secondary_sinks(session, kwargs, self.life, self)
            heads, sinks = engine_of(session.call.model).arch.heads, session.memory(self, ACTMemory).sinks
            for i in (i for i in range(len(found)) if i in (self.layers or ())):
                sinks[i] = in_heads(found[i][:, None], self.heads_in(i), heads)
            sees = found[list(self.layers or ())].flatten(0, 1).any(dim=0)  # rows before the first sink see none
            return plain.rest(int(sees.int().argmax()) if bool(sees.any()) else None)
        return kwargs

    def read_queries_and_keys(self, inputs: QueryRows, rows: Rows) -> None:
        """Find the prompt's sinks."""
        session, device = rows.session, inputs.query.device
        if self.sinks != "mass" or not rows.prefill:
            return
        session.need_whole_prompt(self.name)
        real = (session.types != PAD).to(device)
        prompt = real[:, session.start :] & (rows.positions < session.prompt_len)
        heads = self.heads_in(rows.layer)
        means = column_means(inputs if heads is None else inputs.of_heads(heads), prompt)
        found = (means > self.threshold) & rows.columns(real)[:, :, 0]
        found = in_heads(found & (found.cumsum(dim=-1) > 1), heads, inputs.query.shape[1])
        hidden = session.types.shape[1] - found.shape[-1]  # columns that a sliding window has left behind
        seen = torch.nn.functional.pad(found, (max(0, hidden), 0))[..., : session.types.shape[1]]
        rows.memory(ACTMemory).sinks[rows.layer] = seen

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        sinks = rows.of_heads(rows.memory(ACTMemory).sinks[rows.layer])
        sink = rows.groups(sinks, lambda sink, visual: sink.to(weights.dtype))
        return self.reweight(weights, sink[:, :, None], rows)

    def transfer(self, rows: Rows) -> TransferForm:
        return rows.ahead(self.moves, of=rows.memory(ACTMemory).sinks[rows.layer])

    def moves(self, rows: Rows) -> TransferForm:
        """From the sinks to all other columns."""
        groups = 1 + self.separate_columns(rows).to(torch.uint8)
        return TransferForm(groups, self.beta, 1 - self.beta, (Condition(1, 0, 0, TINY),))

    def separate_columns(self, rows: Rows) -> torch.Tensor:
        sinks = rows.of_heads(rows.memory(ACTMemory).sinks[rows.layer])
        return rows.columns(sinks.flatten(0, 1)).view(*sinks.shape[:2], 1, -1)

    def reweight(self, weights: torch.Tensor, separate: torch.Tensor, rows: Rows) -> torch.Tensor:
        sinks = weights * separate
        rest = weights - sinks
        inside, outside = sinks.sum(dim=-1, keepdim=True), rest.sum(dim=-1, keepdim=True)
        gain = 1 + (1 - self.beta) * inside / outside.clamp(min=torch.finfo(weights.dtype).tiny)
        return torch.addcmul(sinks * torch.where(outside > 0, self.beta, 1.0), rest, gain)

    def heads_in(self, layer: int) -> tuple[int, ...] | None:
        listed = [name.split(".") for name in self.head_list or ()]
        heads = tuple(sorted({int(head) for of, head in listed if int(of) == layer}))
        return None if self.head_list is None else heads

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """head_list: the heads that, calibrated alone, answer more of the samples right (the paper's sweep)."""
        edited = self.resolve(arch_of(model)).layers
        assert isinstance(edited, tuple)
        return {"head_list": better_heads(model, self, edited, samples, progress)}
