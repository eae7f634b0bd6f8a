"""One decode row of a layer in one launch: scores, their edit by columns, softmax, products with the values.

Where Triton is installed a CUDA device runs it; `VLM_FIX_FUSED=0` in the environment, or `use(False)`, turns it off. The row
kernel does the same in some ten launches, and stays what the other is tested against.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .forms import ScoreForm
from .inputs import QueryRows

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


def usable(query: torch.Tensor) -> bool:
    """True if this device runs decode rows in one launch; heads of more than 256 dimensions do not fit."""
    on = _state["on"]
    return (query.is_cuda and _possible() if on is None else on) and query.shape[-1] <= 256


def decode_row(inputs: QueryRows, form: ScoreForm) -> torch.Tensor:
    """[B, 1, H, D], in the query's dtype: attention of the one row there is, with its scores changed by `form`.

    The form's tensors may be wider than K.
    """
    query, key, value, allowed, (scaling, softcap) = inputs
    if query.is_cuda:
        from .triton_row import launch

        return launch(query, key, value, allowed, *form, scaling, softcap)
    return _row(query, key, value, allowed, *form, scaling, softcap)


@torch.library.custom_op("vlm_fix::decode_row", mutates_args=())
def _row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    return formula(query, key, value, allowed, up, down, bias, scaling, softcap)


@_row.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


def formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """What the kernel computes, in plain operations, in float32 or better."""
    batch, heads, _, dim = query.shape
    compute = torch.promote_types(query.dtype, torch.float32)
    width, groups = key.shape[2], heads // key.shape[1]
    q = (query.to(compute) * scaling).view(batch, -1, groups, dim)
    z = (q @ key.to(compute).mT).view(batch, heads, 1, width)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = ScoreForm(*(x if x is None else x[..., :width] for x in (up, down, bias))).of(z)
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else z + allowed
    a = z.softmax(dim=-1)
    if allowed is not None:  # a row of padding attends to nothing; other NaN are an edit's
        seen = allowed if allowed.dtype == torch.bool else allowed != -torch.inf
        a = a.masked_fill(~seen.any(dim=-1, keepdim=True), 0)
    out = a.view(batch, -1, groups, width) @ value.to(compute)
    return out.view(batch, 1, heads, -1).to(query.dtype, copy=True)
