"""Methods that change attention: their base class, the attention function and the kernels that run them."""

from .function import NAME, register
from .strategies import AttentionPath
from .wing import AttentionWing, LayerHandle

__all__ = ["NAME", "AttentionPath", "AttentionWing", "LayerHandle", "register"]
