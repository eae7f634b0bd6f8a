"""RITUAL's transforms against PIL, colorsys and loops, and where they are put into the processor's pixels."""

from __future__ import annotations

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_fix
from tests.support.models import GRIDS, make_inputs, single
from tests.support.run import greedy
from vlm_fix.call import Call
from vlm_fix.families import family_of
from vlm_fix.methods.contrast import transforms as t
from vlm_fix.methods.procedures.pixels import changed


@pytest.fixture
def image():
    return torch.rand(2, 3, 18, 26, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("degrees", [0, 17.5, 90, -133, 180])
def test_rotation_is_that_of_pil(image, degrees):
    ours = t.rotated(image, degrees)
    for frame, new in zip(image, ours, strict=True):
        for a, b in zip(frame, new, strict=True):
            theirs = np.asarray(Image.fromarray(a.numpy(), mode="F").rotate(degrees, Image.Resampling.NEAREST))
            assert (np.abs(theirs - b.numpy()) > 1e-6).mean() < 0.03, "but for ties of the nearest pixel"


def test_colours_are_those_of_loops(image):
    new = {
        "brighter": t.brighter(image, 1.6),
        "contrasted": t.contrasted(image, 0.3),
        "saturated": t.saturated(image, 1.9),
        "recoloured": t.recoloured(image, 0.37),
    }
    for n in range(2):
        greys = [
            [sum(w * float(image[n, c, i, j]) for c, w in enumerate((0.2989, 0.587, 0.114))) for j in range(26)]
            for i in range(18)
        ]
        mean = sum(map(sum, greys)) / (18 * 26)
        for i in range(18):
            for j in range(26):
                rgb = image[n, :, i, j].tolist()
                h, s, v = colorsys.rgb_to_hsv(*rgb)
                expected = {
                    "brighter": [1.6 * x for x in rgb],
                    "contrasted": [0.3 * x + 0.7 * mean for x in rgb],
                    "saturated": [1.9 * x - 0.9 * greys[i][j] for x in rgb],
                    "recoloured": colorsys.hsv_to_rgb((h + 0.37) % 1, s, v),
                }
                for name, values in expected.items():
                    clipped = [min(1, max(0, x)) for x in values]
                    assert new[name][n, :, i, j].tolist() == pytest.approx(clipped, abs=1e-5), name
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.allclose(t.recoloured(grey, 0.2), grey) and torch.allclose(t.saturated(grey, 1.7), grey, atol=1e-4)


def test_blur_is_that_of_loops(image):
    new, (h, w) = t.blurred(image, 1.7), image.shape[-2:]
    weights = [math.exp(-((k / 1.7) ** 2) / 2) for k in range(-6, 7)]

    def mirrored(i, n):
        return -i if i < 0 else 2 * n - 2 - i if i >= n else i

    for i, j in [(0, 0), (3, 25), (9, 12), (17, 5)]:
        total = sum(
            weights[a + 6] * weights[b + 6] * float(image[1, 2, mirrored(i + a, h), mirrored(j + b, w)])
            for a in range(-6, 7)
            for b in range(-6, 7)
        )
        assert float(new[1, 2, i, j]) == pytest.approx(total / sum(weights) ** 2, abs=1e-5)


def test_crop_is_a_piece_of_the_allowed_size(image, monkeypatch):
    seen, real = [], t.interpolate
    monkeypatch.setattr(t, "interpolate", lambda x, size, **k: seen.append(x) or real(x, size, **k))
    for seed in range(40):
        assert t.crop(image, t.Draw(seed)).shape == image.shape
    shapes = {tuple(x.shape[-2:]) for x in seen}
    assert len(shapes) > 20
    for piece in seen:
        h, w = piece.shape[-2:]
        assert 0.05 < h * w / (18 * 26) <= 1 and 0.6 < w / h < 1.7
        assert any(torch.equal(image[..., i : i + h, j : j + w], piece) for i in range(19 - h) for j in range(27 - w))


def test_draws_of_jitter_stay_in_range_and_differ(image):
    made = [t.color_jitter(image, t.Draw(seed)) for seed in range(8)]
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in made)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(made))
    assert torch.equal(t.color_jitter(image, t.Draw(3)), made[3])


def test_packed_patches_are_changed_as_the_image_they_are(models):
    """A flip of Qwen-VL's patches, pixel by pixel: tokens of 2 x 2 patches in rows, channels, frames, rows, columns."""
    model = models["qwen2_5_vl"]
    inputs = make_inputs("qwen2_5_vl", [1, 2])
    call = Call(model, family_of(model), inputs)
    new = changed(call, lambda x: x.flip(-1), "test")
    start = 0

    def at(h, w, y, x, c, frame):
        (i, u), (j, v) = divmod(y, 4), divmod(x, 4)
        token, inside = (i // 2) * (w // 2) + j // 2, (i % 2) * 2 + j % 2
        return start + token * 4 + inside, ((c * 2 + frame) * 4 + u) * 4 + v

    for h, w in GRIDS:
        for y in range(0, 4 * h, 3):
            for x in range(0, 4 * w, 5):
                for c, frame in ((0, 0), (1, 1), (2, 0)):
                    assert new[at(h, w, y, x, c, frame)] == inputs["pixel_values"][at(h, w, y, 4 * w - 1 - x, c, frame)]
        start += h * w


def test_each_image_has_its_own_draw_whatever_is_beside_it(family, model):
    spec = vlm_fix.parse_spec("ritual:mean=0|0|0,std=1|1|1")
    batch, call = make_inputs(family, [1, 2, 1]), None
    for row in range(3):
        inputs = single(family, [1, 2, 1], row)
        call = Call(model, family_of(model), inputs)
        alone = spec.negative(call)["pixel_values"]
        together = spec.negative(Call(model, family_of(model), batch))["pixel_values"]
        sizes = [1] * 4 if family == "llava" else batch["image_grid_thw"].prod(-1).tolist()
        parts = together.split(sizes)
        assert torch.equal(alone, torch.cat(parts[[0, 1, 3][row] : [1, 3, 4][row]]))
    names = [spec.transforms[t.Draw(seed).below(6)] for seed in range(60)]
    assert {*names} == {*t.TRANSFORMS}


def test_what_it_cannot_know_is_said(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "ritual"), pytest.raises(vlm_fix.VlmFixError, match="give mean= and std="):
        greedy(model, inputs, 1)
    with vlm_fix.wrapped(model, "ritual:transforms=horizontal_flip|blur|crop|vertical_flip"):
        greedy(model, inputs, 1)
    for bad, says in (("transforms=flip", "must be some of"), ("mean=0.5", "one number for each")):
        with pytest.raises(vlm_fix.VlmFixError, match=says):
            vlm_fix.wrap(model, f"ritual:{bad}")
