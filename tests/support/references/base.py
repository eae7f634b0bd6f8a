"""Independent float64 references: plain loops over materialised attention weights, written from the formulas.

Nothing here uses the engine. `teacher_forced` runs the model without a cache on one unpadded sample, prompt and generated
tokens at once, with an attention function that forms the whole L x L matrix and edits it row by row.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from tests.support.models import IMAGE, VIDEO

RUN = None  # the Reference of the running forward


@dataclass
class Gates:
    """Decisions of one pass: values against a threshold, or the largest of some. Distances are relative to `scale`.

    With `taken`, the decisions of another pass count instead; those that differ are `flips`, each with its distance.
    """

    taken: dict | None = None
    own: dict = field(default_factory=dict)
    margin: float = math.inf  # least distance of a value from its threshold
    flips: list[float] = field(default_factory=list)

    def above(self, key, value, threshold, scale=1.0) -> bool:
        """value > threshold?"""
        distance = abs(float(value) - float(threshold)) / float(scale)
        self.margin, self.own[key] = min(self.margin, distance), bool(value > threshold)
        chosen = self.own[key] if self.taken is None else self.taken[key]
        if chosen != self.own[key]:
            self.flips.append(distance)
        return chosen

    def largest(self, key, values, count) -> list[int]:
        """The indices of the `count` largest values, largest first."""
        order = sorted(range(len(values)), key=lambda i: -values[i])
        own, scale = order[:count], max(map(abs, values))
        if 0 < count < len(values):
            self.margin = min(self.margin, (values[order[count - 1]] - values[order[count]]) / scale)
        self.own[key] = own
        chosen = own if self.taken is None else self.taken[key]
        lost = sorted((values[i] for i in set(own) - set(chosen)), reverse=True)
        won = sorted(values[i] for i in set(chosen) - set(own))
        self.flips += [(a - b) / scale for a, b in zip(lost, won, strict=True)]
        return chosen


@dataclass
class Reference:
    """One pass. Overwrite score(z, ...), weight(a, ...) for one row of one head, or scores(z [H, L, L], layer) and
    mixed(a [H, L, L], layer) in place for all of them; scale(o [H, L, D], layer) for head outputs; `layers` are edited.

    `given` are queries, keys, values and inputs of another run, which each layer takes instead of this pass's own: its
    gates then are those of the other run's numbers.
    """

    visual: list[int]
    prompt_len: int
    layers: list[int]
    rows: str = "last"
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> x [L, C] before its norm
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [H, L, D] as edited
    gates: Gates = field(default_factory=Gates)
    given: Any = None

    @property
    def margin(self) -> float:
        return self.gates.margin

    def edited(self, row: int) -> bool:
        first = {
            "last": self.prompt_len - 1,
            "after_image": min(max(self.visual, default=10**9) + 1, self.prompt_len - 1),
            "all": 0,
        }[self.rows]
        return bool(self.visual) and row >= first

    def cells(self, z):
        for h in range(z.shape[0]):
            for r in filter(self.edited, range(z.shape[1])):
                yield h, r

    def score(self, z, layer, head, row):
        return z

    def weight(self, a, layer, head, row):
        return a

    def scores(self, z, layer):
        for h, r in self.cells(z):
            z[h, r] = self.score(z[h, r], layer, h, r)

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            a[h, r] = self.weight(a[h, r], layer, h, r)

    def scale(self, out, layer):
        return out

    def projected(self, q, k, layer):
        """Looks at queries and keys [H, L, D]."""

    def visible(self, mask):
        """The additive mask [L, L] with other columns visible."""
        return mask

    def extra(self, full) -> dict:
        """Further inputs of the forward."""
        return {}

    def attach(self, twin) -> list:
        """Hooks for the forward."""
        return []

    def forward(self, twin, inputs, generated):
        return teacher_forced(twin, self, inputs, generated)


def reference_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    run, layer = RUN, getattr(module, "layer_idx", None)
    if run is not None and run.given:
        query, key, value = (x[None] for x in run.given.projected(layer))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    z = query @ key.transpose(2, 3) * scaling
    edit = run is not None and layer in run.layers
    if run is not None:
        attention_mask = run.visible(attention_mask[0, 0])[None, None]
    if edit:
        run.projected(query[0], key[0], layer)
        z = z.masked_fill(attention_mask < -1e9, 0)  # a column outside the window is not there to be summed
        run.scores(z[0], layer)
    a = (z + attention_mask).softmax(-1)
    if edit:
        run.mixed(a[0], layer)
    out = a @ value
    if run is not None and run.given:
        out = out.to(run.given.dtype).double()  # as fused attention hands them on
    if run is not None:
        run.outputs[layer] = out[0].clone()
        if edit:
            out = run.scale(out[0], layer)[None]
            run.outputs[layer] = out[0]
    return out.transpose(1, 2), a


AttentionInterface.register("reference_loops", reference_attention)
AttentionMaskInterface.register("reference_loops", eager_mask)


def double(model):
    """A float64 copy whose language model runs the reference attention."""
    twin = float64(model)
    twin.set_attn_implementation({"text_config": "reference_loops"})
    return twin


def float64(model):
    """A float64 copy."""
    twin = copy.deepcopy(model).double().eval()
    if getattr(twin.config.get_text_config(), "num_experts_per_tok", None) or hasattr(
        twin.config.get_text_config(), "moe_topk"
    ):
        # the default has no float64; the setter asks a class whether it can be set, and classes inherit another's answer
        for part in twin.modules():
            if isinstance(part, PreTrainedModel):
                part.config._experts_implementation_internal = "eager"
    return twin


class NoFloat32(TorchFunctionMode):
    """Within it, what code turns to float32 is float64: linear attention computes in float32 whatever it is given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def decoder(model):
    if not hasattr(model, "model"):  # Llama 4
        return model.language_model.model
    return getattr(model.model, "language_model", None) or model.model.text_model


def visual_columns(ids):
    return ((ids[0] == IMAGE) | (ids[0] == VIDEO)).nonzero()[:, 0].tolist()


def modalities(ids, inputs):
    """mm_token_type_ids of a prompt that may hold videos."""
    return ((ids == IMAGE) + 2 * (ids == VIDEO) * ("video_grid_thw" in inputs)).int()


@torch.no_grad()
def teacher_forced(twin, run, inputs, generated):
    """Logits [1 + T, V] that predict the token after the prompt and after each of the T generated ones."""
    global RUN
    full = {**inputs, "input_ids": torch.cat([inputs["input_ids"], generated[None]], 1)}
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    if "token_type_ids" in full:  # PaliGemma's answer is a causal suffix (1), Gemma 3's is text (0)
        suffix = torch.full_like(generated[None], int(twin.config.model_type == "paligemma"))
        full["token_type_ids"] = torch.cat([full["token_type_ids"], suffix.to(full["token_type_ids"])], 1)
    if "moe_mm_token_type_ids" in full:
        suffix = torch.zeros_like(generated[None]).to(full["moe_mm_token_type_ids"])
        full["moe_mm_token_type_ids"] = torch.cat([full["moe_mm_token_type_ids"], suffix], 1)
    if "mm_token_type_ids" in full:
        types = (full["input_ids"] == IMAGE).int()
        if "pixel_values_videos" in full:
            types[:, : inputs["input_ids"].shape[1]] = full["mm_token_type_ids"]
        full["mm_token_type_ids"] = types
    for key in {"pixel_values", "pixel_values_videos"} & full.keys():
        full[key] = full[key].to(next(twin.parameters()).dtype)
    hooks = []
    for i, layer in enumerate(decoder(twin).layers):

        def note(module, args, kwargs, i=i):
            if run is not None:
                x = (args[0] if args else kwargs["hidden_states"])[0].clone()
                run.inputs[i] = run.given.inputs(i) if run.given else x

        hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    if run is not None:
        hooks += run.attach(twin)
        full |= run.extra(full)
    getattr(twin, "model", twin).rope_deltas = None
    RUN = run
    try:
        logits = twin(**full, use_cache=False).logits[0]
    finally:
        RUN = None
        for hook in hooks:
            hook.remove()
    return logits[inputs["input_ids"].shape[1] - 1 :]


# ---- the methods --------------------------------------------------------------------------------------------------------


@dataclass
class PaiReference(Reference):
    alpha: float = 0.2

    def score(self, z, layer, head, row):
        z = z.clone()
        z[self.visual] += self.alpha * z[self.visual].abs()
        return z


@dataclass
class VarReference(Reference):
    rows: str = "after_image"
    dims: tuple = ()
    tau: float = 20.0
    rho: float = 0.5
    p: float = 0.4
    min_visual_mass: float = 0.2
    secondary: dict | None = None  # layer -> columns, found in another way
    hits: int = 0
    cache: dict = field(default_factory=dict)  # layer -> its input and the sinks in it

    def sinks(self, layer):
        if self.secondary is not None:
            return self.secondary[layer]
        seen, found = self.cache.get(layer, (None, []))
        if seen is self.inputs[layer]:
            return found

        def ratios(j):
            x = self.inputs[layer][j]
            return (x.abs() / (x.pow(2).mean() + 1e-6).sqrt()).tolist()

        dims, tau = self.dims, self.tau
        if not dims:
            dims = [d for d, v in enumerate(ratios(0)) if self.gates.above(("dim", layer, d), v, tau, tau)]
        phis = [max((ratios(j)[d] for d in dims), default=0.0) for j in range(self.prompt_len)]
        found = [j for j, phi in enumerate(phis) if self.gates.above(("sink", layer, j), phi, tau, tau)]
        self.cache[layer] = self.inputs[layer], found
        return found

    def weight(self, a, layer, head, row):
        sink = self.sinks(layer)
        inside = [j for j in self.visual if j in sink]
        outside = [j for j in self.visual if j not in sink]
        if not inside:
            return a
        image, values = sum(float(a[j]) for j in self.visual), a.tolist()
        share = sum(values[j] for j in inside) / (image + 1e-6)
        crowded = self.gates.above(("share", layer, head, row), share, 1 - self.rho)
        looking = self.gates.above(("mass", layer, head, row), image, self.min_visual_mass)
        if crowded or not looking or not outside:
            return a
        self.hits += 1
        new, mass = a.clone(), sum(values[j] for j in outside)
        moved = sum(values[j] for j in sink) * self.p
        for j in sink:
            new[j] = a[j] * (1 - self.p)
        for j in outside:
            new[j] = a[j] * (1 + moved / mass)
        return new


@dataclass
class VhrReference(Reference):
    alpha: float = 2.0
    text: dict = field(default_factory=dict)

    def scale(self, out, layer):
        out, last = out.clone(), self.prompt_len - 1
        with_image, text = out[:, last], self.text[layer]
        vhd = [float((with_image[i] - text[i]).pow(2).sum().sqrt()) for i in range(len(out))]
        ta = [float(text[i].pow(2).sum()) for i in range(len(out))]

        def above(name, i, values, limit):
            return self.gates.above((name, layer, i), values[i], limit, limit)

        def limit(v):
            mean = sum(v) / len(v)
            return mean + (sum((x - mean) ** 2 for x in v) / len(v)) ** 0.5

        heads = range(len(vhd))
        far = [(above("vhd", i, vhd, limit(vhd)), above("ta", i, ta, limit(ta))) for i in heads]
        vhd = [0.0 if all(far[i]) else vhd[i] for i in heads]
        order = sorted(vhd)
        median = (order[(len(order) - 1) // 2] + order[len(order) // 2]) / 2
        for i in heads:
            if above("median", i, vhd, median):
                for r in range(last if self.rows == "last" else 0, out.shape[1]):
                    out[i, r] = out[i, r] * self.alpha
        return out


def text_only_outputs(twin, inputs, layers):
    """Per-head outputs of the prompt's last token without its image tokens: {layer: [H, D]}."""
    visual = visual_columns(inputs["input_ids"])
    keep = [i for i in range(inputs["input_ids"].shape[1]) if i not in visual]
    text = {k: inputs[k][:, keep] for k in ("input_ids", "token_type_ids", "moe_mm_token_type_ids") if k in inputs}
    run = Reference([], len(keep), layers)
    teacher_forced(twin, run, text, text["input_ids"][0, :0])
    return {layer: run.outputs[layer][:, -1] for layer in layers}


# ---- HiPrune, without anything of the engine -------------------------------------------------------------------------


def received(q, k, scaling):
    """[H, S, D] -> [S]: attention each column receives, averaged over heads and queries, by loops."""
    total = torch.zeros(q.shape[1], dtype=torch.float64)
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            z = torch.tensor([float(q[h, i] @ k[h, j]) * scaling for j in range(q.shape[1])], dtype=torch.float64)
            total += z.softmax(0)
    return total / (q.shape[0] * q.shape[1])


def hiprune_choice(objects, registers, grid, budget, alpha):
    """Kept indices by the paper's text."""
    height, width = grid
    order = sorted(range(len(objects)), key=lambda i: (-float(objects[i]), i))
    kept = set()
    for i in order[: round(budget * alpha / 5)]:
        y, x = divmod(i, width)
        for v, u in ((y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height and 0 <= u < width:
                kept.add(v * width + u)
    for i in sorted(range(len(registers)), key=lambda i: (-float(registers[i]), i)):
        if len(kept) < budget:
            kept.add(i)
    return sorted(kept)
