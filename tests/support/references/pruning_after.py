"""Float64 references of what is pruned inside the language model: one full-length pass that masks layer by layer."""

from __future__ import annotations

import copy
import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.support.models import IMAGE

STEPS = 6
RUN = None  # the Slow pass that is running


def masked_columns(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The whole L x L matrix, masked as the running pass says."""
    layer, run = getattr(module, "layer_idx", None), RUN
    groups = query.shape[1] // key.shape[1]
    z = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling + attention_mask
    z = run.masked(layer, z, key[0], value[0])
    for h in range(z.shape[1] if run.pai and layer >= 2 else 0):
        for r in range(run.last, z.shape[2]):
            for j in (j for image in run.images for j in image if j in run.alive[layer]):
                z[0, h, r, j] += run.pai * abs(float(z[0, h, r, j]))
    return (z.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


AttentionInterface.register("masked_columns", masked_columns)
AttentionMaskInterface.register("masked_columns", eager_mask)


class Slow:
    """One pass over prompt and answer of a single sample. `choose(run, stage, layer, hidden)` -> (kept, {column: state})."""

    def __init__(self, family, model, inputs, stages, choose, compact=False, pai=0.0):
        self.family, self.inputs, self.stages, self.choose = family, inputs, stages, choose
        self.compact, self.pai = compact, pai
        self.twin = copy.deepcopy(model).double().eval()
        self.twin.set_attn_implementation({"text_config": "masked_columns"})
        self.layers = self.twin.model.language_model.layers
        ids = inputs["input_ids"][0].tolist()
        self.last = len(ids) - 1
        visual = [j for j, t in enumerate(ids) if t == IMAGE]
        grids = inputs.get("image_grid_thw")
        sizes = [36] * (len(visual) // 36) if grids is None else [h * w // 4 for _, h, w in grids.tolist()]
        self.images = [[visual.pop(0) for _ in range(n)] for n in sizes]
        self.question = [j for j in range(self.images[-1][-1] + 1, len(ids))]

    @torch.no_grad()
    def logits(self, tokens):
        """[STEPS, V] that predict each of `tokens`."""
        global RUN
        ids = torch.cat([self.inputs["input_ids"], tokens[None, :-1]], 1)
        full = {**self.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        full["pixel_values"] = full["pixel_values"].double()
        if "mm_token_type_ids" in full:
            types = full["mm_token_type_ids"]
            full["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        assert not (tokens == IMAGE).any(), "pick another seed: the reference would look for an image there"
        self.alive = [set(range(ids.shape[1])) for _ in self.layers]
        self.weights, self.keys, self.first = {}, {}, None
        hooks = [m.register_forward_pre_hook(self.hook(i), with_kwargs=True) for i, m in enumerate(self.layers)]
        self.twin.model.rope_deltas, RUN = None, self
        try:
            return self.twin(**full, use_cache=False).logits[0, -STEPS:]
        finally:
            RUN = None
            for h in hooks:
                h.remove()

    def masked(self, layer, z, keys, values):
        """Columns that the layer no longer has are masked; its own rows of them see themselves."""
        dead = [j for j in range(z.shape[-1]) if j not in self.alive[layer]]
        mask = torch.zeros(z.shape[-2:], dtype=torch.bool)
        mask[:, dead] = True
        mask[dead, dead] = False
        z = z.masked_fill(mask, -torch.inf)
        self.weights[layer], self.keys[layer] = z[0].softmax(-1), keys
        return z

    def hook(self, i):
        def enter(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if i == 0:
                self.first = x[0]
            self.tables = self.rotary(i - 1, kwargs["position_embeddings"]) if i else kwargs["position_embeddings"]
            if i in self.stages:
                kept, states = self.choose(self, self.stages.index(i), i, x[0])
                gone = {j for image in self.images for j in image} - set(kept)
                for later in range(i, len(self.layers)):
                    self.alive[later] = self.alive[later] - gone
                x = x.clone()
                for j, state in states.items():
                    x[0, j] = state
            new = {"position_embeddings": self.rotary(i, kwargs["position_embeddings"])}
            return ((x, *args[1:]) if args else ()), {**kwargs, **new, **({} if args else {"hidden_states": x})}

        return enter

    def rotary(self, layer, tables):
        """The layer's tables: with re-numbering, a column's position is the number of columns left before it."""
        if not self.compact:
            return tables
        count = len(tables[0][0])
        position = [max(0, sum(k in self.alive[layer] for k in range(j + 1)) - 1) for j in range(count)]
        return self.twin.model.language_model.rotary_emb(tables[0], torch.tensor([position]))

    def visual_left(self, layer):
        return [[j for j in image if j in self.alive[layer]] for image in self.images]

    def seen_by(self, layer, row):
        """{column: mean over heads} of one row of a layer that has run."""
        return [float(sum(w[row, j] for w in self.weights[layer]) / len(self.weights[layer])) for j in range(row + 1)]

    def own_last(self, layer, hidden):
        """The prompt's last row of attention in a layer that has not run, by hand."""
        module, (cos, sin) = self.layers[layer], self.tables
        attn, x = module.self_attn, module.input_layernorm(hidden)

        def turned(y, j):
            a, b = y.chunk(2, -1)
            return y * cos[0, j] + torch.cat([-b, a], -1) * sin[0, j]

        columns = [j for j in sorted(self.alive[layer]) if j <= self.last]
        q = turned(attn.q_proj(x[self.last]).view(-1, attn.head_dim), self.last)
        keys = [turned(attn.k_proj(x[j]).view(-1, attn.head_dim), j) for j in columns]
        total = [0.0] * (self.last + 1)
        for h in range(len(q)):
            z = [float(q[h] @ k[h // (len(q) // len(k))]) / math.sqrt(attn.head_dim) for k in keys]
            top = max(z)
            e = [math.exp(v - top) for v in z]
            for j, v in zip(columns, e, strict=True):
                total[j] += v / sum(e) / len(q)
        return total


def quota(keep, count):
    return max(1, min(count, round(keep * count) if keep <= 1 else int(keep)))
