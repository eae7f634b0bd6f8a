"""vlm-fix: make pretrained vision-language models hallucinate less, without training.

vlm_fix.wrap(model, "pai", alpha=0.3)    # or "pai:alpha=0.3", or a stack: "hiprune:keep=192+pai+vcd"
model.generate(**inputs)                # unchanged
vlm_fix.unwrap(model)
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlm_fix.errors import VlmFixError

if TYPE_CHECKING:
    from .arch import Arch
    from .attention.edits import (
        AttentionEdit,
        ColumnEdit,
        ColumnFactors,
        ColumnMasker,
        FewColumnsEdit,
        HeadEdit,
        LayerInputReader,
        LogWeightEdit,
        PromptStart,
        QueryKeyReader,
        ScoreEdit,
        TotalReader,
        Unchanged,
        WeightEdit,
        WeightReader,
    )
    from .decoding.kinds import Contrast, LogitEdit, Procedure, Refiner, Searcher
    from .eval.api import calibrate, evaluate
    from .eval.recommend.api import Recommendation, recommend
    from .hidden.edit import (
        AttentionOutputEdit,
        FinalOutputEdit,
        HiddenEdit,
        LayerInputEdit,
        LayerOutputEdit,
        MLPInputEdit,
        MLPOutputEdit,
        MLPRawEdit,
        VisionMLPEdit,
    )
    from .inputs import InputEdit
    from .memory import Memory
    from .method import Layers, Method, param
    from .observation.inspection import Inspection, inspect
    from .observation.observe import Observation, observe
    from .pruning.kinds import TokenPruner
    from .registry import list_methods, parse_spec, register
    from .sample import Sample
    from .scope import RowScope
    from .wrapping import active, contrast_term, drafted, unwrap, wrap, wrapped

__version__ = "0.1.0"
_HOMES = {  # imported on first use: scoring files and `--help` need no torch
    "arch": ("Arch",),
    "sample": ("Sample",),
    "attention.edits": (
        "AttentionEdit",
        "ColumnEdit",
        "ColumnFactors",
        "ColumnMasker",
        "FewColumnsEdit",
        "HeadEdit",
        "LayerInputReader",
        "LogWeightEdit",
        "PromptStart",
        "QueryKeyReader",
        "ScoreEdit",
        "TotalReader",
        "Unchanged",
        "WeightEdit",
        "WeightReader",
    ),
    "decoding.kinds": (
        "Contrast",
        "LogitEdit",
        "Procedure",
        "Refiner",
        "Searcher",
    ),
    "eval.api": (
        "calibrate",
        "evaluate",
    ),
    "eval.recommend.api": (
        "Recommendation",
        "recommend",
    ),
    "hidden.edit": (
        "AttentionOutputEdit",
        "FinalOutputEdit",
        "HiddenEdit",
        "LayerInputEdit",
        "LayerOutputEdit",
        "MLPInputEdit",
        "MLPOutputEdit",
        "MLPRawEdit",
        "VisionMLPEdit",
    ),
    "inputs": ("InputEdit",),
    "memory": ("Memory",),
    "method": (
        "Layers",
        "Method",
        "param",
    ),
    "observation.inspection": (
        "Inspection",
        "inspect",
    ),
    "observation.observe": (
        "Observation",
        "observe",
    ),
    "pruning.kinds": ("TokenPruner",),
    "registry": (
        "list_methods",
        "parse_spec",
        "register",
    ),
    "scope": ("RowScope",),
    "wrapping": (
        "active",
        "contrast_term",
        "drafted",
        "unwrap",
        "wrap",
        "wrapped",
    ),
}
__all__ = [
    "Arch",
    "AttentionEdit",
    "AttentionOutputEdit",
    "ColumnEdit",
    "ColumnFactors",
    "ColumnMasker",
    "Contrast",
    "FewColumnsEdit",
    "FinalOutputEdit",
    "HeadEdit",
    "HiddenEdit",
    "InputEdit",
    "Inspection",
    "LayerInputEdit",
    "LayerInputReader",
    "LayerOutputEdit",
    "Layers",
    "LogWeightEdit",
    "LogitEdit",
    "MLPInputEdit",
    "MLPOutputEdit",
    "MLPRawEdit",
    "Memory",
    "Method",
    "Observation",
    "Procedure",
    "PromptStart",
    "QueryKeyReader",
    "Recommendation",
    "Refiner",
    "RowScope",
    "Sample",
    "ScoreEdit",
    "Searcher",
    "TokenPruner",
    "TotalReader",
    "Unchanged",
    "VisionMLPEdit",
    "VlmFixError",
    "WeightEdit",
    "WeightReader",
    "active",
    "calibrate",
    "contrast_term",
    "drafted",
    "evaluate",
    "inspect",
    "list_methods",
    "observe",
    "param",
    "parse_spec",
    "recommend",
    "register",
    "unwrap",
    "wrap",
    "wrapped",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
