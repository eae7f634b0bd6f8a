"""Low-rank adapters for linear layers: attached for training, merged into the weights when a checkpoint is made."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_fix.errors import VlmFixError


class LoRA(nn.Module):
    """y = W x + b + scale B A x: W [out, in] and b stay as they are, A [rank, in] and B [out, rank] are trained.

    B starts at zero, so that the layer starts as the one it replaces.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), scale
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B * self.scale)


def attach(model: nn.Module, endings: Iterable[str], rank: int, scale: float) -> Adapters:
    """Replace the linear layers whose name ends so; returns the new parameters, "<name>.A" and "<name>.B"."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(endings))]
    parameters: dict[str, nn.Parameter] = {}
    for name in found:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = LoRA(linear, rank, scale)
        setattr(model.get_submodule(parent), child, layer)
        parameters |= {f"{name}.A": layer.A, f"{name}.B": layer.B}
    return Adapters(parameters)


class Adapters(nn.Module):
    """The parameters by their dotted names, which ParameterDict does not take."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        self.names = list(parameters)
        self.values = nn.ParameterList(parameters.values())

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, for a file."""
        return {name: value.detach() for name, value in zip(self.names, self.values, strict=True)}


def merge(weights: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """weights with W + scale B A in place of every adapted W, summed in float32.

    `adapters` holds "<name>.A" and "<name>.B" for "<name>.weight" of `weights`; VlmFixError where one does not fit.
    """
    merged = dict(weights)
    for name in sorted({n.rpartition(".")[0] for n in adapters}):
        a, b, w = adapters.get(f"{name}.A"), adapters.get(f"{name}.B"), weights.get(f"{name}.weight")
        if a is None or b is None or w is None or (b.shape[0], a.shape[1]) != tuple(w.shape) or len(a) != b.shape[1]:
            raise VlmFixError(f"the adapter of {name} does not fit the language weights: install vlm-fix again.")
        merged[f"{name}.weight"] = (w.float() + scale * b.float() @ a.float()).to(w.dtype)
    return merged
