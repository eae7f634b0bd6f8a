"""Models that are not in this process as a Hugging Face model: what `plan` and the runner read of one, and how it answers."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlm_fix.calibrated import Calibration, weights_id
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method
from vlm_fix.serving.settings import skeleton


@dataclasses.dataclass
class Batch:
    """The answers to one batch: text, number of new tokens and whether the end token came, and the seconds taken."""

    texts: list[str]
    tokens: list[int]
    finished: list[bool]
    seconds: float
    first_token: float | None
    ids: list[list[int]] = dataclasses.field(repr=False, default_factory=list)  # of the new tokens
    term: tuple[float, int] | None = None  # sum of squares and degrees of freedom of a contrast's `Term`
    yes_no: list[tuple[float, float]] | None = None  # p_yes, p_no as the first token, see `first.py`
    gated: tuple[int, int] | None = None  # its rows that a gate left as they are, of how many
    errors: list[str | None] = dataclasses.field(
        default_factory=list
    )  # of samples that failed among others; []: none did


class Gone(VlmFixError):
    """What answers is not there any more: the run ends before the batch is kept, and can be resumed."""


class Elsewhere(ABC):
    """Stands where the loaded model stands. `bare` is the same model without its weights."""

    option: str  # of `vlm-fix eval`, for sentences
    hardware: str | None = None  # None: this machine's

    def __init__(self, path: str, device: torch.device) -> None:
        self.path, self.bare, self.device = path, skeleton(path, None, False), device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)

    def identity(self, name: str) -> dict[str, Any]:
        """What results.json says of the model."""
        return {
            "name": name,
            "type": self.bare.config.model_type,
            "parameters": sum(p.numel() for p in self.bare.parameters()),
            "weights": weights_id(self.bare),
        }

    @contextlib.contextmanager
    @abstractmethod
    def applied(self, stack: Sequence[Method], calibration: Sequence[Calibration]) -> Iterator[None]:
        """Answer with these methods. Raises VlmFixError for what cannot be had there."""

    @abstractmethod
    def answers(self, processor: Any, images: Sequence[Any], prompts: Sequence[str], seed: int, **how: Any) -> Batch:
        """Answer each (image, prompt) pair; `how` as `Settings.generate_kwargs` gives it."""

    def sampling(self, how: dict[str, Any]) -> dict[str, Any]:
        """Temperature and top_p, 0 and 1 for greedy decoding; VlmFixError for beams."""
        if how.get("num_beams", 1) > 1:
            raise VlmFixError(f"{self.option} answers greedily or by sampling: drop --num-beams.")
        if not how.get("do_sample"):
            return {"temperature": 0.0, "top_p": 1.0}
        return {"temperature": how["temperature"], "top_p": how["top_p"]}
