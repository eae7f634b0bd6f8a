"""Tiny random-weight models of further families, and prompts for them: every config is the real one, made small."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.models import IMAGE, PAD, VOCAB, ready

SIDE, PATCH = 24, 4  # pixels of a tile and of a patch: 6 x 6 patches
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCAB,
    max_position_embeddings=1024,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
TOWER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_TOWER = dict(depth=4, num_heads=2, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
SLIDING = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2)


@dataclass(frozen=True)
class Tiny:
    """One family: its config, and what one image is (`tokens` pieces of image tokens, `wrap` around each piece)."""

    cls: str
    text: str
    vision: str | None
    config: dict[str, Any]
    tower: dict[str, Any]
    text_config: dict[str, Any]
    kind: str = "tile"  # tile, tiles, anyres, sizes, packed
    tokens: int = 36  # per tile
    side: int = SIDE
    needs_timm: bool = False


def _tiny(cls, text, vision, tokens=36, kind="tile", tower=None, text_config=None, **config):
    return Tiny(cls, text, vision, config, {**TOWER, **(tower or {})}, {**TEXT, **(text_config or {})}, kind, tokens)


def _timm(
    cls, text, architecture, model_args, side, vision="timm_wrapper", tokens=9, text_config=None, tower=None, **config
):
    tower = dict(architecture=architecture, model_args=model_args, do_pooling=False, **(tower or {}))
    return Tiny(
        cls, text, vision, config, tower, {**TEXT, **(text_config or {})}, "tile", tokens, side, needs_timm=True
    )


EXPERTS = dict(
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    shared_expert_intermediate_size=32,
)
GLM_IDS = dict(image_start_token_id=93, image_end_token_id=94, video_start_token_id=95, video_end_token_id=95)
QWEN3_5_TOWER = {**QWEN_TOWER, "out_hidden_size": 64, "num_position_embeddings": 36}
HYBRID = dict(
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    rope_parameters={**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 1.0},
)
PIXTRAL = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
    "max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CLIP = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
SIGLIP = dict(tower={"vision_use_head": False})
EVERY = {
    "vipllava": _tiny(
        "VipLlava", "llama", "clip_vision_model", vision_feature_layers=[-2, -3], image_token_index=IMAGE
    ),
    "llava_next": _tiny(
        "LlavaNext",
        "mistral",
        "clip_vision_model",
        kind="anyres",
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        image_token_index=IMAGE,
        text_config={"sliding_window": None},
        **CLIP,
    ),
    "llava_onevision": _tiny(
        "LlavaOnevision",
        "qwen2",
        "siglip_vision_model",
        kind="anyres",
        image_grid_pinpoints=[[24, 24], [24, 48], [48, 24], [48, 48]],
        image_token_index=IMAGE,
        video_token_index=92,
        vision_aspect_ratio="anyres_max_2",
        **SIGLIP,
    ),
    "internvl": _tiny(
        "InternVL", "qwen2", "internvl_vision", tokens=9, kind="tiles", image_token_id=IMAGE, image_seq_length=9
    ),
    "gemma3": _tiny(
        "Gemma3",
        "gemma3_text",
        "siglip_vision_model",
        tokens=9,
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=93,
        eoi_token_index=94,
        text_config={"query_pre_attn_scalar": 16, **SLIDING},
        **SIGLIP,
    ),
    "paligemma": _tiny(
        "PaliGemma",
        "gemma",
        "siglip_vision_model",
        projection_dim=64,
        image_token_index=IMAGE,
        tower={"vision_use_head": False, "projection_dim": 64},
    ),
    "paligemma2": _tiny(  # its scores are capped softly, and half of its layers have a window
        "PaliGemma",
        "gemma2",
        "siglip_vision_model",
        projection_dim=64,
        image_token_index=IMAGE,
        tower={"vision_use_head": False, "projection_dim": 64},
        text_config={**SLIDING, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 16},
    ),
    "idefics3": _tiny("Idefics3", "llama", None, tokens=9, kind="padded", image_token_id=IMAGE, scale_factor=2),
    "smolvlm": _tiny("SmolVLM", "llama", None, tokens=9, kind="padded", image_token_id=IMAGE, scale_factor=2),
    "mistral3": _tiny(
        "Mistral3",
        "mistral",
        "pixtral",
        kind="sizes",
        image_token_index=IMAGE,
        spatial_merge_size=2,
        text_config={"sliding_window": None},
        tower={"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "aya_vision": _tiny(
        "AyaVision", "cohere2", "siglip_vision_model", tokens=9, image_token_index=IMAGE, text_config=SLIDING, **SIGLIP
    ),
    "cohere2_vision": _tiny(
        "Cohere2Vision",
        "cohere2",
        "siglip_vision_model",
        tokens=9,
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
        text_config=SLIDING,
        **SIGLIP,
    ),
    "qwen2_vl": _tiny(
        "Qwen2VL",
        "own",
        None,
        kind="packed",
        tower={**QWEN_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        text_config={"rope_parameters": MROPE},
    ),
    "qwen3_vl": _tiny(
        "Qwen3VL",
        "own",
        None,
        kind="packed",
        tower={
            **QWEN_TOWER,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [1, 2],
        },
        text_config={"rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]}},
    ),
    "glm4v": _tiny(
        "Glm4v",
        "own",
        None,
        kind="packed",
        tower={**QWEN_TOWER, "out_hidden_size": 64},
        text_config={"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        **GLM_IDS,
    ),
    "qwen3_vl_moe": _tiny(
        "Qwen3VLMoe",
        "own",
        None,
        kind="packed",
        tower={**QWEN_TOWER, "out_hidden_size": 64, "num_position_embeddings": 36, "deepstack_visual_indexes": [1, 2]},
        text_config={"rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]}, **EXPERTS},
    ),
    "qwen3_5": _tiny("Qwen3_5", "own", None, kind="packed", tower=QWEN3_5_TOWER, text_config=HYBRID),
    "qwen3_5_moe": _tiny(
        "Qwen3_5Moe", "own", None, kind="packed", tower=QWEN3_5_TOWER, text_config={**HYBRID, **EXPERTS}
    ),
    "glm46v": _tiny(
        "Glm46V",
        "own",
        None,
        kind="packed",
        tower={**QWEN_TOWER, "out_hidden_size": 64, "model_type": "glm4v_vision"},
        text_config={"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, "model_type": "glm4v_text"},
        **GLM_IDS,
    ),
    "glm4v_moe": _tiny(
        "Glm4vMoe",
        "own",
        None,
        kind="packed",
        tower={**QWEN_TOWER, "out_hidden_size": 64},
        text_config={
            "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            **EXPERTS,
        },
        **GLM_IDS,
    ),
    "llava_next_video": _tiny(
        "LlavaNextVideo",
        "llama",
        "clip_vision_model",
        kind="anyres",
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        image_token_index=IMAGE,
        video_token_index=92,
        **CLIP,
    ),
    "video_llava": _tiny(
        "VideoLlava", "llama", "clip_vision_model", image_token_index=IMAGE, video_token_index=92, **CLIP
    ),
    "deepseek_vl": _tiny("DeepseekVL", "llama", "siglip_vision_model", image_token_id=IMAGE, **SIGLIP),
    "janus": _tiny(
        "Janus",
        "llama",
        "janus_vision_model",
        image_token_id=IMAGE,
        tower={"projection_dim": 64, "depth": 2, "num_image_tokens": 36, "mlp_ratio": 2},
        vq_config=dict(
            embed_dim=32,
            num_embeddings=16,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=64,
            image_token_embed_dim=64,
            num_hidden_layers=2,
            hidden_size=64,
        ),
    ),
    "got_ocr2": _tiny(
        "GotOcr2",
        "qwen2",
        "",
        tokens=4,
        image_token_index=IMAGE,
        image_seq_length=4,
        tower={
            "output_channels": 16,
            "initializer_range": 0.2,
            "window_size": 4,
            "global_attn_indexes": [1, 3],
            "mlp_dim": 64,
        },
    ),
    "aria": _tiny(
        "Aria",
        "aria_text",
        "idefics3_vision",
        tokens=9,
        image_token_index=IMAGE,
        projector_patch_to_query_dict={"36": 9},
        initializer_range=0.2,
        vision_feature_layer=-1,
        text_config={"moe_num_experts": 4, "moe_topk": 2},
    ),
    "ovis2": _tiny(
        "Ovis2",
        "qwen2",
        "",
        tokens=36,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[85, 86, 87, 88, 89],
        hidden_size=64,
        vocab_size=VOCAB,
        tower={"vocab_size": 48, "hidden_stride": 1},
    ),
    "exaone4_5": _tiny(
        "Exaone4_5_",
        "own",
        None,
        kind="packed",
        tower={**QWEN_TOWER, "num_key_value_heads": 1, "out_hidden_size": 64, "window_size": 16}
        | {"fullatt_block_indexes": [1, 3]},
        text_config={**SLIDING, "model_type": "exaone4"},
    ),
    "video_llama_3": _tiny(
        "VideoLlama3",
        "own",
        None,
        kind="packed",
        tower={"num_channels": 3},
        text_config={"model_type": "qwen2"},
    ),
    "idefics2": _tiny(
        "Idefics2",
        "mistral",
        None,
        tokens=5,
        kind="padded",
        image_token_id=IMAGE,
        perceiver_config=dict(
            hidden_size=64,
            resampler_n_latents=5,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=16,
            num_key_value_heads=2,
            initializer_range=0.2,
        ),
        text_config={"sliding_window": None},
    ),
    "lfm2_vl": _tiny(
        "Lfm2Vl",
        "lfm2",
        "siglip2_vision_model",
        kind="naflex",
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=64,
        tower={"num_patches": 36, "vision_use_head": False},
        text_config={
            "layer_types": ["conv", "full_attention"] * 2,
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "ministral3": _tiny(  # Mistral 3's later text model
        "Mistral3",
        "ministral3",
        "pixtral",
        kind="sizes",
        image_token_index=IMAGE,
        spatial_merge_size=2,
        text_config={"sliding_window": None, "rope_parameters": YARN},
        tower=PIXTRAL,
    ),
    "llava_pixtral": _tiny(
        "Llava",
        "mistral",
        "pixtral",
        kind="sizes",
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        text_config={"sliding_window": None},
        tower=PIXTRAL,
    ),
    "gemma4": _tiny(  # layers of one window share their keys; each adds an embedding of its own
        "Gemma4",
        "gemma4_text",
        "gemma4_vision",
        kind="placed",
        image_token_id=IMAGE,
        video_token_id=92,
        boi_token_id=93,
        eoi_token_id=94,
        audio_token_id=89,
        initializer_range=0.2,
        tower=dict(head_dim=8, num_key_value_heads=4, pooling_kernel_size=2, position_embedding_size=16),
        text_config={
            **SLIDING,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 1,
            "use_bidirectional_attention": "vision",
        },
    ),
    "minicpmv4_6": _tiny(
        "MiniCPMV4_6",
        "qwen3_5_text",
        "",
        kind="navit",
        image_token_id=IMAGE,
        video_token_id=92,
        insert_layer_id=1,
        tower={"window_kernel_size": (2, 2), "image_size": 32},
        text_config=HYBRID | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "kimi_k25": _tiny(  # latent attention: keys and values of different sizes
        "Kimi_K25",
        "own",
        None,
        kind="packed",
        projection_hidden_size=32,
        tower=dict(pos_emb_height=6, pos_emb_width=6, pos_emb_time=2),
        text_config=dict(
            model_type="deepseek_v3",
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            num_key_value_heads=4,
            head_dim=8,
        ),
    ),
    "molmo2": _tiny(  # two scans of an image, pooled from patches; all image tokens see each other
        "Molmo2",
        "molmo2_text",
        "molmo2_vision",
        kind="pooled",
        image_patch_id=IMAGE,
        image_start_token_id=93,
        low_res_image_start_token_id=93,
        image_end_token_id=94,
        frame_start_token_id=95,
        frame_end_token_id=95,
        initializer_range=0.2,
        adapter_config=dict(
            vision_feature_layer=[-1, -3],
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            intermediate_size=64,
            text_hidden_size=64,
            initializer_range=0.2,
        ),
        tower={"image_size": [SIDE, SIDE], "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.2},
        text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "additional_vocab_size": 4},
    ),
    "ernie4_5_vl_moe": _tiny(
        "Ernie4_5_VLMoe",
        "own",
        None,
        kind="packed",
        tower={k: v for k, v in QWEN_TOWER.items() if k != "temporal_patch_size"},
        text_config=dict(
            rope_parameters={**MROPE, "mrope_section": [3, 3, 2]},
            moe_intermediate_size=[32, 16],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
        ),
        **GLM_IDS,
    ),
    "llama4": _tiny(  # chunks of attention, layers without rotary embedding, norms after it, experts
        "Llama4",
        "llama4_text",
        "llama4_vision_model",
        tokens=9,
        image_token_index=IMAGE,
        boi_token_index=93,
        eoi_token_index=94,
        tower=dict(
            intermediate_size=128,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        text_config=dict(
            intermediate_size_mlp=96,
            num_local_experts=4,
            moe_layers=[1, 3],
            attention_chunk_size=24,
            no_rope_layer_interval=4,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "mllama": _tiny(  # layers of their own read up to four tiles of each image
        "Mllama",
        "mllama_text_model",
        "mllama_vision_model",
        tokens=1,
        kind="crossed",
        image_token_index=IMAGE,
        tower=dict(
            attention_heads=4,
            num_global_layers=1,
            vision_output_dim=96,
            max_num_tiles=4,
            intermediate_layers_indices=[1, 3],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            initializer_range=0.2,
        ),
        text_config=dict(
            cross_attention_layers=[1, 3], rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
        ),
    ),
    "fast_vlm": _timm(
        "FastVlm",
        "qwen2",
        "fastvit_t8",
        dict(layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), inference_mode=True),
        side=192,
        tokens=36,
        tower=dict(hidden_size=64, global_pool=""),
        image_token_index=IMAGE,
    ),
    "perception_lm": _timm(
        "PerceptionLM",
        "llama",
        "vit_pe_core_tiny_patch16_384",
        dict(
            embed_dim=32,
            depth=4,
            num_heads=4,
            img_size=(24, 24),
            patch_size=4,
            global_pool="",
            use_post_transformer_norm=False,
            ref_feat_shape=(6, 6),
            init_values=0.1,
        ),
        side=SIDE,
        image_token_id=IMAGE,
        video_token_id=92,
        projector_pooling_ratio=2,
    ),
    "gemma3n": _timm(  # four streams of hidden states, the last two layers without keys of their own
        "Gemma3n",
        "gemma3n_text",
        "mobilenetv5_300m_enc",
        dict(channel_multiplier=0.125, msfa_output_resolution=3),
        side=96,
        vision="gemma3n_vision",
        tower=dict(hidden_size=2048, vocab_offset=VOCAB, vocab_size=8),
        text_config=dict(
            **SLIDING,
            num_kv_shared_layers=2,
            laurel_rank=8,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
        ),
        audio_config=dict(
            hidden_size=32,
            conf_num_hidden_layers=1,
            conf_num_attention_heads=4,
            vocab_offset=VOCAB + 8,
            vocab_size=8,
        ),
        image_token_id=IMAGE,
        audio_token_id=95,
        boi_token_id=93,
        eoi_token_id=94,
        vision_soft_tokens_per_image=9,
    ),
}
# timm needs a torchvision that goes with the torch at hand: `make test-timm` has one
TIMM = all(importlib.util.find_spec(name) for name in ("timm", "torchvision"))
TINY = {name: tiny for name, tiny in EVERY.items() if TIMM or not tiny.needs_timm}


def build(name: str, dtype=torch.float32, seed=0):
    """The model of a family, in float32 unless asked otherwise."""
    import transformers

    tiny = TINY[name]
    if tiny.cls == "Llama4":  # transformers 5.24 reads it from there and fails: see compat.cannot_run
        transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    vision = dict(tiny.tower)
    if tiny.vision:
        vision["model_type"] = tiny.vision
    if tiny.kind == "packed":
        ids = dict(image_token_id=IMAGE, video_token_id=92)
        ids |= tiny.config or dict(vision_start_token_id=93, vision_end_token_id=94)
        config = getattr(transformers, tiny.cls + "Config")(vision_config=vision, text_config=tiny.text_config, **ids)
    else:
        text = {**tiny.text_config, "model_type": tiny.text}
        config = getattr(transformers, tiny.cls + "Config")(vision_config=vision, text_config=text, **tiny.config)
    torch.manual_seed(seed)
    model = getattr(transformers, tiny.cls + "ForConditionalGeneration")(config)
    for what, p in model.named_parameters():
        if "gate" in what and p.numel() == 1:  # closed at first: no image would be read
            p.data.fill_(0.5)
        # zeros (Gemma 3's projector) would show no image; one value everywhere (Idefics2's queries) makes all tokens of
        # an image equal, so that rounding would rank them
        if p.dim() > 1 and bool((p == p.flatten()[0]).all()):
            p.data.normal_(std=0.2)
    return ready(model, dtype)


ANYRES = [(40, 20), (24, 40), (48, 48)]  # pixel sizes (h, w) before the processor


def _anyres(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """(tiles, image tokens) of one image, counted as the processors do: base, unpadded tiles, a newline a row."""
    h, w = size
    points = TINY[name].config["image_grid_pinpoints"]

    def fit(point):
        scale = min(point[0] / h, point[1] / w)
        return min(int(h * scale) * int(w * scale), h * w), -(point[0] * point[1])

    ph, pw = max(points, key=fit)
    rows, columns = ph // PATCH, pw // PATCH
    if w / h > columns / rows:
        new = int(round(h * (columns / w), 7))
        rows -= 2 * ((rows - new) // 2)
    else:
        new = int(round(w * (rows / h), 7))
        columns -= 2 * ((columns - new) // 2)
    if name == "llava_onevision":
        ratio = math.sqrt(rows * columns / (2 * 36))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return 1 + (ph // SIDE) * (pw // SIDE), 36 + rows * (columns + 1)


def _crossed(rows: list[tuple], length: int) -> dict[str, torch.Tensor]:
    """Mllama's inputs of a batch: a row of text sees the tiles of the last image before it, padding sees none."""
    most = max(len(pixels) for _, pixels, _ in rows)
    values, shapes = torch.zeros(len(rows), most, 4, 3, SIDE, SIDE), torch.zeros(len(rows), most).long()
    mask = torch.zeros(len(rows), length, most, 4)
    for i, (ids, pixels, images) in enumerate(rows):
        starts = [length - len(ids) + place for _, place in images]
        for k, (tile, (tiles, _)) in enumerate(zip(pixels, images, strict=True)):
            values[i, k], shapes[i, k] = tile[0], tiles
            mask[i, starts[k] : [*starts, length][k + 1], k, :tiles] = 1
    real = (torch.arange(4) < shapes[..., None]).long()
    return {
        "pixel_values": values,
        "aspect_ratio_ids": shapes,
        "aspect_ratio_mask": real,
        "cross_attention_mask": mask.long(),
    }


EXTRA = {
    "packed": "image_grid_thw",
    "naflex": "spatial_shapes",
    "placed": "image_position_ids",
    "navit": "target_sizes",
    "pooled": "image_grids",
}


def prompt(name: str, images: list[int], seed: int = 0, rows: list[int] | None = None) -> dict[str, torch.Tensor]:
    """A left-padded batch; row i has images[i] images and its own text. `rows` picks some of them, padded anew."""
    g, tiny = torch.Generator().manual_seed(seed), TINY[name]

    def words(n):
        return torch.randint(3, 80, (n,), generator=g).tolist()

    made, number = [], 0
    for i, n in enumerate(images):
        ids, pixels, extra = [1, *words(3 + i)], [], []
        if (
            tiny.kind == "crossed"
        ):  # rows before an image would see all tiles, those of padding too: that is Mllama's own
            ids = [1] * (not n)
        for _ in range(n):
            if tiny.kind == "packed":
                h, w = [(6, 6), (4, 8), (8, 6)][number % 3]
                frames = 1 if name in ("video_llama_3", "ernie4_5_vl_moe", "kimi_k25") else 2
                patch = torch.randn(h * w, 3, 1, PATCH * PATCH, generator=g).expand(-1, -1, frames, -1)
                pixels.append(patch.reshape((h * w, 3, PATCH, PATCH) if name == "kimi_k25" else (h * w, -1)))
                extra.append([1, h, w])
                ids += [93] + [IMAGE] * (h * w // 4) + [94]
            elif tiny.kind == "anyres":
                tiles, count = _anyres(name, ANYRES[number % 3])
                tile = torch.zeros(5, 3, SIDE, SIDE)
                tile[:tiles] = torch.randn(tiles, 3, SIDE, SIDE, generator=g)
                pixels.append(tile[None])
                extra.append(ANYRES[number % 3])
                ids += [IMAGE] * count
            elif tiny.kind == "sizes":
                h, w = [(24, 16), (16, 24), (24, 24)][number % 3]
                image = torch.zeros(1, 3, SIDE, SIDE)
                image[..., :h, :w] = torch.randn(1, 3, h, w, generator=g)
                pixels.append(image)
                extra.append([h, w])
                side = PATCH * tiny.config.get("spatial_merge_size", 1)
                for _ in range(h // side):
                    ids += [IMAGE] * (w // side) + [93]  # row breaks
                ids[-1] = 94
            elif tiny.kind == "naflex":
                h, w = [(6, 6), (4, 8), (6, 4)][number % 3]
                patch = torch.zeros(1, 36, 3 * PATCH * PATCH)
                patch[:, : h * w] = torch.randn(1, h * w, 3 * PATCH * PATCH, generator=g)
                pixels.append(patch)
                extra.append([h, w])
                ids += [93] + [IMAGE] * (h * w // 4) + [94]
            elif tiny.kind in ("placed", "navit"):
                h, w = (
                    [(8, 8), (8, 12), (12, 8)][number % 3]
                    if tiny.kind == "navit"
                    else [(4, 4), (4, 8), (8, 4)][number % 3]
                )
                size, side = h * w, PATCH
                if tiny.kind == "placed":
                    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                    pad = 36 - size
                    places = torch.nn.functional.pad(torch.stack([x, y], -1).view(-1, 2), (0, 0, 0, pad), value=-1)
                    patch = torch.rand(1, size, 3 * side * side, generator=g)
                    pixels.append(torch.nn.functional.pad(patch, (0, 0, 0, pad)))
                    extra.append(places.tolist())
                else:
                    pixels.append(torch.randn(1, 3, side, side * size, generator=g))
                    extra.append([h, w])
                ids += [93] + [IMAGE] * (size // {"placed": 4, "navit": 16}[tiny.kind]) + [94]
            elif tiny.kind == "pooled":
                pixels.append(torch.randn(2, 36, 3 * PATCH * PATCH, generator=g))
                extra.append([2, 2, 3, 3])
                ids += [93] + [IMAGE] * 4 + [94, 93] + [IMAGE] * 9 + [94]
            elif tiny.kind == "crossed":  # one tile or two of four, and one token for all of them
                tiles = 1 + number % 2
                tile = torch.zeros(1, 4, 3, SIDE, SIDE)
                tile[:, :tiles] = torch.randn(1, tiles, 3, SIDE, SIDE, generator=g)
                pixels.append(tile)
                extra.append((tiles, len(ids)))
                ids += [IMAGE]
            elif tiny.kind == "tiles":
                tiles = 1 + 2 * (number % 2)
                pixels.append(torch.randn(tiles, 3, SIDE, SIDE, generator=g))
                ids += [93] + [IMAGE] * (tiny.tokens * tiles) + [94]
            else:
                pixels.append(torch.randn(1, 3, tiny.side, tiny.side, generator=g))
                ids += [93] + [IMAGE] * tiny.tokens + [94]
            number += 1
            ids += words(2)
        made.append((ids + words(7 - i), pixels, extra))
    chosen = [made[i] for i in (rows if rows is not None else range(len(made)))]
    length = max(len(ids) for ids, _, _ in chosen)
    ids = torch.tensor([[PAD] * (length - len(r)) + r for r, _, _ in chosen])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    pixels = [p for _, ps, _ in chosen for p in ps]
    extra = [e for _, _, es in chosen for e in es]
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    if name.startswith("paligemma"):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if tiny.kind in ("packed", "placed", "pooled") and name not in ("exaone4_5", "video_llama_3", "kimi_k25"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "ernie4_5_vl_moe":  # which experts a token goes to
        inputs["moe_mm_token_type_ids"] = ((ids == IMAGE) | (ids == 93) | (ids == 94)).int()
    if not pixels:
        return inputs
    if tiny.kind == "crossed":
        return inputs | _crossed(chosen, length)
    if tiny.kind == "padded":
        most = max(len(ps) for _, ps, _ in chosen)
        blank = torch.zeros(1, 3, SIDE, SIDE)
        inputs["pixel_values"] = torch.stack([torch.cat(ps + [blank] * (most - len(ps))) for _, ps, _ in chosen])
    else:
        inputs["pixel_values"] = torch.cat(pixels, dim=3 if tiny.kind == "navit" else 0)
    if name == "perception_lm":  # one tile an image
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    if extra:
        inputs[EXTRA.get(tiny.kind, "image_sizes")] = torch.tensor(extra)
    if tiny.kind == "naflex":
        sizes = torch.tensor(extra).prod(dim=-1, keepdim=True)
        inputs["pixel_attention_mask"] = (torch.arange(36) < sizes).long()
    if tiny.kind == "pooled":  # 4 tokens of 3 x 3 patches, 9 of 2 x 2
        patches = torch.arange(36).view(6, 6)
        coarse = patches.view(2, 3, 2, 3).transpose(1, 2).reshape(4, 9)
        fine = torch.nn.functional.pad(patches.view(3, 2, 3, 2).transpose(1, 2).reshape(9, 4) + 36, (0, 5), value=-1)
        index = torch.cat([coarse, fine])
        inputs["image_token_pooling"] = torch.cat(
            [torch.where(index < 0, -1, index + 72 * i) for i in range(len(extra))]
        )
        inputs["image_num_crops"] = torch.full((len(extra),), 2)
    if name == "video_llama_3":
        inputs["image_merge_sizes"] = torch.tensor([2] * len(extra))
    if name == "llava_onevision":
        inputs["batch_num_images"] = torch.ones(len(pixels), dtype=torch.long)
    return inputs
