"""Methods that act while tokens are chosen: their base classes, branches, loops and the wings that run them."""

from .bases import RotaryWing
from .contrast import ContrastWing
from .drafting import DraftWing
from .logits import LogitWing
from .procedures import ProcedureWing

__all__ = ["ContrastWing", "DraftWing", "LogitWing", "ProcedureWing", "RotaryWing"]
