"""Build random-weight models of known shapes; speed does not depend on the values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

IMAGE, PAD = 3, 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its prompt: `side` x `side` visual tokens, with text before and after."""

    family: str
    vision: dict[str, Any]
    text: dict[str, Any]
    side: int = 24
    before: int = 35
    after: int = 60


_CLIP = {"patch_size": 14, "projection_dim": 768}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
_TINY = {**_SMALL, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
SHAPES = {
    "tiny": Shape(
        "llava",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, **_CLIP},
        {**_TINY, "num_key_value_heads": 8},
        side=8,
    ),
    "tiny-qwen": Shape(
        "qwen2_5_vl",
        {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1, 3]},
        {**_TINY, "num_key_value_heads": 2, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
        side=8,
    ),
    "thin": Shape(  # for lengths: almost nothing but attention
        "llava",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **_CLIP},
        {**_TINY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2},
        side=8,
    ),
    "small": Shape(
        "llava",
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, **_CLIP},
        {**_SMALL, "num_key_value_heads": 8},
    ),
    "small-qwen": Shape(
        "qwen2_5_vl",
        {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "fullatt_block_indexes": [1, 3]},
        {**_SMALL, "num_key_value_heads": 2, "rope_parameters": _ROPE},
    ),
    "llava-1.5-7b": Shape(
        "llava",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, **_CLIP},
        {"vocab_size": 32064},  # the rest is LlamaConfig's default
    ),
    "qwen2.5-vl-7b": Shape(
        "qwen2_5_vl",
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": _ROPE,
        },
    ),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Build a random-weight model of `shape` and the inputs of a prompt with one image."""
    torch.manual_seed(seed)
    side = shape.side
    common = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096}
    if shape.family == "llava":
        vision: Any = transformers.CLIPVisionConfig(**{**shape.vision, "image_size": side * shape.vision["patch_size"]})
        llava: Any = transformers.LlavaConfig
        config: Any = llava(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**{**common, **shape.text}),
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            image_seq_length=side * side,
        )
        kind: Any = transformers.LlavaForConditionalGeneration
        inputs = {"pixel_values": torch.randn(1, 3, vision.image_size, vision.image_size)}
    else:
        vision_sizes = {"out_hidden_size": shape.text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2}
        config = transformers.Qwen2_5_VLConfig(
            vision_config={**vision_sizes, **shape.vision},
            text_config={**common, **shape.text},
            image_token_id=IMAGE,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        inputs = {
            "pixel_values": torch.randn(4 * side * side, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
        }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    words = torch.randint(10, config.get_text_config().vocab_size, (shape.before + shape.after,))
    words[0] = 1
    image = torch.full((side * side,), IMAGE)
    ids = torch.cat([words[: shape.before], image, words[shape.before :]])[None]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model.eval(), inputs
