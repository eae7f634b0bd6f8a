"""The one table of model families, and the look-ups that read it. Nothing else names a model class."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_fix.arch import Arch, Family
from vlm_fix.errors import VlmFixError

from .compat import cannot_run
from .conventions import by_convention, missing
from .parts import attention_modules, find_vision_blocks, get_part

VIDEO = ("image_token_id", "video_token_id")
QWEN: dict[str, Any] = {"vision": "model.visual", "image_tokens": VIDEO, "mrope": True, "cells": "grid_thw"}
FAMILIES = (
    Family("llava", ("llava",), encoder="clip", cells="pixels"),
    Family("qwen2_5_vl", ("qwen2_5_vl",), **QWEN, encoder="qwen"),
    Family("qwen2_vl", ("qwen2_vl",), **QWEN, encoder="qwen"),
    Family("qwen3_vl", ("qwen3_vl",), **QWEN, encoder="qwen"),
    Family("qwen3_vl_moe", ("qwen3_vl_moe",), **QWEN, encoder="qwen"),
    Family("qwen3_5", ("qwen3_5", "qwen3_5_moe"), **QWEN, encoder="qwen"),
    Family("glm4v", ("glm4v",), **QWEN),
    Family("glm46v", ("glm46v",), **QWEN),
    Family("glm4v_moe", ("glm4v_moe",), **QWEN),
    Family("vipllava", ("vipllava",), cells="pixels"),
    Family("llava_next", ("llava_next",), encoder="clip", cells="anyres"),
    Family("llava_onevision", ("llava_onevision",), encoder="clip", image_tokens=VIDEO, cells="anyres"),
    Family("llava_next_video", ("llava_next_video",), encoder="clip", image_tokens=VIDEO, cells="anyres"),
    Family(
        "video_llava",
        ("video_llava",),
        vision="model.image_tower",
        encoder="clip",
        image_tokens=VIDEO,
        cells="pixels",
    ),
    Family("llava_pixtral", ("llava+pixtral",), cells="sizes"),
    Family("mistral3", ("mistral3",), cells="sizes"),
    Family("internvl", ("internvl",)),
    Family("gemma3", ("gemma3",)),
    Family("gemma4", ("gemma4",), image_tokens=VIDEO, cells="placed"),
    Family("paligemma", ("paligemma",), first_position=1, causal=False),
    Family("idefics2", ("idefics2",), language="model.text_model", vision="model.vision_model", cells="none"),
    Family("idefics3", ("idefics3",), language="model.text_model", vision="model.vision_model"),
    Family("smolvlm", ("smolvlm",), language="model.text_model", vision="model.vision_model"),
    Family("aya_vision", ("aya_vision",)),
    Family("cohere2_vision", ("cohere2_vision",)),
    Family("deepseek_vl", ("deepseek_vl",), vision="model.vision_model"),
    Family("janus", ("janus",), vision="model.vision_model"),
    Family("got_ocr2", ("got_ocr2",)),
    Family("aria", ("aria",), cells="none"),
    Family("ovis2", ("ovis2",)),
    Family("exaone4_5", ("exaone4_5",), vision="model.visual", image_tokens=VIDEO, cells="grid_thw"),
    Family(
        "video_llama_3",
        ("video_llama_3",),
        vision="model.vision_model",
        image_tokens=VIDEO,
        cells="grid_thw",
    ),
    Family("lfm2_vl", ("lfm2_vl",), cells="spatial"),
    Family("minicpmv4_6", ("minicpmv4_6",), image_tokens=VIDEO, cells="navit"),
    Family("kimi_k25", ("kimi_k25",), image_tokens=VIDEO, cells="grid_thw"),
    Family("molmo2", ("molmo2",), image_tokens=VIDEO, causal=False, cells="grids"),
    Family("ernie4_5_vl_moe", ("ernie4_5_vl_moe",), image_tokens=VIDEO, mrope=True, cells="grid_thw"),
    Family(  # a whole causal model inside the model
        "llama4",
        ("llama4",),
        base="",
        language="language_model.model",
        head="language_model.lm_head",
        vision="vision_model",
    ),
    Family("fast_vlm", ("fast_vlm",)),
    Family("perception_lm", ("perception_lm",), image_tokens=VIDEO, cells="none"),
    Family("gemma3n", ("gemma3n",), cells="none"),
    Family("mllama", ("mllama",), vision="model.vision_model", cells="none", crosses=True),
)
REFUSED = {
    "blip-2": "its language model is called on its own, from inside generate, with embeddings in place of tokens",
    "instructblip": "its language model is called on its own, from inside generate, with embeddings in place of tokens",
    "florence2": "it is an encoder-decoder",
    "kosmos-2": "it does not use transformers' attention interface",
}


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model; VlmFixError naming the supported ones otherwise."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    kind = f"{model_type}+{tower}" if any(f"{model_type}+{tower}" in f.model_types for f in FAMILIES) else model_type
    for family in FAMILIES:
        if kind in family.model_types:
            if not hasattr(model, "generate") or not hasattr(model, family.head.split(".")[0]):
                raise VlmFixError(
                    f"{type(model).__name__} has no language-model head; load it with AutoModelForImageTextToText."
                )
            if why := cannot_run(model):
                raise VlmFixError(f"this transformers cannot run {type(model).__name__}, wrapped or not: {why}.")
            return family
    if model_type in REFUSED:
        raise VlmFixError(
            f"models of type {model_type!r} are not supported: {REFUSED[model_type]}; `vlm-fix models` lists those that are."
        )
    lacking = missing(model) if isinstance(model, nn.Module) and hasattr(model, "config") else []
    if isinstance(model, nn.Module) and config is not None and not lacking:
        return by_convention(model)
    raise VlmFixError(
        f"models of type {model_type!r} are not supported; supported: {', '.join(f.name for f in FAMILIES)} "
        f"(`vlm-fix models`).{' To be tried without being in that list it lacks ' + '; '.join(lacking) + '.' if lacking else ''}"
    )


def arch_of(model: Any) -> Arch:
    """Sizes of `model`; raises VlmFixError for an unsupported family."""
    family, config = family_of(model), model.config
    text, depth = config.get_text_config(), len(find_vision_blocks(model, family))
    attention = tuple(attention_modules(get_part(model, family.language)))
    if not attention:
        raise VlmFixError(
            f"no layer of the language model ({text.model_type}) has a `self_attn` module; decoders that name it otherwise "
            "are not supported."
        )
    layer = getattr(config, "vision_feature_layer", None)
    last = depth - 1
    if isinstance(layer, int):  # hidden_states has depth + 1 entries; entry i is the output of block i - 1
        last = (layer + depth + 1 if layer < 0 else layer) - 1
    full = getattr(config.vision_config, "fullatt_block_indexes", None)
    return Arch(
        family,
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.vocab_size,
        text.model_type,
        depth,
        last,
        tuple(range(depth) if full is None else full),
        attention,
    )
