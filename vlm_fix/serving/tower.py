"""The images of served requests: what vLLM's vision tower tells methods, and image tokens that are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.pruning.encoder import ImageTokens

if TYPE_CHECKING:
    from .worker import Served


class Images:
    """On one worker."""

    def __init__(self, served: Served):
        self.served = served

    def install(self) -> None:
        """Nothing yet."""

    def forget(self) -> None:
        """Nothing yet."""

    def of(self, name: str) -> list[ImageTokens]:
        raise VlmFixError("not served")

    def inputs(self, name: str) -> dict[str, torch.Tensor]:
        """The images of a request as vLLM's processor made them, by the names of the model's arguments."""
        from vllm.multimodal.utils import group_and_batch_mm_kwargs

        items = [(f.modality, f.data) for f in self.served.runner.requests[name].mm_features]
        if any(data is None for _, data in items):
            raise VlmFixError("vLLM no longer has the pixels of an image that a method needs.")
        batches = list(group_and_batch_mm_kwargs(items, device=self.served.runner.device))
        if len(batches) != 1:
            raise VlmFixError("a method takes images of one kind and size in a request, without video.")
        return dict(batches[0][2])

    def features(self, name: str, inputs: dict[str, Any] | None) -> Any:
        """Image embeddings of a request, or of other pixels with the same names."""
        own = self.inputs(name)
        given = own if inputs is None else {k: inputs[k] for k in own}
        return [*self.served.runner.model.embed_multimodal(**given)]
