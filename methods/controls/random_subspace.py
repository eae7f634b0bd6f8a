"""Random subspace: MLPs kept from writing into a subspace drawn by lot. A control."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, MLPRawEdit, RowScope, VlmFixError, param
from vlm_fix.hidden.push import without_span
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class RandomSubspace(MLPRawEdit):
    """Control: projects MLP outputs onto the complement of a subspace drawn at random, as Nullu does with one it found.

        m <- m - Q_l^T Q_l m,  m [C] the MLP's output of layer l, in every row, with or without an image
    Q_l [rank, C]: orthonormal rows of a Gaussian matrix, drawn once from `seed` and the layer. What Nullu gains beyond this
    is due to its subspace. `vlm-fix eval --controls` runs it in each such method's layers, at the dimensions that the method
    takes away there (`ranks` where they differ).

    Source: a control for arXiv 2412.13817, with its defaults.
    """

    name: ClassVar[str] = "random_subspace"
    kind: ClassVar[str] = "control"
    needs_image: ClassVar[bool] = False
    row_scope = RowScope.ALL

    rank: int = param(4, "dimensions that are taken away", low=0)
    seed: int = param(0, "seed of the subspaces", low=0, high=2**32 - 1)
    ranks: tuple[int, ...] | None = param(None, "for each of `layers` its own number of dimensions, instead of `rank`")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(arch.depth - 1, round(arch.depth / 2))}-"}

    def resolve(self, arch: Arch) -> RandomSubspace:
        method = super().resolve(arch)
        assert isinstance(method, RandomSubspace) and isinstance(method.layers, tuple)
        if self.ranks is not None and (len(self.ranks) != len(method.layers) or min(self.ranks) < 0):
            raise VlmFixError(
                f"random_subspace: ranks must hold {len(method.layers)} numbers of at least 0, one for each of the layers "
                f"{', '.join(map(str, method.layers))}."
            )
        return method

    @property
    def neutral(self) -> bool:
        return self.rank == 0 if self.ranks is None else not any(self.ranks)

    def mlp_raw(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        rank = self.rank if self.ranks is None else self.ranks[self.layers.index(rows.layer)]  # type: ignore[union-attr, arg-type]
        return without_span(x, drawn(self.seed, rows.layer, rank, x.shape[-1], x.device)) if rank else x


@functools.lru_cache(maxsize=1024)
def drawn(seed: int, layer: int, rank: int, channels: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Orthonormal rows [rank, C], at most C of them."""
    g = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.linalg.qr(torch.randn(channels, min(rank, channels), generator=g))[0].T.contiguous().to(device)
