"""Methods that drop image tokens: their base classes and the wing that runs them."""

from .wing import PruningWing

__all__ = ["PruningWing"]
