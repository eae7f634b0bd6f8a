"""Sinks found without knowing a model's massive dimensions: tokens whose hidden state points the way BOS's does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_fix.attention.preview import Preview, preview
from vlm_fix.errors import VlmFixError
from vlm_fix.hooks import hooked
from vlm_fix.method import Method
from vlm_fix.pruning import PruningWing
from vlm_fix.session import PAD, Session
from vlm_fix.tensors import one_stream
from vlm_fix.wing import Host, engine_of

COSINE = 0.9  # a column is a sink where the cosine of its hidden state and BOS's is larger, whatever its sign


class Lives:
    """Gathers, layer by layer, which columns are sinks: |cos(h_t, h_BOS)| > COSINE.

    BOS is the one of the first three real columns whose norm, mean over the layers, is largest; columns before it are
    never sinks. `real` [B, n] is False on padding.
    """

    def __init__(self, real: torch.Tensor):
        self.real = real
        first = real.int().argmax(dim=1, keepdim=True)
        self.candidates = (first + torch.arange(3, device=real.device)).clamp(max=real.shape[1] - 1)  # [B, 3]
        self.close: list[torch.Tensor] = []  # per layer [B, n, 3]
        self.norms: list[torch.Tensor] = []  # per layer [B, 3]

    def add(self, x: torch.Tensor) -> None:
        """Hidden states [B, n, C] of the next layer."""
        x = x.float()
        places = self.candidates.to(x.device)
        chosen = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        self.norms.append(chosen.norm(dim=-1).to(self.real.device))
        norms = x.norm(dim=-1, keepdim=True) * chosen.norm(dim=-1)[:, None]
        self.close.append(((x @ chosen.mT).abs() > COSINE * norms).to(self.real.device))

    def alive(self) -> torch.Tensor:
        """[layers, B, n] booleans."""
        best = torch.stack(self.norms).mean(dim=0).argmax(dim=1)  # [B]
        bos = self.candidates.gather(1, best[:, None])  # [B, 1]
        alive = torch.stack(self.close).gather(
            3, best[None, :, None, None].expand(len(self.close), -1, *self.real.shape[1:], 1)
        )
        return alive[..., 0] & self.real & (torch.arange(self.real.shape[1], device=self.real.device) >= bos)


def lifetime_limits(depth: int) -> tuple[float, float]:
    """A secondary sink lives more than the first and fewer than the second number of layers: 4 and depth - 15.

    These were set on models of 36 to 48 layers; below 24 layers, where they would soon exclude everything, both shrink
    in proportion from their values at 24, 4 and 9.
    """
    return (4.0, depth - 15.0) if depth >= 24 else (4 / 24 * depth, 9 / 24 * depth)


def secondary(alive: torch.Tensor, limits: tuple[float, ...]) -> torch.Tensor:
    """alive [layers + 1, B, n] -> the same, only of columns that live more than limits[0], fewer than limits[1] layers."""
    count = alive.sum(dim=0)
    return alive & (count > limits[0]) & (count < limits[1])


@torch.no_grad()
def secondary_sinks(
    session: Session, kwargs: dict[str, Any], limits: tuple[float, ...] | None, method: Method
) -> tuple[torch.Tensor, Preview]:
    """[layers, B, n]: the secondary sinks of a prompt at each layer's input, and the forward without edits that found them.

    kwargs are the language model's (`InputEdit.prepare`); limits None: `lifetime_limits`. As in the official code the output
    of the final norm counts as one more layer of a life. Source: "On the Existence and Behaviour of Secondary Attention
    Sinks", official code JeffreyWong20/Secondary-Attention-Sinks@11eefcc.
    Deviations: its calls leave out the embeddings (the first layer's input) and look only at the layers in which BOS's norm is
    high, by hand for each model; here all inputs count, which makes a life longer by those: `life` takes other limits.
    """
    name = method.name
    session.need_whole_prompt(name)
    if limits is not None and len(limits) != 2:
        raise VlmFixError(f"{name}: life={'|'.join(map(str, limits))} must be two numbers of layers, as life=4|17.")
    engine: Host = engine_of(session.call.model)
    pruning = engine.wing(PruningWing)
    if pruning and pruning.pruners.dropper:
        dropper = pruning.pruners.dropper.name
        raise VlmFixError(f"{name} follows sinks through all layers; it does not work with {dropper}.")
    columns = torch.arange(session.types.shape[1], device=session.types.device)
    lives = Lives((session.types != PAD) & (columns < session.prompt_len))
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: lives.add(one_stream(args[0] if args else kwargs["hidden_states"], name)),
            with_kwargs=True,
        )
        for layer in engine.language.layers
    ]
    with hooked(hooks):
        plain = preview(session, kwargs, method)
        assert plain.states is not None
        lives.add(plain.states)
    limits = lifetime_limits(engine.arch.depth) if limits is None else limits
    return secondary(lives.alive(), limits)[:-1], plain


def in_heads(found: torch.Tensor, heads: Sequence[int] | None, count: int) -> torch.Tensor:
    """Columns [B, len(heads) or 1, n] found in these of `count` heads (None: in all) -> [B, count, n], False elsewhere."""
    spread = found.new_zeros(len(found), count, found.shape[-1])
    spread[:, slice(None) if heads is None else list(heads)] = found
    return spread
