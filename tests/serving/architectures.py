"""Checkpoints of other architectures with random weights, made small, and the processors that vLLM needs beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

from tests.serving.support import PATH

BARE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE\n"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
VISION_START, IMAGE, VISION_END, VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
CLIP = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=16,
    initializer_range=0.1,
)  # fmt: skip
WINDOW = 24
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def tokenizer(*more: str, **named: str) -> Any:
    """Picto's words, and further special tokens, some of them with a name."""
    made = t.AutoTokenizer.from_pretrained(PATH, **({"extra_special_tokens": named} if named else {}))
    made.add_special_tokens({"additional_special_tokens": ["<image>", *more]})
    return made


def llava_next() -> tuple[Any, Any]:
    words, pinpoints = tokenizer(), [[64, 128], [128, 64], [128, 128]]
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**CLIP),
        text_config=t.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=pinpoints
    )
    processor = t.LlavaNextProcessor(
        images,
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=BARE.replace("IMAGE", "<image>"),
    )
    return t.LlavaNextForConditionalGeneration(config), processor


def llava_mistral() -> tuple[Any, Any]:
    """LLaVA with a window in every layer of its language model."""
    words = tokenizer()
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**CLIP),
        text_config=t.MistralConfig(vocab_size=len(words), sliding_window=WINDOW, **TEXT),
        image_token_index=4,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    processor = t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=BARE.replace("IMAGE", "<image>"),
    )
    return t.LlavaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Windows in two layers of three. Its image rows look causally here, as they do on vLLM's CPU backend."""
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    words.add_tokens(["\n" * i for i in range(1, 5)])  # vLLM puts those around an image together
    text = {**TEXT, "num_hidden_layers": 6}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=t.Gemma3TextConfig(
            vocab_size=len(words), sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=32, **text
        ),
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    processor = t.Gemma3Processor(
        t.Gemma3ImageProcessor(size={"height": 64, "width": 64}),
        words,
        image_seq_length=4,
        chat_template=BARE.replace("IMAGE\n", "<start_of_image>"),
    )
    return t.Gemma3ForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    words, pinpoints = tokenizer("<video>"), [[64, 128], [128, 64], [128, 128]]
    video = words.convert_tokens_to_ids("<video>")
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=t.Qwen2Config(vocab_size=len(words), **{**TEXT, "hidden_size": 128}),
        image_token_index=4,
        video_token_index=video,
        image_token_id=4,
        video_token_id=video,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    size = {"height": 64, "width": 64}
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        words,
        t.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=BARE.replace("IMAGE", "<image>"),
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    more = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    words = tokenizer(*more)
    config = t.Idefics3Config(
        vision_config={**CLIP, "patch_size": 8},
        text_config=t.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_id=4,
        scale_factor=2,
        pad_token_id=0,
    )
    images = t.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    processor = t.Idefics3Processor(images, words, image_seq_len=16, chat_template=BARE.replace("IMAGE", "<image>"))
    return t.Idefics3ForConditionalGeneration(config), processor


def _qwen(processor: Any, images: Any, video: Any) -> tuple[Any, Any, dict[str, int]]:
    words = tokenizer(VISION_START, IMAGE, VISION_END, VIDEO, "<|im_start|>", "<|im_end|>")
    template = BARE.replace("IMAGE\n", f"{VISION_START}{IMAGE}{VISION_END}")
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    ids = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    return words, processor(images, words, video, chat_template=template), ids


def qwen2_5_vl() -> tuple[Any, Any]:
    small = {"patch_size": 8, "min_pixels": 32 * 32, "max_pixels": 96 * 96}
    words, processor, ids = _qwen(
        t.Qwen2_5_VLProcessor, t.Qwen2VLImageProcessor(**small), t.Qwen2VLVideoProcessor(**small)
    )
    config = t.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=4, hidden_size=64, intermediate_size=96, num_heads=2, patch_size=8, out_hidden_size=128,
            spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1, 3], in_channels=3,
        ),
        text_config=dict(vocab_size=len(words), rope_parameters=MROPE, **{**TEXT, "hidden_size": 128}),
        **ids,
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    small = {"patch_size": 8, "min_pixels": 32 * 32, "max_pixels": 96 * 96}
    words, processor, ids = _qwen(
        t.Qwen3VLProcessor, t.Qwen2VLImageProcessor(**small), t.Qwen3VLVideoProcessor(**small)
    )
    config = t.Qwen3VLConfig(
        vision_config=dict(
            depth=4, hidden_size=64, intermediate_size=96, num_heads=2, patch_size=8, out_hidden_size=64,
            spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_position_embeddings=64,
            deepstack_visual_indexes=[0, 2],
        ),
        text_config=dict(vocab_size=len(words), rope_parameters={**MROPE, "mrope_interleaved": True}, **TEXT),
        **ids,
    )  # fmt: skip
    return t.Qwen3VLForConditionalGeneration(config), processor


BUILD: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f for f in (llava_next, llava_onevision, qwen2_5_vl, qwen3_vl, idefics3)
}
WINDOWED: dict[str, Callable[[], tuple[Any, Any]]] = {f.__name__: f for f in (llava_mistral, gemma3)}


def checkpoint(name: str, folder: Path) -> str:
    """A folder with such a model, the same whenever it is made."""
    torch.manual_seed(0)
    model, processor = (BUILD | WINDOWED)[name]()
    for p in model.parameters():  # random norms and biases too, so that nothing cancels by symmetry
        if p.dim() == 1:
            p.data.add_(0.1 * torch.randn_like(p))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    model.to(torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
