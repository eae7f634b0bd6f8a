"""The traces of one row's queries and of the keys so far, which a method may scale its scores by; on CUDA in one launch."""

from __future__ import annotations

import torch

from vlm_fix.launches import wanted


def sizes(x: torch.Tensor) -> torch.Tensor:
    """[B, H, n, D] -> [B, n]: squared norms, mean over the heads, in float32 or better without such a copy of all keys."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square().mean(dim=1)


def sharpening(trace: torch.Tensor, gamma: float) -> torch.Tensor:
    """1 + gamma / log trace; traces below e count as e."""
    return 1 + gamma / trace.log().clamp(min=1)


def row_factor(
    query: torch.Tensor, key: torch.Tensor, at: int, known: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of both factors [B, 1, 1, 1] of the one row there is, and the trace of the keys with its own, [B].

    known [B]: the trace of the keys before column `at`, which is the row's own.
    """
    if query.is_cuda and wanted(query):
        from .triton_traces import launch

        return launch(query, key, at, known, gamma)
    return _row_factor(query, key, at, known, gamma) if wanted(query) else formula(query, key, at, known, gamma)


def formula(
    query: torch.Tensor, key: torch.Tensor, at: int, known: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, in plain operations."""
    total = known + sizes(key[:, :, at : at + 1])[:, 0]
    return (sharpening(sizes(query)[:, 0], gamma) * sharpening(total, gamma))[:, None, None, None], total


@torch.library.custom_op("vlm_fix::row_factor", mutates_args=())
def _row_factor(
    query: torch.Tensor, key: torch.Tensor, at: int, known: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return formula(query, key, at, known, gamma)


@_row_factor.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, at: int, known: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return known.new_empty(len(known), 1, 1, 1), torch.empty_like(known)
