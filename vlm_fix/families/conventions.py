"""Families that are not in the table are accepted if they follow transformers' conventions and pass a small canary."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_fix.arch import Family
from vlm_fix.errors import VlmFixError

from .parts import attention_modules, get_part

LANGUAGES = ("language_model", "text_model")
TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
CANARY = "vlm_fix_canary"
_known: weakref.WeakKeyDictionary[Any, Family] = weakref.WeakKeyDictionary()


def missing(model: Any) -> list[str]:
    """The conventions that `model` does not follow; without any, methods can be tried on it."""
    base, config = getattr(model, "model", None), model.config
    language = next((getattr(base, name) for name in LANGUAGES if hasattr(base, name)), None)
    found = {
        "get_placeholder_mask on its base model": hasattr(base, "get_placeholder_mask"),
        f"a language model called {' or '.join(LANGUAGES)} with `layers`": hasattr(language, "layers"),
        "layers with `self_attn`": any(hasattr(layer, "self_attn") for layer in getattr(language, "layers", ())),
        f"a vision tower called {', '.join(TOWERS)}": any(
            isinstance(getattr(base, t, None), nn.Module) for t in TOWERS
        ),
        "image_token_id in its config": isinstance(getattr(config, "image_token_id", None), int),
        "an lm_head": hasattr(model, "lm_head"),
    }
    return [what for what, there in found.items() if not there]


def by_convention(model: nn.Module) -> Family:
    """Return a family for a model that follows every convention and passes its canary. Warns that it was not tested."""
    if model in _known:
        return _known[model]
    base: Any = model.model
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    family = Family(
        kind,
        (kind,),
        language="model." + next(name for name in LANGUAGES if hasattr(base, name)),
        vision="model." + next(name for name in TOWERS if isinstance(getattr(base, name, None), nn.Module)),
        image_tokens=("image_token_id", "video_token_id"),
        mrope=hasattr(base, "get_rope_index"),
        cells="none",
    )
    canary(model, family)
    _known[model] = family
    warnings.warn(
        f"models of type {kind!r} were not tested with vlm-fix. This one follows the conventions (get_placeholder_mask, "
        f"{family.language}, {family.vision}, image_token_id, the attention interface"
        f"{', get_rope_index' if family.mrope else ''}), so methods are tried on it, but pruners that read the vision tower "
        "and maps of the image are refused; compare a few answers with and without a method first.",
        stacklevel=4,
    )
    return family


@torch.no_grad()
def canary(model: Any, family: Family) -> None:
    """Raise VlmFixError unless each self-attention calls transformers' attention interface, with the same result as SDPA."""
    language, config = get_part(model, family.language), model.config.get_text_config()
    called: set[int] = set()

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(id(module))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register(CANARY, attention)
    AttentionMaskInterface.register(CANARY, sdpa_mask)
    before = config._attn_implementation
    weight = language.get_input_embeddings().weight
    x = language.get_input_embeddings()(torch.arange(4, device=weight.device)[None])
    try:
        outputs = []
        for name in ("sdpa", CANARY):
            model.set_attn_implementation({"text_config": name})
            outputs.append(language(inputs_embeds=x, use_cache=False)[0])
    except Exception as error:
        raise VlmFixError(
            f"models of type {family.name!r} are not supported: their language model could not be run on its own "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
        ) from error
    finally:
        model.set_attn_implementation({"text_config": before})
    silent = [i for i, attn in attention_modules(language).items() if id(attn) not in called]
    if (
        silent
        or not torch.equal(outputs[0].isnan(), outputs[1].isnan())
        or not torch.equal(*map(torch.nan_to_num, outputs))
    ):
        what = f"layers {silent} do not call" if silent else "its layers compute something else through"
        raise VlmFixError(
            f"models of type {family.name!r} are not supported: {what} transformers' attention interface, through which "
            "methods act."
        )
