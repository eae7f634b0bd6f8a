"""CARVE, contrastive attention refinement for visual enhancement (Ge et al., 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import interpolate

from vlm_fix import Layers, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.branch import Branch
from vlm_fix.decoding.kinds import Negative, Refiner
from vlm_fix.method import Method, with_weights
from vlm_fix.methods.contrast.iava import Looking, instructed
from vlm_fix.methods.contrast.icd import line_tokens
from vlm_fix.wing import engine_of

from .pictures import with_images_after
from .pixels import cells_of, images_of, labelled, normalisation, zoomed


@dataclass(frozen=True)
class CARVE(Refiner):
    """Shows the model only what the question makes it look at, cropped and enlarged.

    A_Q, A_G [V]: head-mean weights on the V tokens of an image, in the row that predicts token t of a greedy answer to the
    question and to a general instruction. C = A_Q / (A_G + 1e-8), S = sum_t (t + 1) sum_l C over `layers` and the first
    `steps` tokens of both, bilinear to pixels [H, W]. Of the `top` share of pixels in S, the connected regions (8
    neighbours) with the largest sums of S stay, max(`regions`, floor(`share` n)) of n; other pixels turn black; the box
    around what stays is enlarged (bicubic) to [H, W] and takes the image's place, or with images="both" comes right after it.

    Source: arXiv 2509.06461, crop alone; official code (the repository at commit a1f0442 that the paper links), both
    images (layers 20-25 of 32, scaled here to the depth). Deviations: the size of what the image processor gave stays: a
    crop of another shape is stretched. The general instruction stands on a line of its own right after the (last) image
    and ends that prompt, apart from the chat template. Each image has a map of its own. The default of `steps` and the 8
    neighbours are this file's choice. top = 1 leaves the prompt alone.
    """

    name: ClassVar[str] = "carve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.06461"
    needs_image: ClassVar[bool] = True

    images: str = param("crop", "what the model gets: the crop alone, or the image and it", choices=("crop", "both"))
    top: float = param(0.2, "share of the pixels that pass the threshold", low=0, high=1)
    regions: int = param(3, "least number of regions kept", low=1)
    share: float = param(0.2, "share of the regions kept, if that is more", low=0, high=1)
    steps: int = param(5, "tokens of the two short answers", low=1)
    prompt: str = param("Write a general description of the image.", "the general instruction")
    tokens: tuple[int, ...] | None = param(None, "its token ids, instead of `prompt`", of="token ids")
    black: tuple[float, ...] | None = param(None, "normalised black (-mean / std), else the checkpoint's")
    layers: Layers = param(None, "layers whose attention is read")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": tuple(sorted({min(round(i / 32 * arch.depth), arch.depth - 1) for i in range(20, 26)}))}

    def resolve(self, arch: Arch) -> Method:
        method: Any = super().resolve(arch)
        return dataclasses.replace(method, layers=with_weights(self.name, method.layers, arch))

    @property
    def neutral(self) -> bool:
        return self.top == 1

    def refine(self, call: Call) -> dict[str, Any]:
        images = images_of(call, self.name)
        black = torch.tensor(self.black or black_of(call.model.config.name_or_path)).to(call.inputs["pixel_values"])
        if len(black) != 3:
            raise VlmFixError(f"carve: black={self.black} must hold one number for each of the 3 channels.")
        crops = [pack(self.refined(x, s, black)) for (x, pack), s in zip(images, self.maps(call), strict=True)]
        return (
            {"pixel_values": torch.cat(crops)}
            if self.images == "crop"
            else with_images_after(call, [[c] for c in crops])
        )

    def maps(self, call: Call) -> list[torch.Tensor]:
        """S [h, w] of each image of the batch, in tokens, on the CPU."""
        tokens = self.tokens or line_tokens(call.model, self.prompt, self.name)
        question, general = (self.looks(call, inputs) for inputs in (call.inputs, instructed(call, tokens)))
        total = torch.zeros(question[0][0].shape[1])
        for t, ((q, q_goes_on), (g, g_goes_on)) in enumerate(zip(question, general, strict=True)):
            total += (t + 1) * (q / (g + 1e-8)).sum(dim=0) * (q_goes_on & g_goes_on)
        return [total[c] for c in cells_of(call)]

    def looks(self, call: Call, inputs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per token of a greedy answer: weights [layers, N] on the N image tokens of the batch, and [N] not yet ended."""
        assert isinstance(self.layers, tuple)
        engine = engine_of(call.model)
        ids, eos = inputs["input_ids"], call.model.generation_config.eos_token_id
        ends, seen = torch.tensor([] if eos is None else eos, dtype=torch.long, device=ids.device), []
        answer, alive = ids[:, :0], torch.ones(len(ids), dtype=torch.bool)
        looking, branch = Looking(), Branch(engine, call, "look", Negative(inputs))
        with engine.recording(looking):
            for _ in range(self.steps):
                new = branch.logits(answer).argmax(dim=-1, keepdim=True)
                a, visual = torch.stack([looking.seen[i] for i in self.layers]), looking.visual
                seen.append((a[:, visual], alive[visual.nonzero()[:, 0]]))
                alive = alive & ~torch.isin(new[:, 0], ends).cpu()
                answer = torch.cat([answer, new.to(ids.device)], dim=1)
        return seen

    def refined(self, image: torch.Tensor, s: torch.Tensor, black: torch.Tensor) -> torch.Tensor:
        """Image [C, H, W], or [C frames, H, W], by its map s [h, w] -> the same size; black [C]."""
        s = interpolate(s.double()[None, None], image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        regions = labelled(s >= s.flatten().topk(max(1, round(self.top * s.numel()))).values[-1])
        found = regions[regions > 0].unique()
        sums = torch.zeros(s.numel() + 1, dtype=s.dtype).index_add(0, regions.flatten(), s.flatten())
        best = found[sums[found].argsort(descending=True, stable=True)]
        kept = torch.isin(regions, best[: max(self.regions, int(self.share * len(found)))])
        if kept.all():
            return image
        y, x = (kept.any(dim=dim).nonzero()[:, 0].tolist() for dim in (1, 0))
        dark = black.repeat_interleave(len(image) // len(black))[:, None, None]
        return zoomed(torch.where(kept.to(image.device), image, dark), x[0], y[0], x[-1] + 1, y[-1] + 1)


def black_of(path: str) -> tuple[float, ...]:
    """Normalised black, -mean / std of each channel, by the image processor of a checkpoint."""
    found = normalisation(path)
    if found is None:
        raise VlmFixError(
            f"carve needs the model's image processor to know black, but {path!r} has none: load the model from its directory "
            "or hub name, or give -mean / std of each channel as carve:black=-1.79|-1.75|-1.48."
        )
    return tuple(-m / s for m, s in zip(*found, strict=True))
