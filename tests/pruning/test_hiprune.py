"""HiPrune against loops over the towers' attention and a prompt rebuilt by hand."""

from __future__ import annotations

import copy

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, single
from tests.support.references import base as ref
from tests.support.references.attention import window_order
from tests.support.run import STEPS, error, greedy


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_hiprune_equals_reference(family, model, positions):
    """Scores by loops over CLIP / Qwen encoder attention, selection by the paper's text, a prompt rebuilt by hand."""
    if family == "qwen2_5_vl" and positions == "compact":
        with pytest.raises(vlm_fix.VlmFixError, match="positions=original"):
            vlm_fix.wrap(model, "hiprune:keep=8,positions=compact")
        return
    inputs, budget, alpha = single(family, [1, 2], 1), 8, 0.7
    with vlm_fix.wrapped(model, f"hiprune:keep={budget},alpha={alpha},object_layer=2,positions={positions}"):
        tokens, logits, _ = greedy(model, inputs)
    twin = copy.deepcopy(model).double()
    kept, features = encoder_choice(family, twin, inputs, budget, alpha)
    ids, visual = inputs["input_ids"], ref.visual_columns(inputs["input_ids"])
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    keep[visual] = False
    keep[[visual[i] for i in kept]] = True
    full = torch.cat([ids, tokens[:, :-1]], 1)
    embeds = twin.get_input_embeddings()(full)
    embeds[0, visual] = features
    keep = torch.cat([keep, torch.ones(STEPS - 1, dtype=torch.bool)])
    if family == "llava":
        position = (
            torch.arange(int(keep.sum()))[None] if positions == "compact" else torch.arange(len(keep))[keep][None]
        )
    else:
        types = (full == IMAGE).int()
        position = twin.model.get_rope_index(full, image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=types)[0]
        position = position[..., keep]
    hidden = twin.model.language_model(
        inputs_embeds=embeds[:, keep],
        position_ids=position,
        use_cache=False,
        attention_mask=torch.ones(1, int(keep.sum())),
    ).last_hidden_state
    assert error(logits[0], twin.lm_head(hidden)[0, -STEPS:].detach()) < 1e-5


@torch.no_grad()
def encoder_choice(family, twin, inputs, budget, alpha):
    """-> indices kept (over all images), projected features [N, C]; attention recomputed from the towers' modules."""
    pixels, seen = inputs["pixel_values"].double(), {}
    if family == "llava":
        blocks = [m for m in twin.model.vision_tower.modules() if type(m).__name__ == "CLIPAttention"]
        layers, project = (1, 2), lambda m, x: (m.q_proj(x), m.k_proj(x))
    else:
        blocks = [b.attn for b in twin.model.visual.blocks]
        layers, project = (1, 3), None
    hooks = [
        blocks[i].register_forward_pre_hook(
            lambda m, a, k, i=i: seen.__setitem__(i, ((a[0] if a else k["hidden_states"]).clone(), k)), with_kwargs=True
        )
        for i in layers
    ]
    grids = inputs.get("image_grid_thw")
    extra = {} if grids is None else {"image_grid_thw": grids}
    features = torch.cat(list(twin.model.get_image_features(pixels, return_dict=True, **extra).pooler_output))
    for hook in hooks:
        hook.remove()
    kept, offset = [], 0
    if family == "llava":
        for n in range(len(pixels)):
            columns = []
            for i in layers:
                q, k = (y[n].view(37, 4, 8).transpose(0, 1) for y in project(blocks[i], seen[i][0]))
                columns.append(ref.received(q, k, 8**-0.5)[1:])
            kept += [offset + i for i in ref.hiprune_choice(*columns, (6, 6), budget, alpha)]
            offset += 36
        return kept, features
    order = window_order(grids)
    for n, (_, h, w) in enumerate(grids.tolist()):
        columns = []
        for i in layers:
            x, kw = seen[i]
            cos, sin = kw["position_embeddings"]
            q, k, _ = blocks[i].qkv(x).view(len(x), 3, 2, 16).permute(1, 2, 0, 3)
            q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
            start = sum(a * b for _, a, b in grids[:n].tolist())
            s = ref.received(q[:, start : start + h * w], k[:, start : start + h * w], 16**-0.5)
            units = [float(s[4 * u : 4 * u + 4].mean()) for u in range(h * w // 4)]
            restored = [0.0] * len(units)
            for u, place in enumerate(order[n]):
                restored[place] = units[u]
            columns.append(torch.tensor(restored, dtype=torch.float64))
        kept += [offset + i for i in ref.hiprune_choice(*columns, (h // 2, w // 2), budget, alpha)]
        offset += h * w // 4
    return kept, features


@pytest.mark.parametrize(("border", "kept"), [("grid", [1, 2, 5, 8]), ("line", [1, 2, 3, 5])])
def test_neighbours_at_the_end_of_a_row(border, kept):
    """An anchor at the end of the first row of 3 x 3: the official code's neighbours go on in the next row."""
    from vlm_fix.methods.pruning.hiprune import HiPrune
    from vlm_fix.pruning.encoder import ImageTokens

    scores = {1: torch.tensor([0.0, 0, 9, 0, 0, 0, 0, 0, 0]), 3: torch.arange(9.0)}
    method = HiPrune(keep=4, alpha=1.0, object_layer=2, border=border)
    assert method.select(ImageTokens((3, 3), scores)).tolist() == kept
