"""SPARC, its training-free stages: first find the regions a question is about, then answer with these enlarged (2026)."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import VlmFixError, param
from vlm_fix.call import Call
from vlm_fix.decoding.branch import Branch
from vlm_fix.decoding.kinds import Negative, Refiner
from vlm_fix.decoding.step import fingerprints
from vlm_fix.methods.contrast.icd import after_image
from vlm_fix.pruning.shrink import resize
from vlm_fix.wing import engine_of

from .boxes import Box, fused, text_of, tokenized, written
from .pictures import apart, with_images_after
from .pixels import images_of, zoomed

ASK = (
    "Do not answer yet. Which regions of the image are needed to answer? Reply with their boxes alone, as "
    "[[left, top, right, bottom], ...]."
)
SCALES = {"qwen2_5_vl": "pixels", "qwen3_vl": "thousandths"}


@dataclass(frozen=True)
class SPARC(Refiner):
    """Asks for the regions that matter, at low resolution and several times, and answers with these enlarged beside the image.

    Perception: `samples` answers of up to `tokens` tokens, drawn at `temperature`, to the prompt with the instruction as a
    line after its image; the image is reduced by `low` for them. Their boxes are joined by weighted box fusion: a box joins
    the cluster whose mean it overlaps most, by more than `overlap` (IoU); a cluster of T boxes has confidence min(T, n) / n
    of n answers. The `regions` surest with at least `agree` remain. Reasoning: the prompt as it was, with each region,
    `margin` of its sides wider and enlarged (bicubic) to the image's size, right after the image.

    Source: arXiv 2602.06566 (no official code was found; the trained perception stage is not here). The paper's prompt and
    its numbers are not public in full: all are parameters with this file's choice. Deviations: a region is cut out of what
    the image processor gave, so that a model gains from it as far as that is larger than the model can tell apart: raise
    the processor's limit. The reduced image has as many tokens as before. Of several images each is asked about without the
    others. Where the model names no region, the image stays alone, with one warning. Needs a model that writes boxes, as
    Qwen2.5-VL (in pixels) and Qwen3-VL (in thousandths) do; `coordinates` tells the unit of others.
    """

    name: ClassVar[str] = "sparc"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.06566"
    needs_image: ClassVar[bool] = True

    samples: int = param(4, "answers that are asked for regions", low=1)
    temperature: float = param(0.7, "at which they are drawn; 0: greedy", low=0)
    low: float = param(2.0, "factor by which the image's sides are reduced for them", low=1)
    overlap: float = param(0.5, "IoU from which boxes are one", low=0, high=1)
    agree: float = param(0.5, "share of the answers that must name a region", low=0, high=1)
    regions: int = param(2, "most regions shown; 0: none", low=0)
    margin: float = param(0.1, "added to each side of a region, as a share of it", low=0)
    tokens: int = param(64, "most tokens of an answer", low=1)
    coordinates: str | None = param(None, "unit of boxes", choices=("pixels", "thousandths", "shares"))
    prompt: str = param(ASK, "the instruction")
    boxes: tuple[float, ...] | None = param(None, "regions as left|top|right|bottom|... in shares, instead of asking")
    seed: int = param(0, "seed of the draws", low=0, high=2**32 - 1)

    @property
    def neutral(self) -> bool:
        return self.regions == 0

    def refine(self, call: Call) -> dict[str, Any]:
        images, kind = images_of(call, self.name), call.model.config.model_type
        if self.boxes is None:
            said = self.answers(call, images)
            regions = [self.chosen(texts, x, kind) for texts, (x, _) in zip(said, images, strict=True)]
        else:
            regions = [self.given_boxes() for _ in images]
        if blind := sum(not r for r in regions):
            what = f"shows the whole image alone for {blind} of {len(images)} images"
            engine_of(call.model).warn_once([self], "the model named no region that enough answers agree on.", what)
        crops = [
            [pack(zoomed(x, *self.pixels(x, box))) for box in boxes]
            for (x, pack), boxes in zip(images, regions, strict=True)
        ]
        return with_images_after(call, crops) if any(regions) else {}

    def given_boxes(self) -> list[Box]:
        """The regions that the user gave."""
        boxes = self.boxes or ()
        found = [(boxes[i], boxes[i + 1], boxes[i + 2], boxes[i + 3]) for i in range(0, len(boxes) - 3, 4)]
        if not found or len(boxes) % 4 or not all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in found):
            raise VlmFixError(
                f"sparc: boxes={'|'.join(map(str, boxes))} must be left|top|right|bottom|... in shares of the image."
            )
        return found[: self.regions]

    def answers(self, call: Call, images: Any) -> list[list[str]]:
        """The texts of the `samples` answers about each image."""
        tokens = tokenized(call.model, self.prompt)
        call = Call(call.model, call.family, apart(call))
        asked = after_image(call, tokens)
        small = [pack(reduced(x, self.low)) for x, pack in images]
        engine = engine_of(call.model)
        branch = Branch(engine, call, "look", Negative({**asked, "pixel_values": torch.cat(small)}))
        count = self.samples if self.temperature else 1
        seeds = [zlib.crc32(f"{self.seed},{p},{i}".encode()) for p in fingerprints(call) for i in range(count)]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        eos = call.model.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, dtype=torch.long).flatten()
        answer = asked["input_ids"].new_zeros(len(draws), 0)
        alive = torch.ones(len(draws), dtype=torch.bool)
        while answer.shape[1] < self.tokens and alive.any():
            z = branch.logits(answer).float().cpu()
            p = (z / self.temperature).softmax(dim=-1) if self.temperature else None
            new = (
                z.argmax(dim=-1)
                if p is None
                else torch.cat([x.multinomial(1, generator=g) for x, g in zip(p, draws, strict=True)])
            )
            alive &= ~torch.isin(new, ends)
            answer = torch.cat([answer, new[:, None].to(answer.device)], dim=1)
        texts = [text_of(call.model, row[~torch.isin(row.cpu(), ends)]) for row in answer]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def chosen(self, texts: list[str], image: torch.Tensor, kind: str) -> list[Box]:
        """The regions of one image that enough answers name, the surest first."""
        unit = (
            self.coordinates
            or SCALES.get(kind)
            or ("shares" if not re.search(r"\d{2}", "".join(texts)) else "thousandths")
        )
        scale = {"pixels": (image.shape[2], image.shape[1]), "thousandths": (1000, 1000), "shares": (1, 1)}[unit]
        found = fused([written(text, scale) for text in texts], self.overlap)
        return [box for sure, box in found if sure >= self.agree][: self.regions]

    def pixels(self, image: torch.Tensor, box: Box) -> tuple[int, int, int, int]:
        """A region with its margin, in pixels of an image [C, H, W]."""
        (x0, y0, x1, y1), (h, w) = box, image.shape[1:]
        dx, dy = self.margin * (x1 - x0), self.margin * (y1 - y0)
        left, top = math.floor(max(x0 - dx, 0) * w), math.floor(max(y0 - dy, 0) * h)
        return left, top, math.ceil(min(x1 + dx, 1) * w), math.ceil(min(y1 + dy, 1) * h)


def reduced(image: torch.Tensor, factor: float) -> torch.Tensor:
    """An image [C, H, W] with the detail of one whose sides are `factor` times smaller."""
    h, w = (max(1, round(side / factor)) for side in image.shape[1:])
    return resize(resize(image[None], (h, w)), (image.shape[1], image.shape[2]))[0]
