"""Pruning that depends on how an image is cut: smaller images, and crops (LLaVA-NeXT, LLaVA-OneVision)."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.pruning_before import divprune, masked_logits, uniform_grid
from tests.support.run import error, greedy
from vlm_fix.pruning import shrink


def small_grid(h, w, total):
    """The grid from the docstring's formula, in floats."""
    rows = min(h, total, max(1, math.floor(math.sqrt(total * h / w) + 1e-9)))
    return rows, min(w, max(1, total // rows))


def bicubic(channels, height, width):
    """[C, H, W] float64 -> [C, height, width] by Pillow, which works in 32-bit floats."""
    rows = [Image.fromarray(c.numpy().astype(np.float32)).resize((width, height), Image.BICUBIC) for c in channels]
    return torch.stack([torch.from_numpy(np.array(r)).double() for r in rows])


@torch.no_grad()
def shrunk_features(family, twin, inputs, total):
    """-> {index over all images' tokens: feature} of images resized by Pillow and encoded by the float64 towers."""
    kept, offset = {}, 0
    if family == "llava":
        for x in inputs["pixel_values"].double():
            rows, columns = small_grid(6, 6, total)
            y = bicubic(x, 4 * rows, 4 * columns)
            out = twin.model.vision_tower(y[None], interpolate_pos_encoding=True, output_hidden_states=True)
            z = twin.model.multi_modal_projector(out.hidden_states[-2][:, 1:])[0]
            for n in range(rows * columns):
                r, c = divmod(n, columns)
                kept[offset + int((r + 0.5) * 6 / rows) * 6 + int((c + 0.5) * 6 / columns)] = z[n]
            offset += 36
        return kept
    start = 0
    for _, h, w in inputs["image_grid_thw"].tolist():
        x = inputs["pixel_values"][start : start + h * w].double()
        start += h * w
        image = torch.zeros(6, 4 * h, 4 * w, dtype=torch.float64)  # channel and frame, pixels
        order = [(2 * i + a, 2 * j + b) for i in range(h // 2) for j in range(w // 2) for a in (0, 1) for b in (0, 1)]
        for patch, (i, j) in zip(x, order, strict=True):
            image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = patch.view(6, 4, 4)
        rows, columns = small_grid(h // 2, w // 2, total)
        y = bicubic(image, 8 * rows, 8 * columns)
        order = [(2 * i + a, 2 * j + b) for i in range(rows) for j in range(columns) for a in (0, 1) for b in (0, 1)]
        made = torch.stack([y[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten() for i, j in order])
        z = twin.model.visual(made, grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]])).pooler_output
        for n in range(rows * columns):
            r, c = divmod(n, columns)
            kept[offset + int((r + 0.5) * h / 2 / rows) * (w // 2) + int((c + 0.5) * w / 2 / columns)] = z[n]
        offset += h * w // 4
    return kept


@pytest.mark.parametrize("total", [2, 5])
def test_downsampled_image_equals_reference(family, model, total):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, f"downsample_image:keep={total}"):
        tokens, logits, _ = greedy(model, inputs)
    twin = copy.deepcopy(model).double()
    kept = shrunk_features(family, twin, inputs, total)
    compact = family == "llava"
    expected = masked_logits(family, twin, inputs, kept, tokens[0], compact)
    assert error(logits[0], expected) < 1e-5
    assert error(logits[0], masked_logits(family, twin, inputs, list(kept), tokens[0], compact)) > 1e-3, "not shrunk"


@pytest.mark.parametrize("total, said", [(2, 0), (1000, 1)])
def test_an_image_that_is_not_shrunk_is_told(family, model, total, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with vlm_fix.wrapped(model, f"downsample_image:keep={total}"):
            greedy(model, single(family, [1, 2], 1))
    assert sum("keep covers every image token" in str(w.message) for w in caught) == said


def test_grid_keeps_the_shape_and_the_budget():
    for h, w in [(24, 24), (6, 9), (1, 7), (40, 3)]:
        for total in range(2, h * w + 1):
            method = vlm_fix.parse_spec(f"downsample_image:keep={total}")
            rows, columns = method.shrink((h, w))
            assert (rows, columns) == small_grid(h, w, total)
            assert 1 <= rows * columns <= total and rows <= h and columns <= w
            index = shrink.places((h, w), (rows, columns)).tolist()
            assert index == sorted(set(index)) and max(index) < h * w


def test_downsampled_batch_equals_single(family, model):
    inputs = make_inputs(family, [1, 2, 1])
    with vlm_fix.wrapped(model, ["downsample_image:keep=5", "vcd"]):
        tokens, logits, _ = greedy(model, inputs)
        for row in range(3):
            alone, values, _ = greedy(model, single(family, [1, 2, 1], row))
            assert torch.equal(alone[0], tokens[row]) and error(values[0], logits[row].double()) < 1e-4


# ---- images of several crops ----------------------------------------------------------------------------------------


def packed(name, size, count):
    """What each of an image's tokens shows: (crop, patch), or None for a newline. Counted by hand: 6 x 6 patches a crop."""
    places = [(0, i) for i in range(36)]
    if count == 1:
        return [*places, None]
    height, width = size
    down, across = {3: (2, 1) if height > width else (1, 2), 5: (2, 2)}[count]
    rows, columns, top, left = 6 * down, 6 * across, 0, 0
    if width / height > columns / rows:
        top = (rows - round(height * columns / width, 7) // 1) // 2
    else:
        left = (columns - round(width * rows / height, 7) // 1) // 2
    for y in range(int(top), rows - int(top)):
        for x in range(int(left), columns - int(left)):
            places.append((1 + (y // 6) * across + x // 6, (y % 6) * 6 + x % 6))
        places.append(None)
    return places


@torch.no_grad()
def crops_of(name, twin, pixels):
    """Float64: per crop its features and, for the two encoder layers of HiPrune, attention received by each patch."""
    seen, blocks = (
        {},
        [m for m in twin.model.vision_tower.modules() if type(m).__name__ in ("CLIPAttention", "SiglipAttention")],
    )
    hooks = [
        b.register_forward_pre_hook(
            lambda m, a, k, i=i: seen.__setitem__(i, a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for i, b in enumerate(blocks)
    ]
    states = twin.model.vision_tower(pixels.double(), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    z = twin.model.multi_modal_projector(states[twin.config.vision_feature_layer][:, -36:])
    scores = {}
    for i, b in enumerate(blocks):
        heads = [p(seen[i]).view(len(pixels), -1, 4, 8).transpose(1, 2) for p in (b.q_proj, b.k_proj)]
        scores[i] = [ref.received(q, k, 8**-0.5)[-36:] for q, k in zip(*heads, strict=True)]
    return z, scores


def hiprune(z, scores, budget, twin):
    return ref.hiprune_choice(*scores, (6, 6), budget, 0.7)


CROPS = {
    "uniform_grid": lambda z, scores, budget, twin: uniform_grid({"grid": (6, 6)}, budget, None),
    "divprune": lambda z, scores, budget, twin: divprune({"z": z}, budget, None),
    "hiprune:object_layer=2,alpha=0.7": hiprune,
}


@pytest.mark.parametrize("spec", CROPS)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_crops_equal_reference(name, spec):
    """Each crop chooses on its own; padding is gone, a newline stays with its row: against a full-length masked prompt."""
    model, inputs = families.build(name), families.prompt(name, [2])
    with vlm_fix.wrapped(model, f"{spec}{',' if ':' in spec else ':'}keep=12"):
        tokens, logits, _ = greedy(model, inputs, steps=4)
    twin, ids = copy.deepcopy(model).double(), inputs["input_ids"]
    visual, last = (ids[0] == IMAGE).nonzero()[:, 0].tolist(), twin.config.vision_feature_layer % 5 - 1
    full = torch.cat([ids, tokens[:, :-1]], 1)
    embeds, mask, at, dropped = twin.get_input_embeddings()(full).detach(), torch.ones_like(full), 0, 0
    for image in range(2):
        size, count = families.ANYRES[image], families._anyres(name, families.ANYRES[image])[0]
        z, scores = crops_of(name, twin, inputs["pixel_values"][image][:count])
        chosen = [CROPS[spec](z[c], [scores[1][c], scores[last][c]], 12 // count, twin) for c in range(count)]
        places = packed(name, size, count)
        for n, place in enumerate(places):
            embeds[0, visual[at + n]] = twin.model.image_newline if place is None else z[place]
            row, back = False, n - 1
            while place is None and back >= (36 if count > 1 else 0) and places[back] is not None:
                row |= places[back][1] in chosen[places[back][0]]
                back -= 1
            keep = row if place is None else place[1] in chosen[place[0]]
            mask[0, visual[at + n]], dropped = int(keep), dropped + (not keep)
        at += len(places)
    assert at == len(visual) and dropped > 60 and mask[0, visual].sum() > 12
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = twin.model.language_model(
        inputs_embeds=embeds, position_ids=position, attention_mask=mask, use_cache=False
    )
    assert error(logits[0], twin.lm_head(hidden.last_hidden_state)[0, -4:].detach()) < 1e-5


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_crops_in_a_batch_equal_single_and_a_whole_budget_changes_nothing(name):
    model, images = families.build(name), [1, 1, 0, 1] if name == "llava_next" else [1, 1]
    inputs = families.prompt(name, images)
    base = greedy(model, inputs, steps=4)[1]
    with vlm_fix.wrapped(model, "hiprune:keep=1.0"):
        assert torch.equal(greedy(model, inputs, steps=4)[1], base)
    for spec in ("visionzip:keep=0.3", "downsample_image:keep=0.3", "fastv:keep=0.3"):
        with vlm_fix.wrapped(model, [spec, "pai"]):
            tokens, logits, _ = greedy(model, inputs, steps=4)
            assert error(base, logits.double()) > 1e-3
            for row in (r for r, n in enumerate(images) if n):
                alone = greedy(model, families.prompt(name, images, rows=[row]), steps=4)
                assert torch.equal(alone[0][0], tokens[row]) and error(alone[1][0], logits[row].double()) < 1e-4


def test_pruners_that_cannot_read_crops_refuse_them():
    model, inputs = families.build("llava_next"), families.prompt("llava_next", [1])
    with vlm_fix.wrapped(model, "hiprune:keep=4"), pytest.raises(vlm_fix.VlmFixError, match="at least 6"):
        greedy(model, inputs, steps=1)
    with pytest.raises(vlm_fix.VlmFixError, match="give keep as a share"):
        vlm_fix.wrap(model, "downsample_image:keep=9")
    model, inputs = families.build("llava_onevision"), families.prompt("llava_onevision", [3])
    with vlm_fix.wrapped(model, "uniform_grid"), pytest.raises(vlm_fix.VlmFixError, match="smaller image"):
        greedy(model, inputs, steps=1)


@pytest.mark.parametrize("pruner", ["divprune:keep=0.5", "cdpruner:keep=0.5", "visionzip:keep=0.5"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_pass_of_another_methods_own_shows_the_pruner_no_second_images(name, pruner):
    """VISTA runs the prompt once more before it is pruned: at next to no strength the answer is the pruner's, in beams too."""
    model, inputs = families.build(name), families.prompt(name, [1, 1])
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with vlm_fix.wrapped(model, pruner):
        alone, beams = greedy(model, inputs, steps=3), model.generate(**inputs, **options)
    for stack in (f"vista:lam=1e-9,alpha=0+{pruner}", f"{pruner}+vista:lam=1e-9,alpha=0"):
        with vlm_fix.wrapped(model, stack):
            both = greedy(model, inputs, steps=3)
            assert torch.equal(alone[0], both[0]) and error(alone[1], both[1].double()) < 1e-5
            assert torch.equal(model.generate(**inputs, **options), beams)
