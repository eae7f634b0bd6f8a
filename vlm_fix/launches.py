"""Edits that run as one launch each: Triton's kernels on CUDA, and elsewhere, when asked for, one operator that does the same.

`VLM_FIX_FUSED=0` in the environment, or `use(False)`, turns them off.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

_state: dict[str, bool | None] = {"on": None}


def use(on: bool | None) -> bool | None:
    """True: on every device (without CUDA as one operator that computes the same), False: nowhere, None: on CUDA.

    Returns what was so before.
    """
    before, _state["on"] = _state["on"], on
    return before


@functools.cache
def _possible() -> bool:
    return os.environ.get("VLM_FIX_FUSED", "1") != "0" and importlib.util.find_spec("triton") is not None


def wanted(x: torch.Tensor) -> bool:
    """True if edits of x run in launches of their own; nothing could be differentiated through them."""
    on = _state["on"]
    return (x.is_cuda and _possible() if on is None else on) and not torch.is_grad_enabled()
