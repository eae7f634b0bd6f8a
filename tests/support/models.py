"""Tiny random-weight models of the true architectures, and prompts for them."""

from __future__ import annotations

import torch

IMAGE, PAD, VIDEO, IMAGE_END, VOCAB = 90, 91, 92, 94, 96


def tiny_llava(dtype=torch.float32, seed=0, depth=4, heads=4, kv_heads=2, config=None, **more):
    """LLaVA with a CLIP tower (6x6 = 36 patches) and a Llama decoder with grouped-query heads, or another `config`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
        projection_dim=32,
    )
    text = (config or LlamaConfig)(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **more,
    )
    whole = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=36,
    )
    return ready(LlavaForConditionalGeneration(whole), dtype)


def tiny_qwen(dtype=torch.float32, seed=0, depth=4):
    """Qwen2.5-VL with windowed vision attention and M-RoPE."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 64,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "in_channels": 3,
        },
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        image_token_id=IMAGE,
        video_token_id=92,
        vision_start_token_id=93,
        vision_end_token_id=IMAGE_END,
    )
    return ready(Qwen2_5_VLForConditionalGeneration(config), dtype)


def ready(model, dtype):
    for p in model.parameters():  # random norms and biases too, so that nothing cancels by symmetry
        if p.dim() == 1:
            p.data.add_(0.1 * torch.randn_like(p))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model._apply(lambda x: x.to(dtype) if x.is_floating_point() else x)  # rotary tables may be complex numbers
    return model.eval()


BUILD = {"llava": tiny_llava, "qwen2_5_vl": tiny_qwen}
GRIDS = [(6, 6), (4, 8), (8, 6)]  # Qwen2.5-VL images in patches; LLaVA's are all 6 x 6


def make_inputs(family: str, images: list[int], seed: int = 0, dtype=torch.float32, text: int = 7) -> dict:
    """A left-padded batch; row i has images[i] images and its own text lengths."""
    g = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(3, 80, (n,), generator=g).tolist()

    rows, pixels, grids, count = [], [], [], 0
    for i, n in enumerate(images):
        ids = [1, *words(3 + i)]
        for _ in range(n):
            if family == "llava":
                ids += [IMAGE] * 36
                pixels.append(torch.randn(1, 3, 24, 24, generator=g))
            else:
                h, w = GRIDS[count % len(GRIDS)]
                grids.append([1, h, w])
                patch = torch.randn(h * w, 3, 1, 16, generator=g).expand(-1, -1, 2, -1)
                pixels.append(patch.reshape(h * w, -1))
                ids += [93] + [IMAGE] * (h * w // 4) + [94]
            count += 1
            ids += words(2)
        rows.append(ids + words(text - i))
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(r)) + r for r in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(dtype)
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        if grids:
            inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def single(family: str, images: list[int], row: int, seed: int = 0, **kw) -> dict:
    """Row `row` of make_inputs as a batch of one, without its padding."""
    full = make_inputs(family, images, seed, **kw)
    keep = full["attention_mask"][row].bool()
    out = {k: full[k][row : row + 1, keep] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in full}
    before, n = sum(images[:row]), images[row]
    if n and family == "llava":
        out["pixel_values"] = full["pixel_values"][before : before + n]
    elif n:
        sizes = full["image_grid_thw"].prod(-1).tolist()
        out["pixel_values"] = full["pixel_values"].split(sizes)
        out["pixel_values"] = torch.cat(out["pixel_values"][before : before + n])
        out["image_grid_thw"] = full["image_grid_thw"][before : before + n]
    return out
