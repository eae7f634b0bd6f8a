"""The causal map of a token: which part of a model carries the image to it, layer by layer and token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.call import Call
from vlm_fix.decoding.head import Head
from vlm_fix.engine import Engine
from vlm_fix.errors import VlmFixError
from vlm_fix.families import language_head
from vlm_fix.families.compat import with_cache
from vlm_fix.hidden.wing import writers
from vlm_fix.hooks import hooked
from vlm_fix.session import VISUAL, Session

PARTS = {"attention": "attention_output", "mlp": "mlp_output", "hidden": "layer_output"}


@dataclass(frozen=True)
class Effects:
    """Recovery rates (p_patched - p_noised) / (p_clean - p_noised) of one token's probability."""

    places: list[
        tuple[int, int]
    ]  # columns [first, last) of each group: text before an image, an image, a token after it
    rates: torch.Tensor  # [3, layers, groups]: attention, MLP and hidden states of the group put back
    clean: float  # the token's probability
    noised: float  # the same with a noised image


class _Runs:
    """Forwards of the language model without methods, over what the multimodal model gave it."""

    def __init__(self, engine: Engine, inputs: dict[str, Any], row: int):
        self.engine, self.row, self.head = engine, row, Head(engine)
        self.call = Call(engine.model, engine.family, inputs)
        self.kwargs: dict[str, Any] = {}

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.kwargs = dict(kwargs)

        with (
            self.plain(),
            hooked([engine.language.register_forward_pre_hook(note, with_kwargs=True), *self.head.hooks()]),
        ):
            engine.model(**inputs, use_cache=False)

    def plain(self) -> Any:
        session = Session(self.call, prompt_len=self.call.inputs["input_ids"].shape[1], branch="trace", plain=True)
        session.advance(0, self.engine.classify(self.call.inputs["input_ids"]))
        return _As(self.engine, session)

    def p(self, token: int, hooks: list[Any]) -> float:
        """The token's probability in the row, under some hooks."""
        with self.plain(), hooked(hooks):
            out = self.engine.language(**with_cache(self.kwargs, None)).last_hidden_state
        head = language_head(self.engine.model, self.engine.family)
        return float(self.head.finish(head(out[:, self.row]))[0].float().softmax(dim=-1)[token])


@dataclass
class _As:
    """The forwards inside belong to `session`."""

    engine: Engine
    session: Session

    def __enter__(self) -> None:
        self.before, self.engine.session = self.engine.session, self.session

    def __exit__(self, *_: Any) -> None:
        self.engine.session = self.before


@torch.no_grad()
def causal_effects(
    engine: Engine,
    inputs: dict[str, Any],
    row: int,
    token: int,
    noise: float,
    seed: int,
    progress: Callable[[str, float], None],
) -> Effects:
    """FCCT (arXiv 2511.05923): noise the image, put one clean output back, and see how much of the token's probability returns.

    inputs: of one prompt, with all that comes before `token`, which `row` predicts. The groups are the text before an image, each
    image, and each token after the first image up to the row. Put back is the output of self-attention, of the MLP, or of the
    whole layer. Three forwards of the language model a layer and group, without methods. VlmFixError where the noise does not
    make the token less likely.
    """
    cut = {
        k: v[..., : row + 1] if k == "position_ids" or v.shape == inputs["input_ids"].shape else v
        for k, v in inputs.items()
    }
    clean = _Runs(engine, cut, row)
    generator = torch.Generator().manual_seed(seed)
    pixels = clean.call.with_pixels(lambda x: x + noise * x.std() * torch.randn(x.shape, generator=generator).to(x))
    noised = _Runs(engine, {**cut, "pixel_values": pixels["pixel_values"]}, row)
    spots = {
        (part, i): writers(layer)[name]
        for part, name in PARTS.items()
        for i, layer in enumerate(engine.language.layers)
    }
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(spot: tuple[str, int], module: Any, args: Any, output: Any) -> None:
        kept[spot] = (output[0] if isinstance(output, tuple) else output).view(row + 1, -1).clone()

    p_clean = clean.p(token, [m.register_forward_hook(functools.partial(keep, spot)) for spot, m in spots.items()])
    p_noised = noised.p(token, [])
    if p_clean - p_noised < 1e-4:
        raise VlmFixError(
            f"the token has probability {p_clean:.4f} with the image and {p_noised:.4f} with a noised one: the image does not "
            "carry it, so there is nothing to trace; choose another token, or more noise."
        )
    types, groups = engine.classify(cut["input_ids"])[0] == VISUAL, list[tuple[int, int]]()
    after = False
    for column, visual in enumerate(types.tolist()):
        same = column and bool(types[column - 1]) == visual and (visual or not after)
        after = after or visual
        groups = [*groups[:-1], (groups[-1][0], column + 1)] if same else [*groups, (column, column + 1)]
    rates = torch.zeros(3, engine.arch.depth, len(groups))
    for number, ((part, i), module) in enumerate(spots.items(), 1):
        for g, (first, last) in enumerate(groups):
            put = functools.partial(_put, slice(first, last), kept[part, i])
            p = noised.p(token, [module.register_forward_hook(put)])
            rates[list(PARTS).index(part), i, g] = (p - p_noised) / (p_clean - p_noised)
        progress("causal map", number / len(spots))
    return Effects(groups, rates, p_clean, p_noised)


def _put(columns: slice, clean: torch.Tensor, module: Any, args: Any, output: Any) -> Any:
    x = output[0] if isinstance(output, tuple) else output
    new = x.view(len(clean), -1).clone()
    new[columns] = clean[columns]
    new = new.view_as(x)
    return (new, *output[1:]) if isinstance(output, tuple) else new
