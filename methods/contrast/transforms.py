"""Random changes of an image that leave what it shows recognisable, as torchvision.transforms.v2 defines them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import conv2d, grid_sample, interpolate, pad

GREY = (0.2989, 0.587, 0.114)


class Draw:
    """Uniform numbers from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def order(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator).tolist()

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))


def horizontal_flip(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    return x.flip(-1)


def vertical_flip(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    return x.flip(-2)


def rotation(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """By up to half a turn either way; what was outside is black."""
    return rotated(x, draw.between(-180, 180))


def color_jitter(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Brightness, contrast and saturation times U(0, 2), hue + U(-.5, .5), in a random order."""
    factors = [draw.between(0, 2), draw.between(0, 2), draw.between(0, 2), draw.between(-0.5, 0.5)]
    for i in draw.order(4):
        x = (brighter, contrasted, saturated, recoloured)[i](x, factors[i])
    return x


def blur(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """A Gaussian of U(1.5, 2) pixels, over 13."""
    return blurred(x, draw.between(1.5, 2.0))


def crop(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    """A piece of U(.08, 1) of the area and 3:4 to 4:3, at the image's size."""
    h, w = x.shape[-2:]
    for _ in range(10):
        area, ratio = h * w * draw.between(0.08, 1), math.exp(draw.between(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            top, left = draw.below(h - height + 1), draw.below(w - width + 1)
            break
    else:
        width, height, top, left = w, h, 0, 0
    piece = x[..., top : top + height, left : left + width]
    return interpolate(piece, (h, w), mode="bilinear", antialias=True, align_corners=False)


TRANSFORMS: dict[str, Callable[[torch.Tensor, Draw], torch.Tensor]] = {
    f.__name__: f for f in (horizontal_flip, vertical_flip, rotation, color_jitter, blur, crop)
}
COLOURS = ("rotation", "color_jitter")  # those that have to know black and white


def rotated(x: torch.Tensor, degrees: float) -> torch.Tensor:
    """[T, C, H, W] turned counter-clockwise about the centre, to the nearest pixel; 0 outside."""
    (h, w), angle = x.shape[-2:], math.radians(degrees)
    sin, cos = math.sin(angle), math.cos(angle)
    ys, xs = torch.arange(h).double() - (h - 1) / 2, torch.arange(w).double() - (w - 1) / 2
    sx, sy = cos * xs[None] - sin * ys[:, None], sin * xs[None] + cos * ys[:, None]
    grid = torch.stack([sx * 2 / w, sy * 2 / h], dim=-1).expand(len(x), -1, -1, -1)
    return grid_sample(x.double(), grid, mode="nearest", align_corners=False).to(x)


def blurred(x: torch.Tensor, sigma: float, size: int = 13) -> torch.Tensor:
    """[T, C, H, W], mirrored at its edges."""
    at = torch.arange(size) - (size - 1) / 2
    weights = torch.exp(-0.5 * (at / sigma).square())
    weights, side = weights / weights.sum(), size // 2
    y = pad(x, (side,) * 4, mode="reflect").flatten(0, 1)[:, None]
    y = conv2d(conv2d(y, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return y.view_as(x)


def grey(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor(GREY)[:, None, None]).sum(dim=-3, keepdim=True)


def brighter(x: torch.Tensor, factor: float) -> torch.Tensor:
    return (factor * x).clamp(0, 1)


def contrasted(x: torch.Tensor, factor: float) -> torch.Tensor:
    return (factor * x + (1 - factor) * grey(x).mean(dim=(-3, -2, -1), keepdim=True)).clamp(0, 1)


def saturated(x: torch.Tensor, factor: float) -> torch.Tensor:
    return (factor * x + (1 - factor) * grey(x)).clamp(0, 1)


def recoloured(x: torch.Tensor, shift: float) -> torch.Tensor:
    """[T, 3, H, W] in 0 to 1, its hues moved by a share of the circle."""
    (r, g, b), top, low = x.unbind(dim=-3), x.amax(dim=-3), x.amin(dim=-3)
    span = top - low
    safe = torch.where(span == 0, 1.0, span)
    red, green = top == r, (top == g) & (top != r)
    hue = torch.where(red, (g - b) / safe, torch.where(green, 2 + (b - r) / safe, 4 + (r - g) / safe)) / 6
    hue = (hue + shift) % 1
    places = torch.tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (places + 6 * hue[..., None, :, :]) % 6
    return (top[..., None, :, :] - span[..., None, :, :] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)
