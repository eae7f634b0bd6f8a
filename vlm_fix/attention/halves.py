"""The half of the heads that looks most at a group of columns, for edits of one row's scores; on CUDA in one launch."""

from __future__ import annotations

import torch

from vlm_fix.launches import wanted


def raised(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[B, H, 2]: what is added to the scores z [B, H, 1, K] of a row, as shares of two of the three `columns` [B, 3, K or more].

    With a = softmax(z) and columns 0 (a group, 0 or 1), 1 (another group) and 2 (logarithms g of factors on the first): the H/2
    heads with the largest sum of a over group 0 take all of g; what their sum over it grows by, over all of these heads, is the
    factor by which the H/2 heads with the largest sum over group 1 raise that: its logarithm is their second share.
    """
    if z.is_cuda and wanted(z):
        from .triton_halves import launch

        return launch(z, columns)
    return _raised(z, columns) if wanted(z) else formula(z, columns)


def formula(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What the kernel computes, in plain operations."""
    a, (first, second, g) = z[:, :, 0].softmax(dim=-1), columns[..., : z.shape[-1]].to(z.dtype).unbind(dim=1)
    masses = [(a * x[:, None]).sum(dim=-1) for x in (first, second, first * g.exp())]  # [B, H]
    half = max(1, z.shape[1] // 2)
    seeing, reading = (torch.zeros_like(m).scatter(1, m.topk(half, dim=1).indices, 1.0) for m in masses[:2])
    before, after = ((m * seeing).sum(dim=1, keepdim=True) for m in (masses[0], masses[2]))
    tiny = torch.finfo(torch.float32).tiny
    growth = (after / before.clamp(min=tiny)).clamp(min=tiny).log()
    return torch.stack([seeing, reading * growth], dim=-1)


@torch.library.custom_op("vlm_fix::raised", mutates_args=())
def _raised(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return formula(z, columns)


@_raised.register_fake
def _(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return z.new_empty(*z.shape[:2], 2)
