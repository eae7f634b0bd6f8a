"""CARVE's map, regions and crop against loops in float64; batches, decoding modes, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from conftest import GRIDS, IMAGE, make_inputs, single
from reference import Reference, double, teacher_forced, visual_columns

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.methods.carve import CARVE, labelled
from vlm_fix.session import Call

BLACK, GENERAL = (-1.8, -1.75, -1.5), (11, 12, 13)
METHOD = CARVE(tokens=GENERAL, black=BLACK, steps=3)


def refined(model, inputs, method=METHOD):
    """What generate is given in place of the inputs' pixel_values."""
    with vlm_fix.wrapped(model, method):
        engine = model._vlm_fix_engine
        return engine.refine(Call(model, engine.family, dict(inputs)))["pixel_values"]


# ---- the reference ------------------------------------------------------------------------------------------------------


@dataclass
class Seen(Reference):
    rows_seen: dict = field(default_factory=dict)  # (layer, row) -> head weights [L], one after the other

    def weight(self, a, layer, head, row):
        self.rows_seen.setdefault((layer, row), {})[head] = a.clone()
        return a


def looked(twin, inputs, layers, steps):
    """Per step and layer: head-mean weights on the image columns, and whether an end came before."""
    columns, length = visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    answer = torch.zeros(0, dtype=torch.long)
    eos, found, ended = twin.generation_config.eos_token_id, [], False
    for t in range(steps):
        run = Seen(columns, length, layers)
        logits = teacher_forced(twin, run, inputs, answer)
        rows = [run.rows_seen[layer, length - 1 + t] for layer in layers]
        found.append(([sum(heads.values())[columns] / len(heads) for heads in rows], ended))
        answer = torch.cat([answer, logits[-1].argmax()[None]])
        ended = ended or int(answer[-1]) == eos
    return found


def reference_map(twin, inputs, layers=(2, 3), steps=3):
    """S of the image tokens of one prompt, in order."""
    ids = inputs["input_ids"][0].tolist()
    end = max(i for i, token in enumerate(ids) if token == IMAGE) + 1
    end += ids[end] == 94
    general = {**inputs, "input_ids": torch.tensor([[*ids[:end], *GENERAL]])}
    total = torch.zeros(ids.count(IMAGE), dtype=torch.float64)
    for t, ((q, end_q), (g, end_g)) in enumerate(
        zip(looked(twin, inputs, layers, steps), looked(twin, general, layers, steps), strict=True)
    ):
        for layer in range(len(layers)):
            for j in range(len(total)):
                if not end_q and not end_g:
                    total[j] += (t + 1) * q[layer][j] / (g[layer][j] + 1e-8)
    return total


def tables(new, old, reach, kernel):
    """[new, old] weights of a separable resize: a kernel of `reach` around each pixel's place."""
    table = torch.zeros(new, old, dtype=torch.float64)
    ratio = old / new
    wide = max(1.0, ratio) if reach == 2 else 1.0
    for i in range(new):
        place = (i + 0.5) * ratio - 0.5
        for j in range(math.floor(place - reach * wide), math.ceil(place + reach * wide) + 1):
            weight = kernel(abs(j - place) / wide)
            if reach == 1:  # borders repeat
                table[i, min(max(j, 0), old - 1)] += weight
            elif 0 <= j < old:  # borders are left out
                table[i, j] += weight
        table[i] /= table[i].sum()
    return table


def cubic(x):
    if x >= 2:
        return 0.0
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2


def regions_of(mask):
    """Regions by flood fill over 8 neighbours."""
    left, found = {(y, x) for y, x in mask.nonzero().tolist()}, []
    while left:
        region, edge = set(), {min(left)}
        while edge:
            region |= edge
            left -= edge
            edge = {(y + v, x + u) for y, x in edge for v in (-1, 0, 1) for u in (-1, 0, 1)} & left
        found.append(region)
    return found


def reference_crop(image, s, top=0.2, regions=3, share=0.2):
    """[3, H, W] float64 image and its map [h, w] -> (refined image, box y, box x)."""
    _, height, width = image.shape
    line = lambda x: max(0.0, 1 - x)  # noqa: E731
    s = tables(height, s.shape[0], 1, line) @ s @ tables(width, s.shape[1], 1, line).T
    cut = sorted(s.flatten().tolist(), reverse=True)[round(top * height * width) - 1]
    found = regions_of(s >= cut)
    found.sort(key=lambda region: -sum(float(s[y, x]) for y, x in region))
    kept = set().union(*found[: max(regions, int(share * len(found)))])
    dark = torch.tensor(BLACK, dtype=torch.float64)[:, None, None].expand_as(image).clone()
    for y, x in kept:
        dark[:, y, x] = image[:, y, x]
    ys, xs = [y for y, _ in kept], [x for _, x in kept]
    dark = dark[:, min(ys) : max(ys) + 1, min(xs) : max(xs) + 1]
    return tables(height, dark.shape[1], 2, cubic) @ dark @ tables(width, dark.shape[2], 2, cubic).T


def unpacked(patches, h, w, patch=4, merge=2):
    """Qwen's patches of one image [h w, 3 * 2 * P * P] -> [3, H, W], by loops over patches."""
    image = torch.zeros(3, h * patch, w * patch, dtype=patches.dtype)
    order = [
        (y + v, x + u)
        for y in range(0, h, merge)
        for x in range(0, w, merge)
        for v in range(merge)
        for u in range(merge)
    ]
    for (y, x), values in zip(order, patches.view(h * w, 3, 2, patch, patch), strict=True):
        assert torch.equal(values[:, 0], values[:, 1])  # both frames show the image
        image[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = values[:, 0]
    return image


def pictures(family, inputs, pixels):
    if family == "llava":
        return list(pixels)
    grids = inputs["image_grid_thw"].tolist()
    parts = pixels.split([h * w for _, h, w in grids])
    return [unpacked(part, h, w) for part, (_, h, w) in zip(parts, grids, strict=True)]


def close(maps, s):
    """1e-5 of the peak: a ratio of two small weights has the rounding errors of both scores."""
    return torch.allclose(torch.cat([m.flatten() for m in maps]).double(), s, rtol=1e-5, atol=1e-5 * float(s.max()))


# ---- tests --------------------------------------------------------------------------------------------------------------


def test_map_and_crop_are_the_formulas(model, family):
    """A prompt of two images."""
    inputs = single(family, [1, 2, 1], 1)
    s = reference_map(double(model), inputs)
    with vlm_fix.wrapped(model, METHOD):
        engine = model._vlm_fix_engine
        assert engine.active[0].layers == (2, 3)
        found = engine.active[0].maps(Call(model, engine.family, dict(inputs)))
    assert close(found, s)
    sizes = [m.shape for m in found]
    assert sizes == ([(6, 6)] * 2 if family == "llava" else [(h // 2, w // 2) for h, w in GRIDS[1:3]])
    maps = [part.view(size) for part, size in zip(s.split([h * w for h, w in sizes]), sizes, strict=True)]
    before = pictures(family, inputs, inputs["pixel_values"])
    after = pictures(family, inputs, refined(model, inputs))
    for image, made, m in zip(before, after, maps, strict=True):
        expected = reference_crop(image.double(), m)
        assert made.shape == image.shape and not torch.equal(made, image)
        assert torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_crops_of_many_shapes():
    """`refined` alone, with regions beyond the least number, at the edges, and maps coarser than the image."""
    g = torch.Generator().manual_seed(3)
    for height, width, h, w, regions, share in (
        (24, 24, 6, 6, 3, 0.2),
        (40, 16, 10, 4, 1, 0.5),
        (12, 28, 12, 28, 1, 0.1),
    ):
        image, s = torch.randn(3, height, width, generator=g), torch.rand(h, w, generator=g).double()
        method = CARVE(regions=regions, share=share)
        got = method.refined(image, s, torch.tensor(BLACK))
        expected = reference_crop(image.double(), s, regions=regions, share=share)
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_regions_touch_over_corners_and_round_bends():
    g = torch.Generator().manual_seed(0)
    snake = torch.zeros(9, 31, dtype=torch.bool)
    snake[::2], snake[1::4, -1], snake[3::4, 0] = True, True, True
    for mask in (snake, torch.eye(7).bool(), *(torch.rand(17, 23, generator=g) < p for p in (0.1, 0.3, 0.45, 1.1))):
        labels, found = labelled(mask), regions_of(mask)
        assert torch.equal(labels > 0, mask) and len(labels[mask].unique()) == len(found)
        assert all(len({int(labels[p]) for p in region}) == 1 for region in found)


def test_answers_are_those_to_the_refined_image(model, family):
    inputs = single(family, [1, 2, 1], 0)
    crop = {**inputs, "pixel_values": refined(model, inputs)}
    for how in ({}, {"num_beams": 3}, {"do_sample": True}):
        options = {"max_new_tokens": 6, "do_sample": False, **how}
        torch.manual_seed(0)
        expected = model.generate(**crop, **options)
        with vlm_fix.wrapped(model, METHOD):
            torch.manual_seed(0)
            assert torch.equal(model.generate(**inputs, **options), expected)
    assert not torch.equal(expected, model.generate(**inputs, **options)) or not torch.equal(
        model(**crop).logits, model(**inputs).logits
    )


def test_a_contrast_beside_it_gets_the_crop(model, family):
    inputs = single(family, [1, 2, 1], 0)
    crop = {**inputs, "pixel_values": refined(model, inputs)}
    with vlm_fix.wrapped(model, "vcd"):
        expected = model.generate(**crop, max_new_tokens=5, do_sample=False)
    with vlm_fix.wrapped(model, [METHOD, "vcd"]):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("ends", [False, True])
def test_a_batch_equals_single_runs(model, family, ends):
    """ends: one of the short answers ends early, so that its later tokens must not count."""
    images = [1, 2, 1]
    batch = make_inputs(family, images)
    if ends:
        with vlm_fix.wrapped(model, "baseline"):
            plain = model.generate(**single(family, images, 1), max_new_tokens=2, do_sample=False)
        model.generation_config.eos_token_id = int(plain[0, -2])
    try:
        together = pictures(family, batch, refined(model, batch))
        alone = []
        for i in range(3):
            inputs = single(family, images, i)
            alone += pictures(family, inputs, refined(model, inputs))
        if ends:
            inputs = single(family, images, 1)
            s = reference_map(double(model), inputs)
            with vlm_fix.wrapped(model, METHOD):
                engine = model._vlm_fix_engine
                found = engine.active[0].maps(Call(model, engine.family, dict(inputs)))
            assert close(found, s)
    finally:
        model.generation_config.eos_token_id = None
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with vlm_fix.wrapped(model, METHOD):
        rows = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
        for i in range(3):
            one = model.generate(**single(family, images, i), max_new_tokens=4, do_sample=False)[0, -4:]
            assert torch.equal(rows[i], one)


def test_keeping_every_pixel_changes_nothing(model, family):
    inputs = single(family, [1, 2, 1], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options)
    keep = CARVE(top=1.0)
    with vlm_fix.wrapped(model, keep):
        same = model.generate(**inputs, **options)
    assert torch.equal(plain.sequences, same.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
    image = torch.randn(3, 8, 8)
    assert keep.refined(image, torch.rand(4, 4), torch.zeros(3)) is image


def test_what_it_cannot_do_is_one_sentence(model, family):
    inputs = single(family, [1, 2, 1], 0)
    with vlm_fix.wrapped(model, CARVE(tokens=GENERAL)), pytest.raises(VlmFixError, match="carve:black="):
        model.generate(**inputs, max_new_tokens=2)
    with vlm_fix.wrapped(model, CARVE(black=BLACK)), pytest.raises(VlmFixError, match="carve:tokens="):
        model.generate(**inputs, max_new_tokens=2)
    with vlm_fix.wrapped(model, CARVE(tokens=GENERAL, black=(0.0,))), pytest.raises(VlmFixError, match="3 channels"):
        model.generate(**inputs, max_new_tokens=2)
    without = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with vlm_fix.wrapped(model, METHOD):
        with pytest.raises(VlmFixError, match="needs pixel_values of whole images"):
            model.generate(**without, max_new_tokens=2)
        with pytest.raises(VlmFixError, match="whole conversation"):
            model.generate(**inputs, max_new_tokens=2, past_key_values=object())
    with pytest.raises(VlmFixError, match="carve looks at all image tokens, of which hiprune drops some"):
        vlm_fix.wrap(model, ["hiprune", METHOD])
    for wrong in ("carve:steps=0", "carve:top=2", "carve:regions=0"):
        with pytest.raises(VlmFixError, match="must be a number"):
            vlm_fix.parse_spec(wrong)
