"""The images of served requests: what vLLM's vision tower tells methods, and image tokens that are dropped.

What was seen of an image lies on its features, so that it lives as long as vLLM keeps these for other requests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.inputs import EncoderWing
from vlm_fix.pruning.encoder import Clip, ImageTokens, QwenVL, Seen
from vlm_fix.pruning.merge import TokenMerger

if TYPE_CHECKING:
    from .worker import Served

SEEN, LEFT = "_vlm_fix_seen", "_vlm_fix_left"  # on an image's features: its ImageTokens, and which of them are left


class ServedClip(Clip):
    """CLIP towers as vLLM has them: one projection makes queries, keys and values."""

    def __init__(self, model: Any):
        self.config, self.projector = model.config, model.multi_modal_projector
        self.tower = model.vision_tower
        self.blocks = self.tower.vision_model.encoder.layers

    def attention(self, attn: Any, args: Any, kwargs: dict[str, Any]) -> Seen:
        x = args[0] if args else kwargs["hidden_states"]
        joint, _ = attn.qkv_proj(x)
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
        return self.seen(q, k, v if self.flows else None, attn.scale)

    def images(self, args: Any, kwargs: dict[str, Any], output: Any, seen: dict[int, Seen]) -> Iterator[ImageTokens]:
        return self.tokens(args[0] if args else kwargs["pixel_values"], [output], seen)


class ServedQwen(QwenVL):
    """Qwen2.5-VL's tower as vLLM has it: patches [S, 1, Cv]."""

    def __init__(self, model: Any):
        self.tower, self.blocks = model.visual, model.visual.blocks
        self.states = torch.zeros(0)
        self.tower.merger.ln_q.register_forward_pre_hook(
            self._keep
        )  # vLLM's compiler takes the hooks of the merger itself

    def _keep(self, norm: Any, args: Any) -> None:
        self.states = args[0].flatten(0, 1) if args[0].dim() == 3 else args[0]

    def attention(self, attn: Any, args: Any, kwargs: dict[str, Any]) -> Seen:
        given = dict(zip(inspect.signature(attn.forward).parameters, args, strict=False)) | kwargs
        joint, _ = attn.qkv(given["x"])
        q, k, v = joint[:, 0].unflatten(-1, (3, -1, attn.hidden_size_per_attention_head)).unbind(1)
        q, k = (
            attn.apply_rotary_emb(x[None].contiguous(), given["rotary_pos_emb_cos"], given["rotary_pos_emb_sin"])[0]
            for x in (q, k)
        )
        return self.seen(
            q, k, v if self.flows else None, given["cu_seqlens"], attn.hidden_size_per_attention_head**-0.5
        )

    def images(self, args: Any, kwargs: dict[str, Any], output: Any, seen: dict[int, Seen]) -> Iterator[ImageTokens]:
        given = dict(zip(("x", "grid_thw"), args, strict=False)) | kwargs
        return self.tokens(given["x"], torch.as_tensor(given["grid_thw"]), self.states, seen)


class Images:
    """On one worker."""

    def __init__(self, served: Served):
        self.served = served
        self.outputs: list[tuple[Any, dict[str, Any], Any]] = []  # the tower's arguments and what it made
        self.layers: dict[int, Seen] = {}
        self.handles: list[Any] = []

    def install(self) -> None:
        """Hooks on the vision tower, if a method of the server looks at images."""
        for handle in self.handles:
            handle.remove()
        self.handles, engine, model = [], self.served.engine, self.served.runner.model
        if not engine.needs["the vision tower"]:
            return
        self.encoder: Any = (ServedQwen if engine.family.mrope else ServedClip)(model)
        self.encoder.flows, blocks = engine.pruner is not None and engine.pruner.reads_flow, self.encoder.blocks
        for i in sorted({i for edit in engine.vision for i in edit.vision_layers if i < len(blocks)}):
            self.handles.append(blocks[i].mlp.register_forward_hook(functools.partial(self._turn, i)))
        if not engine.input_edits and engine.pruner is None:
            return
        embed = getattr(model.embed_multimodal, "__wrapped__", model.embed_multimodal)
        wing = engine.wing(EncoderWing)
        wanted = {*(wing.layers if wing else ()), *(engine.pruner.encoder_layers(engine.arch) if engine.pruner else ())}
        for i in wanted:
            if i >= len(blocks):
                raise VlmFixError(f"vLLM's tower stops before layer {i}, which a method reads: choose an earlier one.")
            attn = getattr(blocks[i], "self_attn", None) or blocks[i].attn
            self.handles.append(attn.register_forward_pre_hook(self._note(i), with_kwargs=True))
        self.handles.append(self.encoder.tower.register_forward_hook(self._collect, with_kwargs=True))
        if engine.pruner is not None and engine.family.mrope:
            runner = self.served.runner
            runner.is_multimodal_pruning_enabled = True  # vLLM then asks again for positions once images are encoded
            model.get_mrope_input_positions, model.recompute_mrope_positions = self._positions, self._again

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
            self.layers[layer] = self.encoder.attention(attn, args, kwargs)

        return hook

    def _collect(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.outputs.append((args, kwargs, output))

    @torch.no_grad()
    def _left(self, features: Any) -> Any:
        """Features [N, C] of each image -> those that the server's pruner leaves, with what was seen of the image."""
        if not self.outputs:
            if self.served.engine.pruner and len(features):
                raise VlmFixError(f"{self.served.engine.pruner.name} takes images, not their embeddings.")
            return features
        (ran,), seen = self.outputs, dict(self.layers)
        self.layers.clear()
        left, pruner = [], self.served.engine.pruner
        for image, own in zip(self.encoder.images(*ran, seen), features, strict=True):
            image.features, index = own, None
            if isinstance(pruner, TokenMerger):
                index, own = pruner.reduce(image)
            elif pruner is not None:
                index = pruner.select(image)
                own = own[index.to(own.device)]
            else:
                own = own.view_as(own)
            setattr(own, SEEN, image)
            setattr(own, LEFT, index)
            left.append(own)
        return left

    def _positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """M-RoPE positions [3, L] of a prompt, and what to add to later columns. Images that are not encoded yet: made up.

        What is left of an image keeps its places in the grid, and text goes on after the whole image, as in generate.
        """
        merge = self.encoder.tower.spatial_merge_size
        made, column, base = torch.zeros(3, len(input_tokens), dtype=torch.long), 0, 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            place, grid = feature.mm_position, feature.data["image_grid_thw"].data.tolist()
            height, width = grid[1] // merge, grid[2] // merge
            made[:, column : place.offset] = torch.arange(base, base + place.offset - column)
            base += place.offset - column
            left = getattr(self.served.runner.encoder_cache.get(feature.identifier), LEFT, None)
            left = torch.arange(place.length) if left is None else left.cpu()
            column = place.offset + place.length
            made[:, place.offset : column] = base + torch.stack([torch.zeros_like(left), left // width, left % width])
            base += max(height, width)
        made[:, column:] = torch.arange(base, base + len(input_tokens) - column)
        return made, base - column

    def _again(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: torch.Tensor, num_computed_tokens: int
    ) -> tuple[Any, torch.Tensor, int]:
        """The same once images are encoded: columns that were computed keep what they had."""
        state = next(s for s in self.served.runner.requests.values() if s.mrope_positions is mrope_positions)
        if num_computed_tokens >= len(state.prompt_token_ids):
            return multimodal_embeddings, mrope_positions, state.mrope_position_delta
        made, delta = self._positions(state.prompt_token_ids, state.mm_features)
        made[:, :num_computed_tokens] = mrope_positions[:, :num_computed_tokens]
        return multimodal_embeddings, made.to(mrope_positions), delta

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
