"""Forwards of vLLM's language model beside the batch: a prompt that is only read, and second branches with caches of their own.

They use no block of the paged cache: the attention layers are told so by metadata of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlm_fix.hooks import hooked
from vlm_fix.recorder import Recorder
from vlm_fix.session import Session

from . import layers
from .groups import Group, KeysValues

if TYPE_CHECKING:
    from .worker import Served


GROWTH = 1.25  # how much wider a line's cache becomes when it is full


@dataclass
class Line:
    """A sequence beside the batch: its cache, and the session of its edits."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [Hkv, n, D]
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0

    def grow(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> KeysValues:
        """Append [q, Hkv, D] each; what there is then, [1, Hkv, n, D]."""
        end = self.length + len(key)
        for store, new in ((self.keys, key), (self.values, value)):
            held = store.get(layer)
            if held is None or held.shape[1] < end:
                wide = new.new_empty(new.shape[1], max(end, int(GROWTH * self.length)), new.shape[2])
                if held is not None:
                    wide[:, : self.length] = held[:, : self.length]
                store[layer] = wide
            store[layer][:, self.length : end] = new.transpose(0, 1)
        return self.keys[layer][None, :, :end], self.values[layer][None, :, :end]


@dataclass
class BesideForward:
    """The attention metadata of such a forward: lines with their numbers of rows, one after the other."""

    served: Served
    lines: list[tuple[Line, int]]
    groups: list[Group | None] = field(default_factory=list)  # of each line, where edits may act in it
    recorder: Recorder | None = None
    session: Session | None = None  # what the recorder is shown

    def attend(self, layer: Any, impl: Any, query: Any, key: Any, value: Any, output: Any) -> None:
        """Causal attention of each line over its own cache; query and output [tokens, H, D], or flat."""
        number, start = self.served.number(layer), 0
        q, out = (x.view(len(x), -1, impl.head_size) for x in (query, output))
        k, v = (x.view(len(x), -1, impl.head_size) for x in (key, value))
        held: list[KeysValues] = []
        for line, count in self.lines:
            here = slice(start, start + count)
            keys, values = line.grow(number, k[here], v[here])
            held.append((keys, values))
            n = keys.shape[2]
            mask = None
            if count > 1 and count < n:
                mask = torch.arange(n, device=q.device) <= torch.arange(n - count, n, device=q.device)[:, None]
            made = scaled_dot_product_attention(
                q[here].transpose(0, 1)[None],
                keys,
                values,
                attn_mask=mask,
                is_causal=count == n and count > 1,
                scale=impl.scale,
                enable_gqa=keys.shape[1] != q.shape[1],
            )
            out[here] = made[0].transpose(0, 1)
            start += count
        for group, own in zip(self.groups, held, strict=False):
            if group is not None and group.engine.attention.stacks[number]:
                group.edit(number, q, out, functools.partial(_given, own), impl.scale, self.served.softcap(impl))
        if self.recorder is not None and self.session is not None:
            self.recorder.heads(number, self.session, out[None])


def _given(own: KeysValues, group: Group) -> KeysValues:
    return own


class Beside:
    """Runs them on one worker."""

    def __init__(self, served: Served):
        self.served = served

    @torch.inference_mode()
    def read_prompt(self, ids: Sequence[int], recorder: Recorder) -> None:
        """One forward over a prompt of text, without edits and without a cache."""
        self.run(
            BesideForward(self.served, [(Line(), len(ids))], recorder=recorder, session=self.served.plain), ids, None
        )

    @torch.inference_mode()
    def last_rows(self, ids: Sequence[int], place: str, session: Session) -> dict[int, torch.Tensor]:
        """Layer -> what it puts out at `place` in the last row [1, C], in one forward over a prompt, without edits.

        The images of a prompt that has any are those of the request of `session`.
        """
        runner, kept = self.served.runner, dict[int, torch.Tensor]()

        def keep(i: int, module: Any, args: Any, output: Any) -> None:
            kept[i] = layers.last_row(output)

        tokens, embeds, positions = torch.tensor(ids), None, None
        shown = torch.isin(tokens, self.served.engine.tokens)
        if bool(shown.any()):
            name = next(name for name, one in self.served.requests.items() if one.session is session)
            features, at = self.served.images.features(name, None), shown.to(runner.device)
            embeds = runner.model.embed_input_ids(
                tokens.to(runner.device), multimodal_embeddings=features, is_multimodal=at
            )
            if runner.uses_mrope:
                positions = runner.requests[name].mrope_positions[:, : len(ids)].to(runner.device)
        watched = (layers.places(runner, i)[place] for i in range(len(layers.decoder_layers(runner))))
        with hooked([m.register_forward_hook(functools.partial(keep, i)) for i, m in enumerate(watched)]):
            self.run(BesideForward(self.served, [(Line(), len(ids))]), ids, embeds, positions)
        return kept

    @torch.inference_mode()
    def run(
        self,
        forward: BesideForward,
        ids: Sequence[int],
        embeds: torch.Tensor | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The lines' rows, one after the other -> hidden states [tokens, C] after the final norm."""
        from vllm.forward_context import set_forward_context

        runner = self.served.runner
        tokens = torch.tensor(ids, device=runner.device)
        if positions is None:
            places = [torch.arange(line.length, line.length + count) for line, count in forward.lines]
            positions = torch.cat(places).to(runner.device)
        if runner.uses_mrope and positions.dim() == 1:
            positions = positions.expand(3, -1)
        if embeds is None:
            embeds = runner.model.embed_input_ids(tokens)
        groups, self.served.groups = self.served.groups, [g for g in forward.groups if g is not None]
        try:
            with set_forward_context(
                forward, runner.vllm_config, num_tokens=len(ids), slot_mapping={}, skip_compiled=True
            ):
                hidden = runner.model(input_ids=None, positions=positions, inputs_embeds=embeds)
        finally:
            self.served.groups = groups
        for line, count in forward.lines:
            line.length += count
        return hidden
