"""Greedy choices of tokens: far from each other, likely together, or covering the others; and duplicates dropped."""

from __future__ import annotations

import torch


def cosines(features: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [N, N] cosines of all pairs, float32."""
    x = torch.nn.functional.normalize(features.float().flatten(1), dim=-1)
    found = x @ x.T
    found = torch.maximum(found, found.T)  # a pair's two entries may differ in the last bit: keep ties exact
    found.diagonal().round_()  # a token's own as well: nothing may be chosen by the last bit of 1
    return found


def spread(features: torch.Tensor, count: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """[N, C] -> [count] indices, ascending: max-min of the distance 1 - cos, times `weight` [N] if there is one.

    The first token is the one farthest from its nearest neighbour (with a weight: the heaviest); each next one has the
    largest distance to its nearest chosen token. Ties go to the lower index.
    """
    distance = (1 - cosines(features)).clamp(min=0)
    scores = weight
    if scores is None:
        scores = distance.clone().fill_diagonal_(torch.inf).amin(dim=0)
    chosen = torch.zeros(len(distance), dtype=torch.bool, device=distance.device)
    nearest = torch.full_like(distance[0], torch.inf)
    for _ in range(count):
        best = scores.masked_fill(chosen, -torch.inf).argmax(dim=0, keepdim=True)
        chosen[best] = True
        nearest = torch.minimum(nearest, distance[best[0]])
        scores = nearest if weight is None else nearest * weight
    return chosen.nonzero()[:, 0]


def determinant(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """[N, N] symmetric -> [count] indices, ascending: greedily the largest determinant of the kernel among the chosen.

    Chen et al. (NeurIPS 2018): with d_i the gain of i, at first kernel_ii, each chosen j leaves
    e_i = (kernel_ji - sum_t c_ti c_tj) / sqrt(d_j), d_i <- d_i - e_i^2, c_(t+1) = e. In float64 where there is one. Gains
    under a millionth of the first are none: what is left then goes by kernel_ii. Ties go to the lower index.
    """
    kernel = kernel if kernel.device.type == "mps" else kernel.double()
    gain = kernel.diagonal().clone()
    own, least = gain.clone(), gain.max() / 1e6
    found, chosen = (
        torch.zeros(count, len(kernel), dtype=kernel.dtype, device=kernel.device),
        torch.zeros_like(gain).bool(),
    )
    for step in range(count):
        left = gain.masked_fill(chosen, -torch.inf)
        best = left.argmax()
        if left[best] <= least:
            order = own.masked_fill(chosen, -torch.inf).sort(descending=True, stable=True).indices
            chosen[order[: count - step]] = True
            break
        found[step] = (kernel[best] - found[:step, best] @ found[:step]) / left[best].sqrt()
        gain -= found[step].square()
        chosen[best] = True
    return chosen.nonzero()[:, 0]


def cover(similarity: torch.Tensor, count: int, weight: torch.Tensor) -> torch.Tensor:
    """[N, N], [N] -> [count] indices, ascending: greedily the largest w_j sum_i max(0, similarity_ij - m_i).

    m_i is the largest similarity of i to a chosen token, 0 at first. Ties go to the lower index.
    """
    chosen, covered = torch.zeros(len(weight), dtype=torch.bool, device=weight.device), torch.zeros_like(weight)
    for _ in range(count):
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=0) * weight
        best = gain.masked_fill(chosen, -torch.inf).argmax(dim=0, keepdim=True)
        chosen[best] = True
        covered = torch.maximum(covered, similarity[best[0]])
    return chosen.nonzero()[:, 0]


def peaks(x: torch.Tensor, neighbours: int) -> torch.Tensor:
    """[n, C] -> [n]: how much of a density peak each is: its density by the nearest ones, times how far a denser one is.

    density = exp(-mean of the squared distances to the `neighbours` nearest, itself among them), distances divided by
    sqrt(C); of equally dense ones the first is the denser; the densest is as far as any two are.
    """
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    near = distance.topk(min(neighbours, len(x)), largest=False).values
    density, index = (-near.square().mean(dim=-1)).exp(), torch.arange(len(x), device=x.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (index[None] < index[:, None]))
    return torch.where(denser, distance, distance.max()).amin(dim=1) * density
