"""Methods that change hidden states: their base class and the wing that runs them."""

from .wing import HiddenWing

__all__ = ["HiddenWing"]
