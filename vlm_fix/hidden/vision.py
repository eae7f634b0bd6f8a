"""Hooks that let VisionMLPEdit methods change what the MLPs of the vision tower add."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch

from vlm_fix import compiled
from vlm_fix.errors import VlmFixError
from vlm_fix.families import vision_blocks
from vlm_fix.wing import Host, Wing

from .edit import VisionMLPEdit
from .wing import mlp_of


class VisionMLPWing(Wing):
    """Hooks on the MLPs of the vision tower; a pass that only observes sees the tower as it is."""

    order = 31
    runs = (VisionMLPEdit,)

    def __init__(self, host: Host):
        super().__init__(host)
        self.edits = [m for m in host.active if isinstance(m, VisionMLPEdit) and m.vision_layers]

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.edits else None

    def one_graph(self, rows: int) -> bool:
        return rows == 1

    def install(self) -> Iterable[Any]:
        for i, block in enumerate(vision_blocks(self.host.model, self.host.family)):
            here = [e for e in self.edits if i in e.vision_layers]
            mlp = mlp_of(block)
            if here and mlp is None:
                raise VlmFixError(
                    f"{here[0].name}: the vision tower's {type(block).__name__} has no MLP that is known here."
                )
            if here:
                yield mlp.register_forward_hook(functools.partial(self._write, here, i))

    @compiled.uncompiled
    def _write(
        self, edits: Sequence[VisionMLPEdit], layer: int, module: Any, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if self.host.session is not None and self.host.session.plain:  # generate may run the tower before any session
            return None
        x = output.float()
        for edit in edits:
            x = edit.vision_mlp(x, layer)
            self.host.touched.add(edit)
        return x.to(output.dtype)
