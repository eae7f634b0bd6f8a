"""vlm-fix: make pretrained vision-language models hallucinate less, without training.

vlm_fix.wrap(model, "var")              # or "pai:alpha=0.2", or ["hiprune:keep=192", "pai", "vcd"]
model.generate(**inputs)                # unchanged
vlm_fix.unwrap(model)
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import VlmFixError

if TYPE_CHECKING:
    from .engine import contrast_term, unwrap, wrap, wrapped
    from .method import (
        AttentionEdit,
        Columns,
        Contrast,
        HiddenEdit,
        Layers,
        LogitEdit,
        Method,
        Procedure,
        TokenPruner,
        param,
    )
    from .observation import Observation, observe
    from .registry import list_methods, parse_spec

__version__ = "0.1.0"
_HOMES = {  # imported on first use: scoring files and `--help` need no torch
    "engine": ("contrast_term", "unwrap", "wrap", "wrapped"),
    "method": (
        "AttentionEdit",
        "Columns",
        "Contrast",
        "HiddenEdit",
        "Layers",
        "LogitEdit",
        "Method",
        "Procedure",
        "TokenPruner",
        "param",
    ),
    "observation": ("Observation", "observe"),
    "registry": ("list_methods", "parse_spec"),
}
__all__ = [
    "AttentionEdit",
    "Columns",
    "Contrast",
    "HiddenEdit",
    "Layers",
    "LogitEdit",
    "Method",
    "Observation",
    "Procedure",
    "TokenPruner",
    "VlmFixError",
    "contrast_term",
    "list_methods",
    "observe",
    "param",
    "parse_spec",
    "unwrap",
    "wrap",
    "wrapped",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
