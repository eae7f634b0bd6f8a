"""IAVA, instruction-aligned visual attention (Li et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, param
from vlm_fix.call import Call
from vlm_fix.decoding.branch import Branch
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import Negative
from vlm_fix.families import image_token_ids
from vlm_fix.packing import by_token
from vlm_fix.recorder import Recorder
from vlm_fix.session import Session
from vlm_fix.wing import engine_of

from .icd import line_tokens


@dataclass(frozen=True)
class IAVA(Contrast):
    """Contrasts with the image tokens that draw attention whatever is asked.

    g_j and u_j: weight of image token j, in the row that predicts the first new token, under a general instruction and
    under the user's; mean over heads and over the layers that hold `coverage` of the image attention. Irrelevant are
    tokens with g > mean + high std and g - u > mean + drop std. The second branch sees only their embeddings, the other
    image tokens' are 0. z = (1 + alpha) log p - alpha log p', tokens with p < beta max p cut off.

    Source: arXiv 2503.18556; its repository has no code. What the paper leaves open is a parameter, and follows AvisC
    (arXiv 2405.17820) where that is its nearest open relative: choice of layers, embeddings set to 0, tokens chosen once.
    Here the general instruction stands on a line of its own right after the (last) image and ends that prompt, so that it
    does not depend on the chat template; several images are judged together. Text-only prompts stay as they are.
    """

    name: ClassVar[str] = "iava"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.18556"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    high: float = param(1.0, "standard deviations above the mean that make an attention high")
    drop: float = param(0.0, "standard deviations above the mean that make a loss of attention large")
    coverage: float = param(0.5, "share of the image attention that the layers used hold", low=0, high=1)
    prompt: str = param("Describe the content of the image.", "the general instruction")
    tokens: tuple[int, ...] | None = param(None, "its token ids, instead of `prompt`", of="token ids")

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def branches(self, call: Call) -> dict[str, Negative]:
        tokens = self.tokens or line_tokens(call.model, self.prompt, self.name)
        general, user = (
            attention_to_images(call, inputs, self.name) for inputs in (instructed(call, tokens), call.inputs)
        )
        kept = torch.cat([self.irrelevant(g, u) for g, u in zip(general, user, strict=True)])
        return {"negative": Negative(call.inputs, lambda x: x * kept[:, None].to(x))}

    def irrelevant(self, general: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
        """Head means [layers, n] of one prompt's n image tokens under both instructions -> [n] True for irrelevant ones."""
        if not general.shape[1]:
            return general[0].bool()
        layers = looking(general, self.coverage)
        g, u = general[layers].mean(dim=0), user[layers].mean(dim=0)
        return above(g, self.high) & above(g - u, self.drop)

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)


def above(x: torch.Tensor, count: float) -> torch.Tensor:
    """[n] -> True where x > mean + count std (of the population)."""
    return x > x.mean() + count * x.std(correction=0)


def looking(weights: torch.Tensor, coverage: float) -> torch.Tensor:
    """Weights [layers, n] on image tokens -> indices of the fewest layers that hold `coverage` of their sum."""
    share = weights.sum(dim=1) / weights.sum()
    order = share.argsort(descending=True, stable=True)
    before = share[order].cumsum(dim=0) - share[order]
    return order[(before < coverage) | (before == 0)]


def instructed(call: Call, tokens: tuple[int, ...]) -> dict[str, Any]:
    """The call's inputs with everything after the last image (and its end marker) replaced by `tokens`, left-padded."""
    ids, mask, config = call.inputs["input_ids"], call.inputs["attention_mask"], call.model.config
    images = torch.isin(ids, torch.tensor(image_token_ids(call.model, call.family), device=ids.device))
    inputs = dict(call.inputs)
    for name in by_token(inputs):
        values, rows = {"input_ids": tokens, "attention_mask": (1,) * len(tokens)}, []
        for row, token, seen, shown in zip(inputs[name], ids, mask.bool(), images, strict=True):
            where = shown.nonzero()
            at = int(where[-1]) + 1 if len(where) else len(row)
            if at < len(row) and token[at] == getattr(config, "vision_end_token_id", -1):
                at += 1
            end = row.new_tensor(values.get(name, (0,) * len(tokens)) if len(where) else ())
            rows.append(torch.cat([row[:at][seen[:at]], end]))
        width = max(map(len, rows))
        inputs[name] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return inputs


class Looking(Recorder):
    """Records of the last row: its head-mean weights on the image columns, [B, K] by layer."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}
        self.visual = torch.empty(0)

    def first_row(self, session: Session) -> int:
        return session.length - 1

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        width = session.types.shape[1]  # the columns that a sliding window has left behind have no weight
        seen = torch.nn.functional.pad(weights[:, :, -1], (width - weights.shape[-1], 0))
        self.seen[layer] = seen.mean(dim=1).float().cpu()
        self.visual = session.masks(width, weights.device)["visual"][:, 0, 0].cpu()


def attention_to_images(call: Call, inputs: dict[str, Any], name: str) -> list[torch.Tensor]:
    """Per prompt [layers, n]: the last row's head-mean weights on its n image tokens; what the main branch knows is reused.

    VlmFixError, of the method `name`, where the model's image columns are not known.
    """
    engine, looking = engine_of(call.model), Looking()
    engine.need_image_columns([name])
    with engine.recording(looking):
        Branch(engine, call, "instruction", Negative(inputs)).prefill()
    weights = torch.stack([looking.seen[i] for i in sorted(looking.seen)])
    return [weights[:, i, columns] for i, columns in enumerate(looking.visual)]
