"""The one registered attention and mask function, and the row kernel behind it."""

from .function import NAME, register

__all__ = ["NAME", "register"]
