"""Forwards of vLLM's language model beside the batch: a prompt that is only read, and second branches with caches of their own.

They use no block of the paged cache: the attention layers are told so by metadata of their own.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.kernel import Scores, edited_rows
from vlm_fix.hooks import hooked
from vlm_fix.recorder import LastHeads, Recorder
from vlm_fix.session import Session

from . import layers
from .groups import Group, KeysValues, Looks

if TYPE_CHECKING:
    from .worker import Served


READ = 64  # prompts of text whose last rows are kept; in a model of 7 billion parameters one takes half a megabyte
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
    recorders: list[list[Recorder]] = field(default_factory=list)  # of each line
    session: Session | None = None  # what the recorders are shown

    def attend(self, layer: Any, impl: Any, query: Any, key: Any, value: Any, output: Any) -> None:
        """Causal attention of each line over its own cache; query and output [tokens, H, D], or flat."""
        number, looks, start = self.served.number(layer), self.served.looks(layer, impl), 0
        q, out = (x.view(len(x), -1, impl.head_size) for x in (query, output))
        k, v = (x.view(len(x), -1, impl.head_size) for x in (key, value))
        held: list[KeysValues] = []
        for line, count in self.lines:
            here = slice(start, start + count)
            keys, values = line.grow(number, k[here], v[here])
            held.append((keys, values))
            out[here] = _attention(q[here].transpose(0, 1)[None], keys, values, looks)[0].transpose(0, 1)
            start += count
        for group, own in zip(self.groups, held, strict=False):
            if group is not None and group.engine.attention.stacks[number]:
                group.edit(number, q, out, functools.partial(_given, own, looks.window), looks)
        start = 0
        for (_, count), recorders in zip(self.lines, self.recorders, strict=False):
            assert self.session is not None
            for recorder in recorders:
                recorder.heads(number, self.session, out[None, start : start + count])
            start += count


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, looks: Looks) -> torch.Tensor:
    """Causal attention of the last q of n columns: [1, H, q, D] over [1, Hkv, n, D]."""
    count, n = query.shape[2], keys.shape[2]
    out_of_reach, mask = looks.window is not None and n > looks.window, None
    if out_of_reach or 1 < count < n:
        mask = looks.mask(n - count, count, n, query.device)
    causal = mask is None and count > 1
    if looks.softcap:
        rows = QueryRows(query, keys, values, mask, Scores(looks.scaling, looks.softcap), 0 if causal else None)
        return edited_rows(rows).to(query.dtype)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal,
        scale=looks.scaling,
        enable_gqa=keys.shape[1] != query.shape[1],
    )


def _given(own: KeysValues, window: int | None, group: Group) -> KeysValues:
    keys, values = (x[:, :, group.columns - group.reach(window) :] for x in own)
    return keys, values


class Beside:
    """Runs them on one worker."""

    def __init__(self, served: Served):
        self.served = served
        self.asked: dict[tuple[int, ...], list[Recorder]] = {}  # prompts that are to be read before the next layer
        self.read: OrderedDict[tuple[int, ...], dict[int, torch.Tensor]] = OrderedDict()
        """Prompts that were read of late -> layer -> head outputs of the last row [1, H, D]"""

    def read_prompt(self, ids: Sequence[int], recorder: Recorder, later: bool) -> None:
        """One forward over a prompt of text, without edits and without a cache; `later`: when `read_asked` is called.

        Of a prompt that was read before and of which only the last row is asked for, that row is known.
        """
        place = tuple(ids)
        known = self.read.get(place) if isinstance(recorder, LastHeads) else None
        if known is not None:
            self.read.move_to_end(place)
            for layer, row in known.items():
                recorder.heads(layer, self.served.plain, row[None])
            return
        self.asked.setdefault(place, []).append(recorder)
        if not later:
            self.read_asked()

    def forget(self) -> None:
        """Read prompts again from now on, as after new weights."""
        self.read.clear()

    @torch.inference_mode()
    def read_asked(self) -> None:
        """Read the prompts that were asked for, each once, in one forward."""
        asked, self.asked = self.asked, {}
        if not asked:
            return
        kept: list[dict[int, torch.Tensor]] = [{} for _ in asked]
        keepers = [LastHeads(each.__setitem__) for each in kept]
        lines = [(Line(), len(ids)) for ids in asked]
        recorders = [[*own, keeper] for own, keeper in zip(asked.values(), keepers, strict=True)]
        forward = BesideForward(self.served, lines, recorders=recorders, session=self.served.plain)
        self.run(forward, [token for ids in asked for token in ids], None)
        for ids, rows in zip(asked, kept, strict=True):
            self.read[ids] = {layer: row.clone() for layer, row in rows.items()}
            if len(self.read) > READ:
                self.read.popitem(last=False)

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
