"""MemVR, memory-space visual retracing ("Look Twice Before You Answer", Zou et al., ICML 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, LayerInputEdit, LayerOutputEdit, Memory, MLPInputEdit, MLPRawEdit, RowScope, param
from vlm_fix.rows import Rows
from vlm_fix.session import PAD, VISUAL, Session
from vlm_fix.wing import engine_of

from .steering import scaled

TOP = 10  # tokens of an early exit whose entropy is taken


@dataclass
class MemVRMemory(Memory):
    images: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # embeddings [B, n, C], 0 where no image is
    fired: torch.Tensor = field(
        default_factory=lambda: torch.zeros(0)
    )  # rows [B, R] that have looked again in this forward
    now: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # rows that do so in the next layer
    x: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # what its MLP reads [B, R, C]
    any: bool | torch.Tensor = False


@dataclass(frozen=True)
class MemVR(LayerInputEdit, LayerOutputEdit, MLPInputEdit, MLPRawEdit):
    """Lets an MLP read the image's tokens as a key-value memory, once, where early exits are unsure.

    E_l = entropy of the softmax over the 10 largest logits of layer l's output (final norm, language head), over log 10.
    In the first layer l of `layers` with E_l > threshold, for a row's MLP input x [C] and output m of layer l + 1, with the
    image's embeddings Z [N, C]:
        a = Z^T Z x;   m <- (1 - ratio) m + ratio a mean|m| / mean|a|
    The prompt's last row decides for all its rows, and the means are over all of them and the channels (`prompt_rows=last`:
    that row alone); a decode row is on its own. Cost: a language head in each of `layers`.

    Source: arXiv 2410.03577; official code 1zhou-Wang/MemVR@de2e3cf: layers 6 to 15 of 32, scaled here to the depth,
    threshold .75, ratio .12 (LLaVA-1.5). Its scales of the two weight matrices cancel in the ratio of the means and are left
    out. Deviations: it takes one prompt at a time and the means over padding too; here each sample has its own, without.
    """

    name: ClassVar[str] = "memvr"
    reads_image_columns: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.03577"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"ratio": (0.06, 0.24)}
    row_scope = RowScope.ALL
    idle_reason: ClassVar[str] = "no early exit was that unsure; lower threshold."

    ratio: float = param(0.12, "share of the image's memory in the MLP's output", low=0, high=1)
    threshold: float = param(0.75, "entropy above which a row looks again; 1: never", low=0, high=1)
    prompt_rows: str = param("all", "prompt rows that look again in the first pass", choices=("last", "all"))

    def defaults(self, arch: Arch) -> dict[str, Any]:
        first = min(scaled(6, arch.depth), max(arch.depth - 2, 0))
        return {"layers": f"{first}-{max(first, min(scaled(15, arch.depth), arch.depth - 2))}"}

    @property
    def neutral(self) -> bool:
        return self.ratio == 0 or self.threshold == 1

    @property
    def sees(self) -> list[int]:
        return sorted({0, *self.layers, *(i + 1 for i in self.layers)})  # type: ignore[misc, operator, union-attr]

    @property
    def whole_prompt(self) -> bool:
        return self.prompt_rows == "all"

    def changed_something(self, session: Session) -> bool:
        return bool(session.memory(self, MemVRMemory).any)

    def layer_input(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if rows.layer != 0:
            return x
        memory, session = rows.memory(MemVRMemory), rows.session
        if rows.prefill:
            if self.prompt_rows == "all":
                session.need_whole_prompt(self.name)
            shown = x * (session.types == VISUAL).to(x.device)[:, rows.positions, None]
            memory.images = (
                torch.cat([memory.images, shown], dim=1) if session.start and memory.images.numel() else shown
            )
        memory.fired = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        memory.now = memory.fired
        return x

    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if rows.layer not in self.layers:  # type: ignore[operator]
            return x
        memory, last = rows.memory(MemVRMemory), rows.session.prompt_len - 1
        if rows.numbers[0] >= last:
            fire = self.entropy(x, rows) > self.threshold
            memory.now, memory.fired = fire & ~memory.fired.to(x.device), memory.fired.to(x.device) | fire
            return x
        deciding = rows.positions >= last
        unsure = self.entropy(x[:, deciding], rows) > self.threshold
        fire = torch.zeros_like(memory.fired, device=x.device)
        fire[:, deciding] = unsure
        if self.prompt_rows == "all" and last in rows.numbers:
            fire = torch.where(rows.positions < last, unsure[:, :1], fire)
        memory.now = fire & ~memory.fired.to(x.device)
        memory.fired = memory.fired.to(x.device) | fire
        return x

    def entropy(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, r, C] -> [B, r]"""
        logits = engine_of(rows.session.call.model).early_exit(x).to(x.device)  # the head may be on another one
        p = logits.topk(min(TOP, logits.shape[-1]), dim=-1).values.softmax(dim=-1)
        return torch.special.entr(p).sum(dim=-1) / math.log(TOP)

    def looks_again(self, rows: Rows) -> bool:
        """True in a layer after one of `layers` in which a row was unsure, or may have been: a device is not waited for."""
        now = rows.memory(MemVRMemory).now
        after: bool = rows.layer - 1 in self.layers  # type: ignore[operator]
        return after and ((now.device.type != "cpu" and not rows.prefill) or bool(now.any()))

    def mlp_input(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if self.looks_again(rows):
            rows.memory(MemVRMemory).x = x
        return x

    def mlp_raw(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if not self.looks_again(rows):
            return x
        memory = rows.memory(MemVRMemory)
        z, now = memory.images.to(x.device), memory.now.to(x.device)
        if memory.any is not True:
            known = memory.any  # of a layer that may be on another device
            before = known.to(now.device) if isinstance(known, torch.Tensor) else False
            memory.any = True if now.device.type == "cpu" or rows.prefill else now.any() | before
        a = memory.x @ z.transpose(1, 2) @ z  # [B, R, C]; columns without an image are 0
        sizes = [y.abs().mean(dim=-1) for y in (x, a)]  # [B, R]
        if self.prompt_rows == "all" and rows.prefill:
            prompt = rows.positions < rows.session.prompt_len
            real = ((rows.session.types != PAD).to(x.device)[:, rows.positions] & prompt).to(x.dtype)
            count = real.sum(dim=1, keepdim=True).clamp(min=1)
            sizes = [torch.where(prompt, (size * real).sum(dim=1, keepdim=True) / count, size) for size in sizes]
        a = a * (sizes[0] / sizes[1].clamp(min=1e-30))[..., None]
        return torch.where(now[..., None], torch.lerp(x, a, self.ratio), x)
