"""Branches of a contrast whose rotary embedding has another base: the same prompt at other distances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method
from vlm_fix.wing import Host, Wing

from .kinds import Contrast


class RotaryBranches(Contrast, ABC):
    """A contrast whose branches read the prompt with other rotary bases."""

    own_keys: ClassVar[bool] = True

    @property
    @abstractmethod
    def ratios(self) -> dict[str, float]:
        """Branch -> its rotary base in units of the model's."""

    def resolve(self, arch: Arch) -> Method:
        for ratio in self.ratios.values():
            if ratio <= 0:
                raise VlmFixError(
                    f"{self.name}: a rotary base is above 0, in units of the model's own, and {ratio:g} is not."
                )
        return super().resolve(arch)


class RotaryWing(Wing):
    """Turns the rotary tables of such branches."""

    order = 45
    runs = (RotaryBranches,)

    def __init__(self, host: Host, method: RotaryBranches):
        super().__init__(host)
        self.method = method
        children = dict(host.language.named_children()).items()
        self.modules = [m for _, m in children if any(name.endswith("inv_freq") for name, _ in m.named_buffers())]

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        found = [m for m in host.active if isinstance(m, RotaryBranches) and m.contrasts]
        return cls(host, found[0]) if found else None

    def check(self) -> None:
        if not self.modules:
            raise VlmFixError(
                f"{self.method.name} changes the base of a rotary embedding, and this model's language model has none of "
                "its own: use another method."
            )

    def install(self) -> Iterable[Any]:
        for module in self.modules:
            yield module.register_forward_hook(self._turned, with_kwargs=True)

    def _turned(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """cos and sin [B, q, D], the rows of each session by its own base."""
        host = self.host
        sessions: list[Any] = list(host.joint.sessions) if host.joint else [host.session]
        bases = [self.method.ratios.get(s.branch, 1.0) if s is not None else 1.0 for s in sessions]
        if all(base == 1 for base in bases):
            return None
        if len(bases) == 1:
            return rebased(module, bases[0], args, kwargs)
        each = [output if base == 1 else rebased(module, base, args, kwargs) for base in bases]
        parts = [[t.chunk(len(bases), dim=-3)[i] for t in tables] for i, tables in enumerate(each)]
        return tuple(torch.cat(tables, dim=-3) for tables in zip(*parts, strict=True))


def rebased(module: Any, ratio: float, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the rotary module gives with its base times `ratio`: frequency i of n becomes f_i ratio^(-i / n)."""
    frequencies = {name: x for name, x in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
    try:
        for name, f in frequencies.items():
            i = torch.arange(len(f), device=f.device, dtype=torch.float32)
            module._buffers[name] = (f.float() * ratio ** (-i / len(f))).to(f.dtype)
        return module.forward(*args, **kwargs)
    finally:
        module._buffers.update(frequencies)
