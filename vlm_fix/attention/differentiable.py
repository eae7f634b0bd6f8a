"""A forward of the language model over a prompt in which attention to the image can be differentiated by the embeddings.

Only the layers up to the last one that is read run, and each is computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vlm_fix.families.compat import with_cache
from vlm_fix.recorder import Recorder
from vlm_fix.session import Session
from vlm_fix.wing import engine_of

_ONE = threading.RLock()  # one thread at a time puts forwards of its own on the layers


class _Stop(Exception):
    """No further layer is needed."""


class RowMean(Recorder):
    """The mean over `layers`, heads and the rows `rows` [B, n] of their weights, [B, n], part of the graph."""

    def __init__(self, layers: tuple[int, ...], rows: torch.Tensor):
        self.layers, self.rows, self.total = layers, rows, rows.new_zeros(())
        self.open = False  # while layers are computed again, nothing is added

    def first_row(self, session: Session) -> int:
        return int(self.rows.any(dim=0).nonzero()[0])

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        rows = self.rows[:, first + i : first + i + weights.shape[2]].to(weights)
        seen = (weights * rows[:, None, :, None]).sum(dim=2).mean(dim=1)
        seen = torch.nn.functional.pad(seen, (self.rows.shape[1] - seen.shape[1], 0))
        if self.open:
            self.total = seen + self.total.to(seen)


@contextlib.contextmanager
def attended(
    session: Session, kwargs: dict[str, Any], rows: torch.Tensor, layers: tuple[int, ...]
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Gives `a(embeds)`: [B, n] the weights of the rows `rows` [B, n], their mean over these rows, heads and `layers`.

    embeds [B, n, C] are those of a prompt; kwargs the language model's (`InputEdit.prepare`). For as long as this lasts there
    are no edits and no gradients of the model's weights, and gradients of a(embeds) are to be taken.
    """
    engine, recorder = engine_of(session.call.model), RowMean(layers, rows)
    plain = Session(session.call, branch="gradient", plain=True, prompt_len=session.prompt_len, kept=session.kept)
    plain.advance(0, session.types)
    stack, count = engine.language.layers, rows.sum(dim=1, keepdim=True) * len(layers)

    def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mine = engine.recorder is recorder  # another thread's forwards run the layers as ever
        return checkpoint(forward, *args, use_reentrant=False, **kwargs) if mine else forward(*args, **kwargs)

    def stop(module: Any, args: Any) -> None:
        if engine.recorder is recorder:
            raise _Stop

    def mean(embeds: torch.Tensor) -> torch.Tensor:
        recorder.total, recorder.open = embeds.new_zeros(()), True
        with contextlib.suppress(_Stop):
            engine.language(**with_cache({**kwargs, "inputs_embeds": embeds, "use_cache": False}, None))
        recorder.open = False
        return recorder.total / count.to(recorder.total.device)

    with _ONE, contextlib.ExitStack() as undo:
        undo.callback(setattr, engine, "session", engine.session)
        engine.session = plain
        for weight in [p for p in engine.language.parameters() if p.requires_grad]:
            weight.requires_grad_(False)
            undo.callback(weight.requires_grad_, True)
        for layer in stack[: max(layers) + 1]:
            own = {"forward": layer.forward} if "forward" in vars(layer) else {}  # one that accelerate put there
            undo.callback(vars(layer).update, own)
            undo.callback(vars(layer).pop, "forward")
            layer.forward = functools.partial(again, layer.forward)
        if max(layers) + 1 < len(stack):
            undo.callback(stack[max(layers) + 1].register_forward_pre_hook(stop).remove)
        undo.enter_context(engine.recording(recorder))
        undo.enter_context(torch.enable_grad())
        yield mean
