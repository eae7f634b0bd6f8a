"""The pruners on one model."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_fix.wing import Host

from .kinds import CachePruner, LayerPruner, TokenPruner


@dataclass
class Pruners:
    """At most one of each kind; a method may be two of them."""

    host: Host
    pruner: TokenPruner | None  # before the language model
    dropper: LayerPruner | None  # inside it
    cacher: CachePruner | None  # in its cache

    @property
    def all(self) -> list[TokenPruner | LayerPruner | CachePruner]:
        """Those there are, each once."""
        return list(dict.fromkeys(m for m in (self.pruner, self.dropper, self.cacher) if m is not None))

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        """Vision layers whose attention scores they need."""
        return tuple({layer for m in self.all for layer in m.encoder_layers(self.host.arch) or ()})

    @property
    def flows(self) -> bool:
        """True if one of them reads `ImageTokens.flow`."""
        return any(getattr(m, "reads_flow", False) for m in self.all)
