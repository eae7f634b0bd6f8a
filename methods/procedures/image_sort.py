"""Attention Sorting and AttnRank for images: the images of a prompt are put in an order by the attention they get."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch

from vlm_fix import Layers, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.kinds import Refiner
from vlm_fix.method import with_weights
from vlm_fix.methods.contrast.iava import Looking
from vlm_fix.wing import engine_of

from .pictures import image_blocks, in_order

MOST = 4  # images of one prompt of which all orders are tried: 24 forwards


@dataclass(frozen=True)
class ImageSort(Refiner):
    """Puts the images of a prompt where the model looks, the one it looks at most at the best place.

    With A [layers, H, K] the weights of the prompt's last row, s_m = mean_l mean_h sum_{j of image m} A_lhj (or per token of
    the image). Attention Sorting: the images are sorted by s, the highest last, right before the question, `rounds` times.
    AttnRank: the first and the last place are the basin that models look at, so that the highest is last, the next first, and so
    on inwards (toward="ends").

    orders="all", the default here: s_m is the mean over all orders of the images, so that it does not depend on the order
    they came in, nor then does the answer; n! forwards for n images, up to 4. orders="given", the papers': one forward a
    round, in the order there is.

    Source: arXiv 2310.01427 (Attention Sorting), 2508.05128 (AttnRank); official codes not read. Deviations: these are
    documents in both papers. AttnRank measures a model's places on a calibration set; here they are the two ends it found.
    Text between the images stays where it is, so that a prompt should not number them ("the second image"). Ties keep the
    order there is.
    """

    name: ClassVar[str] = "image_sort"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.01427"
    needs_image: ClassVar[bool] = True

    orders: str = param("all", "orders over which attention is averaged", choices=("all", "given"))
    rounds: int = param(1, "sorts, each by the attention after the last; 0: none", low=0)
    toward: str = param(
        "end", "where most attention goes: the last place, or the last and the first", choices=("end", "ends")
    )
    per: str = param("image", "attention of a whole image, or per token of it", choices=("image", "token"))
    layers: Layers = param(None, "layers whose attention is read")

    def resolve(self, arch: Arch) -> ImageSort:
        method: Any = super().resolve(arch)
        return method.but(layers=with_weights(self.name, method.layers, arch))

    @property
    def neutral(self) -> bool:
        return self.rounds == 0

    def refine(self, call: Call) -> dict[str, Any]:
        if call.inputs.get("pixel_values") is None or call.family.cells not in ("pixels", "grid_thw"):
            raise VlmFixError(
                f"image_sort needs pixel_values of whole images, as llava gets them, no tiles or videos ({call.family.name})."
            )
        blocks = image_blocks(call)
        most = max(map(len, blocks))
        if most < 2:
            engine_of(call.model).warn_once([self], "no prompt of it holds several images.")
            return {}
        if most > MOST and self.orders == "all":
            raise VlmFixError(
                f"image_sort tries every order of up to {MOST} images, and a prompt holds {most}: use orders=given, whose "
                "result depends on the order they come in."
            )
        found = [tuple(range(len(row))) for row in blocks]
        for _ in range(self.rounds if self.orders == "given" else 1):
            tried = [list(permutations(o)) if self.orders == "all" else [o] for o in found]
            totals = [[0.0] * len(row) for row in blocks]
            for i in range(max(map(len, tried))):
                now = [row[i % len(row)] for row in tried]
                for row, (scores, order) in enumerate(zip(self.scores(call, blocks, now), now, strict=True)):
                    if i < len(tried[row]):
                        for image, score in zip(order, scores, strict=True):
                            totals[row][image] += score / len(tried[row])
            found = [self.sorted(order, total) for order, total in zip(found, totals, strict=True)]
        if all(list(order) == sorted(order) for order in found):
            engine_of(call.model).warn_once([self], "the images of each prompt stand in that order already.")
            return {}
        return in_order(call, blocks, found)

    def scores(self, call: Call, blocks: Any, orders: list[tuple[int, ...]]) -> list[list[float]]:
        """Per row, s of its images in these orders, place by place."""
        assert isinstance(self.layers, tuple)
        engine, looking, inputs = engine_of(call.model), Looking(), in_order(call, blocks, orders)
        looking.last = max(self.layers)
        engine.run_prompt(inputs, looking)
        a = torch.stack([looking.seen[i] for i in self.layers]).double().mean(dim=0)
        found = []
        for i, row in enumerate(image_blocks(Call(call.model, call.family, inputs))):
            shown = [a[i, first:last][looking.visual[i, first:last]] for first, last in row]
            found.append([float(x.sum() if self.per == "image" else x.mean()) for x in shown])
        return found

    def sorted(self, order: tuple[int, ...], totals: list[float]) -> tuple[int, ...]:
        """The images, of these totals, place by place."""
        rising = sorted(order, key=lambda image: totals[image])
        if self.toward == "end":
            return tuple(rising)
        inward, places = rising[::-1], [0] * len(rising)
        for rank, image in enumerate(inward):
            places[-1 - rank // 2 if rank % 2 == 0 else rank // 2] = image
        return tuple(places)
