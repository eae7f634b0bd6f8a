"""Edits of hidden states written into the weights, so that a plain checkpoint holds them."""

from __future__ import annotations

from typing import Any

import torch

from vlm_fix import VlmFixError
from vlm_fix.hidden.wing import mlp_of

LAST = ("down_proj", "w2")  # the matrices whose outputs an MLP adds up, in its experts too


@torch.no_grad()
def project_mlp(layer: Any, basis: torch.Tensor) -> None:
    """W <- (I - Q^T Q) W for every last matrix of the layer's MLP, with orthonormal rows Q [k, C]; biases likewise.

    Raises VlmFixError where the MLP is not made of such matrices, which a run of it before and after tells.
    """
    mlp = mlp_of(layer)
    first = next(mlp.parameters())
    q = basis.to(first.device, torch.float32)
    x = torch.randn(1, 5, q.shape[1], generator=torch.Generator().manual_seed(0)).to(first)
    before = _run(mlp, x)
    for module in mlp.modules():
        for name in LAST:
            found = getattr(module, name, None)
            if isinstance(found, torch.nn.Parameter):  # [experts, C, I] or [experts, I, C]
                _project(found, q, along=-1 if found.shape[-1] == q.shape[1] and found.shape[-2] != q.shape[1] else -2)
            elif isinstance(getattr(found, "weight", None), torch.nn.Parameter):
                _project(found.weight, q, along=0)  # type: ignore[union-attr]
                if getattr(found, "bias", None) is not None:
                    _project(found.bias, q, along=0)  # type: ignore[union-attr]
    after, wanted = _run(mlp, x), before - (before @ q.T) @ q
    limit = {torch.float32: 1e-4}.get(first.dtype, 3e-2)
    if float((after - wanted).abs().max()) > limit * float(before.abs().max()):
        raise VlmFixError(
            f"{type(mlp).__name__} is not built of matrices that are known here ({', '.join(LAST)}), or they are quantised: "
            "load the model in float32, bfloat16 or float16, or use the method at run time."
        )


def _run(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    out = mlp(x)
    return (out[0] if isinstance(out, tuple) else out).float().view(1, x.shape[1], -1)


def _project(weight: torch.nn.Parameter, q: torch.Tensor, along: int) -> None:
    """Take the part in the span of q's rows out of `weight` along one dimension."""
    w = weight.float().movedim(along, -1)
    weight.copy_((w - (w @ q.T) @ q).movedim(-1, along))
