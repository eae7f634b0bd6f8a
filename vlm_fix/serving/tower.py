"""The images of served requests: what vLLM's vision tower tells methods, and image tokens that are dropped.

What was seen of an image lies on its features, so that it lives as long as vLLM keeps these for other requests.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.inputs import EncoderWing
from vlm_fix.pruning.encoder import Clip, ImageTokens, Seen
from vlm_fix.pruning.merge import TokenMerger

if TYPE_CHECKING:
    from .worker import Served

SEEN = "_vlm_fix_seen"  # on an image's features: its ImageTokens


class ServedClip(Clip):
    """CLIP towers as vLLM has them: one projection makes queries, keys and values."""

    def __init__(self, model: Any):
        self.config, self.projector = model.config, model.multi_modal_projector

    def attention(self, attn: Any, args: Any, kwargs: dict[str, Any]) -> Seen:
        x = args[0] if args else kwargs["hidden_states"]
        joint, _ = attn.qkv_proj(x)
        q, k, _ = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
        return self.seen(q, k, attn.scale)


class Images:
    """On one worker."""

    def __init__(self, served: Served):
        self.served = served
        self.outputs: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # of the tower: pixels and features, not yet projected
        self.layers: dict[int, Seen] = {}
        self.handles: list[Any] = []

    def install(self) -> None:
        """Hooks on the vision tower, if a method of the server looks at images."""
        for handle in self.handles:
            handle.remove()
        self.handles, engine, model = [], self.served.engine, self.served.runner.model
        if not engine.needs["the vision tower"]:
            return
        blocks = model.vision_tower.vision_model.encoder.layers
        for i in sorted({i for edit in engine.vision for i in edit.vision_layers if i < len(blocks)}):
            self.handles.append(blocks[i].mlp.register_forward_hook(functools.partial(self._turn, i)))
        if not engine.input_edits and engine.pruner is None:
            return
        self.clip = ServedClip(model)
        embed = getattr(model.embed_multimodal, "__wrapped__", model.embed_multimodal)
        wing = engine.wing(EncoderWing)
        wanted = {*(wing.layers if wing else ()), *(engine.pruner.encoder_layers(engine.arch) if engine.pruner else ())}
        for i in wanted:
            if i >= len(blocks):
                raise VlmFixError(f"vLLM's tower stops before layer {i}, which a method reads: choose an earlier one.")
            self.handles.append(blocks[i].self_attn.register_forward_pre_hook(self._note(i), with_kwargs=True))
        self.handles.append(model.vision_tower.register_forward_hook(self._collect, with_kwargs=True))

        def embed_multimodal(**kwargs: Any) -> Any:
            self.outputs.clear()
            return self._left(embed(**kwargs))

        embed_multimodal.__wrapped__ = embed  # type: ignore[attr-defined]
        model.embed_multimodal = embed_multimodal

    def _turn(self, layer: int, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        x = output.float()
        for edit in self.served.engine.vision:
            x = edit.vision_mlp(x, layer) if layer in edit.vision_layers else x
        return x.to(output.dtype)

    def _note(self, layer: int) -> Any:
        def hook(attn: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.layers[layer] = self.clip.attention(attn, args, kwargs)

        return hook

    def _collect(self, module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        self.outputs.append((args[0] if args else kwargs["pixel_values"], output))

    @torch.no_grad()
    def _left(self, features: Any) -> Any:
        """Features [N, C] of each image -> those that the server's pruner leaves, with what was seen of the image."""
        if not self.outputs:
            if self.served.engine.pruner and len(features):
                raise VlmFixError(f"{self.served.engine.pruner.name} takes images, not their embeddings.")
            return features
        ((pixels, states),), seen = self.outputs, dict(self.layers)
        self.layers.clear()
        left, pruner = [], self.served.engine.pruner
        for image, own in zip(self.clip.tokens(pixels, [states], seen), features, strict=True):
            image.features = own
            if isinstance(pruner, TokenMerger):
                own = pruner.reduce(image)[1]
            elif pruner is not None:
                own = own[pruner.select(image).to(own.device)]
            else:
                own = own.view_as(own)
            setattr(own, SEEN, image)
            left.append(own)
        return left

    def of(self, name: str) -> list[ImageTokens]:
        """What was seen of a request's images, in order."""
        runner = self.served.runner
        known = [runner.encoder_cache.get(f.identifier) for f in runner.requests[name].mm_features]
        if any(getattr(features, SEEN, None) is None for features in known):  # the prompt's columns came from the cache
            known = self.features(name, None)
        return [getattr(features, SEEN) for features in known]

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
