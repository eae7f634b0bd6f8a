"""What a Procedure needs on a model: new inputs before `generate`, and a decoding loop in place of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method
from vlm_fix.options import GenerateOptions
from vlm_fix.pruning.kinds import CachePruner, LayerPruner, TokenPruner
from vlm_fix.wing import Host, Wing, names_of

from . import loops
from .kinds import Contrast, LogitEdit, Refiner, Searcher
from .prompt import Prompt


class ProcedureWing(Wing):
    """Procedures that refine the inputs, and at most one that searches for the tokens."""

    order = 35  # the contrast and the edits of logits see the refined prompt
    runs = (Refiner, Searcher)

    def __init__(self, host: Host):
        super().__init__(host)
        self.refiners = [m for m in host.active if isinstance(m, Refiner)]
        self.searches = [m for m in host.active if isinstance(m, Searcher)]
        self.own_loop = bool(self.searches)

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.refiners or wing.searches else None

    def check(self) -> None:
        droppers = names_of(self.host.active, TokenPruner, LayerPruner, CachePruner)
        if self.refiners and droppers:
            raise VlmFixError(
                f"{self.refiners[0].name} looks at all image tokens, of which {droppers[0]} drops some; use one of them."
            )
        searches = [m.name for m in self.searches]
        others = [
            m.name for m in self.host.active if isinstance(m, LogitEdit) or (isinstance(m, Contrast) and m.contrasts)
        ]
        if searches and len(searches + others) > 1:
            raise VlmFixError(
                f"{searches[0]} runs a decoding loop of its own and takes no other decoding method beside it: drop "
                f"{', '.join(searches[1:] + others)}."
            )

    def refuse(self, options: GenerateOptions) -> None:
        if self.refiners and options.kept is not None:
            raise VlmFixError(
                f"{self.refiners[0].name} changes the images before they are read: drop the kept cache and pass the "
                "whole conversation as one prompt."
            )
        if self.searches:
            loops.refuse(self.searches[0], options)

    def only_in_generate(self) -> Iterator[tuple[Method, str]]:
        yield from ((method, "change the inputs") for method in self.refiners)
        yield from ((method, "choose the tokens") for method in self.searches)

    @torch.no_grad()
    def refine(self, call: Call) -> dict[str, Any]:
        """Let procedures change the call's inputs; returns what they changed."""
        changed: dict[str, Any] = {}
        if self.refiners and "position_ids" in call.inputs:
            raise VlmFixError(f"{self.refiners[0].name} makes prompts of its own: leave position_ids out.")
        for method in self.refiners:
            changed.update(method.refine(call))
            call.inputs.update(changed)
        return changed

    @contextlib.contextmanager
    def around_generate(self, call: Call, options: GenerateOptions) -> Iterator[None]:
        changed = self.refine(call)
        options.kwargs.update(
            {name: value for name, value in changed.items() if name != "input_ids"}
        )  # see call.inputs
        prompt = Prompt(options.ids, call.inputs["input_ids"])
        if prompt.longer:
            options.kwargs.update(prompt.keep(options.kwargs, options.setting))
            options.finish.append(prompt.restored)
        if self.searches:
            streamer = options.kwargs.get("streamer")
            options.kwargs["custom_generate"] = loops.run(self.host, self.searches[0], call, streamer)
        yield
