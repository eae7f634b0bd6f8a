"""Methods that change hidden states: their base classes and the wings that run them."""

from .vision import VisionMLPWing
from .wing import HiddenWing

__all__ = ["HiddenWing", "VisionMLPWing"]
