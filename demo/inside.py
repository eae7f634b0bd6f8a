"""What the Look inside tab shows, without its page: where in the image the model looks when it says a word.

The answer of a pane is fed once more (teacher forcing) through the model with the pane's methods, and once without any:
`vlm_fix.observe` gives the attention of every answer token both times. A word's row is the mean over its tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import vlm_fix
from vlm_fix import Contrast, Observation
from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import generation, runner
from vlm_fix.families.table import family_of
from vlm_fix.wing import engine_of

from .compare import Pane
from .models import Loaded

SIDE = 420  # pixels of the longer side of a drawing


@dataclasses.dataclass(frozen=True)
class Word:
    """A piece of the answer, the answer tokens that it is made of, and what CHAIR says of it."""

    text: str
    rows: tuple[int, ...]
    label: str | None = None  # grounded, hallucinated
    node: str = ""


@dataclasses.dataclass
class View:
    """An answer looked into. `base` is the same answer seen by the model without methods; None for the baseline."""

    pane: Pane
    words: list[Word]
    picture: Image.Image  # what the model sees of the image
    tile: int  # which of the observation's images that is
    seen: Observation
    base: Observation | None
    others: list[tuple[str, str, Image.Image]]  # further images: title, what it is, picture
    note: str = ""  # why `seen` is the model without methods, or has no `base`, if so
    found: vlm_fix.Inspection | None = None  # once it was asked for, see `inspect`
    names: dict[int, str] = dataclasses.field(default_factory=dict)  # the text of each token in `found`

    @property
    def first(self) -> int:
        """The word to begin with: the first hallucinated one, else the first object, else the first."""
        for label in ("hallucinated", "grounded"):
            for i, word in enumerate(self.words):
                if word.label == label:
                    return i
        return 0

    def heatmap(self, word: int, layer: int | None, head: int | None, what: str = "raw") -> torch.Tensor:
        """[h, w] of the whole image: "raw", "masked" (sink columns 0), or "change" (method minus baseline)."""
        layers, heads = (None if x is None else [x] for x in (layer, head))

        def mean(seen: Observation) -> torch.Tensor:
            rows = self.words[word].rows
            maps = [seen.heatmap(row, layers, heads, sinks=what != "masked", image=self.tile) for row in rows]
            return torch.stack(maps).mean(0)

        if what != "change":
            return mean(self.seen)
        if self.base is None:
            raise VlmFixError("The baseline's answer has no method to hold against it: choose a method's answer.")
        return mean(self.seen) - mean(self.base)

    def mass(self, word: int, layer: int | None = None, head: int | None = None) -> torch.Tensor:
        """[layers, heads] share of attention on the image; [1, heads], [layers, 1] or [1, 1] of one of them."""
        share = self.seen.visual_mass[:, :, list(self.words[word].rows)].mean(-1)
        share = share if layer is None else share[layer : layer + 1]
        return share if head is None else share[:, head : head + 1]

    def sinks(self, layer: int | None) -> torch.Tensor:
        """[h, w] bool: patches whose token is a sink, in that layer or in any."""
        marked = self.seen.image_sinks.any(0) if layer is None else self.seen.image_sinks[layer]
        return self._patches(marked)

    def dropped(self, layer: int | None) -> torch.Tensor | None:
        """[h, w] bool: patches that a pruner dropped before a layer (None: the last one); None if there is none."""
        return None if self.seen.kept.all() else self._patches(~self.seen.kept[-1 if layer is None else layer])

    def rolled(self, word: int) -> torch.Tensor:
        """[h, w] attention rollout of a word on the image."""
        assert self.found is not None and self.found.rollout is not None
        return self._on_image(self.found, self.found.rollout, word)

    def salient(self, word: int) -> torch.Tensor:
        """[h, w] saliency of a word on the image, summed over layers."""
        assert self.found is not None and self.found.saliency is not None
        return self._on_image(self.found, self.found.saliency.sum(dim=0), word)

    def _on_image(self, found: vlm_fix.Inspection, rows: torch.Tensor, word: int) -> torch.Tensor:
        """[h, w] of [n, columns], the mean over a word's tokens."""
        cells = self.seen.cells[self.tile]
        mine = [row for row in self.words[word].rows if row < len(rows)]
        of_image = rows[mine].mean(dim=0)[found.visual]
        return of_image[cells.clamp(min=0)] * (cells >= 0)

    def _patches(self, tokens: torch.Tensor) -> torch.Tensor:
        cells = self.seen.cells[self.tile]
        return tokens[cells.clamp(min=0)] & (cells >= 0)


def look(loaded: Loaded, image: Image.Image, prompt: str, pane: Pane) -> View:
    """Feed the pane's answer once more and observe it. Raises VlmFixError for an answer that cannot be looked into."""
    if pane.state != "done" or not pane.ids:
        raise VlmFixError("This answer was not finished: compare again and let it end.")
    plain = pane.stack == runner.BASELINE
    with loaded.turn:
        model, processor = loaded.model, loaded.processor
        inputs = dict(generation.encode(model, processor, [image], [prompt]))
        base = vlm_fix.observe(model, inputs, pane.ids)
        others: list[tuple[str, str, Image.Image]] = []
        seen, note, changed, procedures = base, "", dict[str, Any](), None
        if not plain:
            with vlm_fix.wrapped(model, pane.stack):
                engine = engine_of(model)
                call = Call(model, engine.family, dict(inputs))
                procedures = engine.wing(ProcedureWing)
                changed = procedures.refine(call) if procedures else {}
                others = _other_branches(processor, call)
                try:
                    seen = vlm_fix.observe(model, inputs, pane.ids)
                except VlmFixError as error:
                    note, changed = f"This is the model without methods: {error}", {}
        inputs.update(changed)
        pictures, tile, cells, second = [image], 0, family_of(model).cells, "input_ids" in changed
        if cells in ("pixels", "tiles"):  # cropped, perhaps, or cut up with the whole at the end: show what was left
            tile = 0 if second else -1
            pictures = unpixel(processor, inputs["pixel_values"].flatten(0, -4))
        elif changed:
            pictures = unpatch(processor, inputs["pixel_values"], inputs["image_grid_thw"])
        name = procedures.refiners[0].name if changed and procedures else ""
        if second:
            others.append((f"{name}: a second image", "the model sees it after the image", pictures[1]))
        elif changed:
            others.append((f"Before {name}", "the image as it was given", image))
            note = f"{name} shows the model another image, whose patches are not those of the baseline's."
    before = None if plain or note else base
    return View(pane, words(processor.tokenizer, pane), pictures[tile], tile, seen, before, others, note)


def inspect(loaded: Loaded, image: Image.Image, prompt: str, view: View) -> None:
    """Fill in `found`: what `vlm-fix inspect` has of this answer, with the pane's methods on the model.

    Raises VlmFixError for a stack that cannot be inspected, such as one with a pruner.
    """
    if view.found is not None:
        return
    stack, tokenizer = view.pane.stack, loaded.processor.tokenizer
    ends = loaded.model.generation_config.eos_token_id
    said = [token for token in view.pane.ids if token not in (ends if isinstance(ends, list) else [ends])]
    with loaded.turn:
        inputs = dict(generation.encode(loaded.model, loaded.processor, [image], [prompt]))
        plain = stack == runner.BASELINE
        with contextlib.nullcontext() if plain else vlm_fix.wrapped(loaded.model, stack):
            found = vlm_fix.inspect(loaded.model, inputs, said)
    view.names = {i: tokenizer.decode([i]) for i in {*found.ids.tolist(), *found.lens_tokens.flatten().tolist()}}
    view.found = found


def words(tokenizer: Any, pane: Pane) -> list[Word]:
    """The answer in words, each with the tokens it is made of; an object of two words is one."""
    ends = [len(tokenizer.decode(pane.ids[: i + 1], skip_special_tokens=True)) for i in range(len(pane.ids))]
    text = tokenizer.decode(pane.ids, skip_special_tokens=True)
    made, at = [], 0
    for piece, label, node in dataclasses.replace(pane, text=text).words():
        start, at = at, at + len(piece)
        if piece.strip():
            rows = [i for i, end in enumerate(ends) if end > start and (ends[i - 1] if i else 0) < at]
            made.append(Word(piece, tuple(rows), label, node))
    return made


def unpixel(processor: Any, pixels: torch.Tensor) -> list[Image.Image]:
    """Normalised pixels [n, 3, H, W] -> images."""
    how = processor.image_processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (how.image_mean, how.image_std))
    values = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(value.permute(1, 2, 0).numpy()) for value in values]


def unpatch(processor: Any, pixels: torch.Tensor, grid: torch.Tensor) -> list[Image.Image]:
    """Qwen-VL's flattened patches [sum thw, 3 * T * P * P] with grid [n, 3] -> the first frame of each image."""
    how, made = processor.image_processor, list[Image.Image]()
    m, frames, size = how.merge_size, how.temporal_patch_size, how.patch_size
    for part, (t, h, w) in zip(pixels.split(grid.prod(-1).tolist()), grid.tolist(), strict=True):
        x = part.view(t, h // m, w // m, m, m, 3, frames, size, size)[0, ..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6)
        made += unpixel(processor, x.reshape(1, 3, h * size, w * size))
    return made


def _other_branches(processor: Any, call: Call) -> list[tuple[str, str, Image.Image]]:
    """Pictures of the pixels that a contrast on the model gives its other branches, if they are not the prompt's."""
    inputs, made = call.inputs, list[tuple[str, str, Image.Image]]()
    for method in engine_of(call.model).active:
        if not isinstance(method, Contrast) or not method.contrasts:
            continue
        for name, branch in method.branches(call).items():
            pixels, grid = branch.inputs.get("pixel_values"), inputs.get("image_grid_thw")
            if pixels is None or torch.equal(pixels, inputs["pixel_values"]):
                continue
            drawn = unpixel(processor, pixels) if grid is None else unpatch(processor, pixels, grid)
            made.append((f"{method.name}: what its {name} branch sees", "the answer is held against it", drawn[0]))
    return made


# ------------------------------------------------------------------------------------------------------------ drawings


def canvas(picture: Image.Image) -> Image.Image:
    """The picture at the size of a drawing."""
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def overlay(
    picture: Image.Image, heat: torch.Tensor, peak: float, signed: bool = False, sinks: torch.Tensor | None = None
) -> Image.Image:
    """The picture, dimmed, under a heatmap [h, w]; `peak` gets the full colour. Signed: red is more, blue less."""
    from matplotlib import colormaps

    under = canvas(picture)
    grown = Image.fromarray(heat.float().numpy()).resize(under.size, Image.Resampling.BICUBIC)
    strength = np.asarray(grown) / (peak or 1.0)
    if signed:
        colour, alpha = colormaps["RdBu_r"](strength / 2 + 0.5), np.abs(strength)
    else:
        colour, alpha = colormaps["inferno"](0.25 + 0.75 * strength), strength
    alpha = np.clip((alpha - 0.06) / 0.94, 0, 1)[..., None] ** 0.75 * 0.9
    dim = np.asarray(Image.blend(under.convert("L").convert("RGB"), under, 0.3)) * 0.62
    drawn = Image.fromarray((dim * (1 - alpha) + 255 * colour[..., :3] * alpha).clip(0, 255).astype(np.uint8))
    if sinks is not None:
        pen = ImageDraw.Draw(drawn)
        high, wide = drawn.height / sinks.shape[0], drawn.width / sinks.shape[1]
        for y, x in sinks.nonzero().tolist():
            ring = 0.38 * min(high, wide)
            centre = ((x + 0.5) * wide, (y + 0.5) * high)
            box = [centre[0] - ring, centre[1] - ring, centre[0] + ring, centre[1] + ring]
            pen.ellipse(box, outline="white", width=3)
    return drawn


def pruned(picture: Image.Image, dropped: torch.Tensor) -> Image.Image:
    """The picture with the dropped patches [h, w] darkened and the kept ones framed."""
    drawn = canvas(picture)
    dark = Image.blend(drawn.convert("L").convert("RGB"), Image.new("RGB", drawn.size, (20, 24, 34)), 0.78)
    rows, columns = dropped.shape
    kept = []
    for y in range(rows):
        for x in range(columns):
            left, right = (math.floor(i * drawn.width / columns) for i in (x, x + 1))
            top, bottom = (math.floor(i * drawn.height / rows) for i in (y, y + 1))
            if dropped[y, x]:
                drawn.paste(dark.crop((left, top, right, bottom)), (left, top))
            else:
                kept.append((left, top, right - 1, bottom - 1))
    pen = ImageDraw.Draw(drawn)
    for box in kept:
        pen.rectangle(box, outline="#34d399", width=2)
    return drawn
