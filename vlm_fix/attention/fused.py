"""One decode row of a layer in one launch: scores, their edit by columns, softmax, moved weights, products with the values.

The row kernel does the same in some ten launches, and stays what the other is tested against; `vlm_fix.launches` has the switch.
"""

from __future__ import annotations

import torch

from vlm_fix.launches import wanted

from .forms import ScoreForm, TransferForm, transferred
from .inputs import QueryRows


def usable(query: torch.Tensor) -> bool:
    """True if this device runs decode rows in one launch; heads of more than 256 dimensions do not fit."""
    return wanted(query) and query.shape[-1] <= 256


def raw_scores(inputs: QueryRows) -> torch.Tensor:
    """[B, H, 1, K] float32: the scores of the one row there is, before the mask, in one launch."""
    query, key, _, _, (scaling, softcap), _ = inputs
    if query.is_cuda:
        from .triton_row import launch_scores

        return launch_scores(query, key, scaling, softcap)
    return _scores(query, key, scaling, softcap)


def decode_row(
    inputs: QueryRows,
    form: ScoreForm,
    transfer: TransferForm | None = None,
    moved: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, 1, H, D], in the query's dtype: attention of the one row there is, with its scores changed by `form`, then its
    weights by `transfer`.

    The tensors of both may be wider than K. moved: a boolean that becomes True if the transfer changed the row of any head;
    z: `raw_scores`, if they are known.
    """
    query, key, value, allowed, (scaling, softcap), _ = inputs
    groups, numbers = (None, []) if transfer is None else (transfer.groups, transfer.numbers)
    how = (allowed, *form, groups, numbers, moved, z, scaling, softcap)
    if query.is_cuda:
        from .triton_row import launch

        return launch(query, key, value, *how)
    return _row(query, key, value, *how)


@torch.library.custom_op("vlm_fix::decode_row", mutates_args=("moved",))
def _row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: torch.Tensor | None,
    numbers: list[float],
    moved: torch.Tensor | None,
    z: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    return formula(query, key, value, allowed, up, down, bias, groups, numbers, moved, z, scaling, softcap)


@_row.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


@torch.library.custom_op("vlm_fix::raw_scores", mutates_args=())
def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    return scores_formula(query, key, scaling, softcap)


@_scores.register_fake
def _(query: torch.Tensor, key: torch.Tensor, *rest: object) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], 1, key.shape[2], dtype=torch.float32)


def scores_formula(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """`raw_scores` in plain operations, in float32 or better."""
    batch, heads, _, dim = query.shape
    compute = torch.promote_types(query.dtype, torch.float32)
    q = (query.to(compute) * scaling).view(batch, -1, heads // key.shape[1], dim)
    z = (q @ key.to(compute).mT).view(batch, heads, 1, -1)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: torch.Tensor | None,
    numbers: list[float],
    moved: torch.Tensor | None,
    z: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """What the kernel computes, in plain operations, in float32 or better."""
    batch, heads, _, _ = query.shape
    width, shared = key.shape[2], heads // key.shape[1]
    z = scores_formula(query, key, scaling, softcap) if z is None else z
    z = ScoreForm(*(x if x is None else x[..., :width] for x in (up, down, bias))).of(z)
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else z + allowed
    a = z.softmax(dim=-1)
    if allowed is not None:  # a row of padding attends to nothing; other NaN are an edit's
        seen = allowed if allowed.dtype == torch.bool else allowed != -torch.inf
        a = a.masked_fill(~seen.any(dim=-1, keepdim=True), 0)
    if groups is not None:
        a, changed = transferred(a, groups[..., :width], numbers)
        if moved is not None:
            moved.logical_or_(changed)
    out = a.view(batch, -1, shared, width) @ value.to(a.dtype)
    return out.view(batch, 1, heads, -1).to(query.dtype, copy=True)
