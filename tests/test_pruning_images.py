"""Pruning that depends on how an image is cut: smaller images, and crops (LLaVA-NeXT, LLaVA-OneVision)."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_inputs, single
from PIL import Image
from test_methods import error, greedy
from test_pruning_methods import masked_logits

import vlm_fix
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


def test_grid_keeps_the_shape_and_the_budget():
    for h, w in [(24, 24), (6, 9), (1, 7), (40, 3)]:
        for total in range(2, h * w + 1):
            method = vlm_fix.parse_spec(f"downsample_image:keep={total}")
            rows, columns = method.shrink((h, w))
            assert (rows, columns) == small_grid(h, w, total)
            assert 1 <= rows * columns <= total and rows <= h and columns <= w
            index = shrink.places((h, w), (rows, columns)).tolist()
            assert index == sorted(set(index)) and max(index) < h * w


@pytest.mark.parametrize("keep", ["1.0", "1000"])
def test_whole_image_is_bit_identical(family, model, keep):
    inputs = make_inputs(family, [1, 2, 1])
    base = greedy(model, inputs)[1]
    with vlm_fix.wrapped(model, f"downsample_image:keep={keep}"):
        assert torch.equal(greedy(model, inputs)[1], base)


def test_downsampled_batch_equals_single(family, model):
    inputs = make_inputs(family, [1, 2, 1])
    with vlm_fix.wrapped(model, ["downsample_image:keep=5", "vcd"]):
        tokens, logits, _ = greedy(model, inputs)
        for row in range(3):
            alone, values, _ = greedy(model, single(family, [1, 2, 1], row))
            assert torch.equal(alone[0], tokens[row]) and error(values[0], logits[row].double()) < 1e-4
