"""The one registered attention and mask function, and the row kernel behind it."""

from .function import NAME, register, uncompiled

__all__ = ["NAME", "register", "uncompiled"]
