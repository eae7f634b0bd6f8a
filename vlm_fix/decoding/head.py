"""The way from the decoder's last layer to the logits, for rows of earlier layers: final norm, language head, soft cap or scale.

Models differ in what they do beside `lm_head`, whatever their config says. So it is measured, on a model's first forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fix.errors import VlmFixError
from vlm_fix.families import language_head
from vlm_fix.hooks import mine
from vlm_fix.wing import Host


class Head:
    """Hooks that find the final norm and what follows the language head; known after the first forward."""

    def __init__(self, host: Host):
        self.host = host
        self.norm: Any = None  # the module whose output is the head's input
        self.finish: Callable[[Tensor], Tensor]  # output of lm_head [..., V] -> logits
        self.outputs: list[tuple[Any, Tensor]] = []  # of the decoder's parts around its layers: one row [C]
        self.through: tuple[Tensor, Tensor] | None = None  # that row into lm_head [C] and out of it [V]

    def __call__(self, x: Tensor, norm: bool) -> Tensor:
        """[B, C] rows of an earlier layer -> logits [B, V], with or without the final norm."""
        return self.finish(language_head(self.host.model, self.host.family)(self.norm(x) if norm else x))

    def hooks(self) -> list[Any]:
        """Handles of the hooks that measure; none once it is known."""
        if self.norm is not None:
            return []
        model, parts = self.host.model, self.host.language.children()
        watched = [(m, self._output) for m in parts if not isinstance(m, nn.ModuleList)]
        watched += [(language_head(model, self.host.family), self._through), (model, self._measure)]
        return [module.register_forward_hook(mine(hook)) for module, hook in watched]

    def _output(self, module: Any, args: Any, output: Any) -> None:
        if self.norm is None and isinstance(output, Tensor) and output.dim() == 3:
            self.outputs.append((module, output[0, -1].detach()))

    def _through(self, module: Any, args: Any, output: Any) -> None:
        if self.norm is None:
            self.through = args[0][0, -1].detach(), output[0, -1].detach()

    def _measure(self, module: Any, args: Any, output: Any) -> None:
        if self.norm is not None or self.through is None:
            return
        (x, y), z = self.through, output.logits[0, -1].detach()
        self.finish = self._finish(y, z.to(y.device))
        norms = [m for m, out in self.outputs if out.shape == x.shape and torch.equal(out.to(x.device), x)]
        if not norms:
            raise VlmFixError(
                f"{self._names()} reads earlier layers through the final norm and the language head, but in "
                f"{type(module).__name__} the head's input is not a norm's output; use another method."
            )
        self.norm, self.outputs, self.through = norms[-1], [], None

    def _finish(self, y: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
        """What turns the head's output y [V] into the logits z [V]."""
        if torch.equal(y, z):
            return lambda out: out
        cap = getattr(self.host.model.config.get_text_config(), "final_logit_softcapping", None)
        factor = float((y.double() @ z.double()) / y.double().square().sum())
        ways: list[Callable[[Tensor], Tensor]] = [lambda out: out * factor]
        if cap:
            ways.insert(0, lambda out: cap * torch.tanh(out / cap))
        near = 4 * torch.finfo(z.dtype).eps * z.double().abs().max()
        for way in ways:
            if bool(((way(y.double()) - z.double()).abs() <= near).all()):
                return way
        raise VlmFixError(
            f"{self._names()} reads earlier layers through the language head, but the logits of "
            f"{type(self.host.model).__name__} are neither its output nor that times a number or capped softly."
        )

    def _names(self) -> str:
        return ", ".join(m.name for m in self.host.active if getattr(m, "exits", ()))
