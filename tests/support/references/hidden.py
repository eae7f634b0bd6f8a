"""Float64 references of the hidden-state methods, each written from its formula alone: hooks that go row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tests.support import tensors
from tests.support.references import base as ref
from tests.support.references.attention import writer
from tests.support.references.base import Reference
from vlm_fix.methods.controls.random_direction import drawn


def length(x) -> float:
    return float((x.double() * x.double()).sum()) ** 0.5


def cosine(x, y) -> float:
    return float((x * y).sum()) / max(length(x) * length(y), 1e-300)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def changed(module, change):
    """A hook that replaces row r of a module's output [1, L, C] by change(x [L, C], r), unless that is None."""

    def hook(module, args, output):
        x = first(output).clone()
        old = x[0].clone()
        for r in range(x.shape[1]):
            new = change(old, r)
            if new is not None:
                x[0, r] = new
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return module.register_forward_hook(hook)


def last_states(twin, inputs):
    """{layer: output [C] of the layer in the prompt's last row}, in a plain pass."""
    kept, handles = {}, []
    for i, layer in enumerate(ref.decoder(twin).layers):
        handles.append(layer.register_forward_hook(lambda m, a, o, i=i: kept.__setitem__(i, first(o)[0, -1].clone())))
    ref.teacher_forced(twin, None, inputs, inputs["input_ids"][0, :0])
    for handle in handles:
        handle.remove()
    return kept


def without_images(inputs):
    visual = ref.visual_columns(inputs["input_ids"])
    keep = [i for i in range(inputs["input_ids"].shape[1]) if i not in visual]
    return {k: inputs[k][:, keep] for k in ("input_ids", "token_type_ids") if k in inputs}


@dataclass
class VISTA(Reference):
    rows: str = "all"
    lam: float = 0.0
    image: dict = field(default_factory=dict)  # layer -> state [C] of the prompt's last row with the image
    text: dict = field(default_factory=dict)  # the same without

    def attach(self, twin):
        def turn(x, r, i):
            if not self.edited(r):
                return None
            v = self.image[i] - self.text[i]
            push = self.lam * (1 + max(0.0, -cosine(x[r], v)))
            y = x[r] / length(x[r]) + push * v / length(v)
            return y / length(y) * length(x[r])

        layers = ref.decoder(twin).layers
        return [changed(writer(layers[i], "mlp"), lambda x, r, i=i: turn(x, r, i)) for i in self.layers]


def vista(p, layers, **values):
    made = VISTA(**p.at, layers=list(layers), **values)
    made.image, made.text = last_states(p.model, p.inputs), last_states(p.model, without_images(p.inputs))
    return made


@dataclass
class Nullu(Reference):
    rows: str = "all"
    rank: int = 0

    def attach(self, twin):
        def keep_out(x, r, i):
            y, basis = x[r].clone(), []
            for row in tensors.subspace()[i][: self.rank]:  # Gram-Schmidt
                q = row.double()
                for b in basis:
                    q = q - float((q * b).sum()) * b
                basis.append(q / length(q))
            for b in basis:
                y = y - float((y * b).sum()) * b
            return y

        layers = ref.decoder(twin).layers
        return [changed(layers[i].mlp, lambda x, r, i=i: keep_out(x, r, i)) for i in self.layers]


@dataclass
class VTI(Reference):
    rows: str = "all"
    text: float = 0.0
    vision: float = 0.0

    def attach(self, twin):
        named, layers = tensors.vti(), ref.decoder(twin).layers

        def turn(x, r, d, alpha):
            y = x[r] / length(x[r]) + 0.1 * alpha * d.double() / length(d)
            return y / length(y) * length(x[r])

        handles = [
            changed(
                writer(layers[i], "mlp"),
                lambda x, r, i=i: turn(x, r, named[f"text.{i}"], self.text) if self.edited(r) else None,
            )
            for i in self.layers
            if self.text
        ]
        tower = getattr(twin.model, "visual", None) or twin.model.vision_tower
        blocks = (
            tower.blocks
            if hasattr(tower, "blocks")
            else tower.encoder.layers
            if hasattr(tower, "encoder")
            else tower.vision_model.encoder.layers
        )
        for i, block in enumerate(blocks):

            def hook(module, args, output, d=named[f"vision.{i}"]):
                flat = output.flatten(0, -2)
                return torch.stack([turn(flat, r, d, self.vision) for r in range(len(flat))]).view_as(output)

            if self.vision:
                handles.append(block.mlp.register_forward_hook(hook))
        return handles


@dataclass
class Rudder(Reference):
    rows: str = "last"
    alpha: float = 0.0
    absolute: float | None = None
    k: float = 5.0
    gated: bool = True
    on: str = "stream"
    pool: str = "weighted"
    drawn: int | None = None  # of the control: the seed of its direction

    def attach(self, twin):
        handles = []
        for i in self.layers:
            kept, layer = {}, ref.decoder(twin).layers[i]

            def note(module, args, kwargs, kept=kept):
                kept["h"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

            def remind(x, r, kept=kept, i=i):
                if not self.edited(r):
                    return None
                pooled = 0
                for a in x[: self.prompt_len]:
                    pooled = pooled + (length(a) if self.pool == "weighted" else 1) * a
                v = pooled / length(pooled)
                h = kept["h"][r]
                s = self.k * cosine(h if self.on == "stream" else x[r], v)
                plus, minus = (torch.log1p(torch.exp(torch.tensor(z + 1.0, dtype=torch.float64))) for z in (s, -s))
                g = max(0.05, float(plus / (plus + minus))) if self.gated else 1.0
                if self.drawn is not None:
                    v = drawn(self.drawn, i, len(v)).double()
                return x[r] + (self.alpha * length(h) if self.absolute is None else self.absolute) * g * v

            handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
            handles.append(changed(writer(layer, "attention"), remind))
        return handles


@dataclass
class Steer(Reference):
    strength: float = 0.0
    absolute: float | None = None
    keep: bool = False
    place: str = "layer_output"

    def attach(self, twin):
        def steer(x, r, i):
            if not r >= {"last": self.prompt_len - 1, "all": 0}[self.rows]:
                return None
            v = tensors.drawn(200 + i, tensors.CHANNELS).double()
            y = x[r] + (self.strength * length(x[r]) * v / length(v) if self.absolute is None else self.absolute * v)
            return y / length(y) * length(x[r]) if self.keep else y

        layers, handles = ref.decoder(twin).layers, []
        for i in self.layers:
            module = layers[i] if self.place == "layer_output" else writer(layers[i], self.place.partition("_")[0])
            handles.append(changed(module, lambda x, r, i=i: steer(x, r, i)))
        return handles


@dataclass
class MemVR(Reference):
    """`layers`: those whose early exits are looked at."""

    rows: str = "all"
    ratio: float = 0.0
    threshold: float = 1.0

    def attach(self, twin):
        layers, norm, handles = ref.decoder(twin).layers, ref.decoder(twin).norm, []
        fired = {}

        def unsure(r, layer):
            decider = max(r, self.prompt_len - 1)  # the prompt's last row decides for all its rows
            if decider != r and self.rows == "last":
                return False
            if (decider, layer) not in fired:
                top = sorted(twin.lm_head(norm(self.inputs[layer + 1][decider])).tolist(), reverse=True)[:10]
                p = torch.tensor(top, dtype=torch.float64).softmax(0)
                entropy = -sum(v * torch.log(torch.tensor(v)).item() for v in p.tolist())
                value = entropy / torch.log(torch.tensor(10.0, dtype=torch.float64)).item()
                fired[decider, layer] = self.gates.above((decider, layer), value, self.threshold, self.threshold)
            return fired[decider, layer] and not any(fired.get((decider, i)) for i in self.layers if i < layer)

        for i in self.layers:
            kept, mlp = {}, layers[i + 1].mlp

            def note(module, args, kept=kept):
                kept["x"] = args[0][0].clone()

            def retrace(module, args, output, i=i, kept=kept):
                out, new = first(output)[0], first(output)[0].clone()
                z = self.inputs[0][self.visual]
                a = torch.stack([sum(float(x @ v) * v for v in z) for x in kept["x"]])
                for r in range(len(out)):
                    if not unsure(r, i):
                        continue
                    group = range(self.prompt_len) if r < self.prompt_len and self.rows == "all" else [r]
                    size = [sum(float(y[j].abs().mean()) for j in group) / len(group) for y in (out, a)]
                    new[r] = (1 - self.ratio) * out[r] + self.ratio * size[0] / size[1] * a[r]
                return new[None]

            handles += [mlp.register_forward_pre_hook(note), mlp.register_forward_hook(retrace)]
        return handles


@dataclass
class HulluEdit(Reference):
    """`layers`: the anchor alone."""

    kappa: float = 0.5
    lam: float = 0.22
    rank: int = 8
    prior_rank: int = 5
    pcr_threshold: float = 0.015

    def attach(self, twin):
        return [changed(ref.decoder(twin).norm, self.edit)]

    def edit(self, states, r):
        if not self.edited(r):
            return None
        h, anchored, last = states[r], self.inputs[self.layers[0]], self.prompt_len - 1
        z = anchored[self.visual]
        t = anchored[[j for j in range(max(self.visual) + 1, r + 1) if j != last]]
        w = torch.tensor([cosine(v, h) / 1.15 for v in z], dtype=torch.float64).softmax(0)
        middle = sum(float(w[j]) * z[j] for j in range(len(z)))
        u = self.directions(torch.stack([(z[j] - middle) * float(w[j]) ** 0.5 for j in range(len(z))]), self.rank)
        t = torch.stack([row - sum(float(row @ q) * q for q in u) for row in t])
        p = self.directions(t - t.mean(0), self.prior_rank)
        h_u, h_p = (sum((float(h @ q) * q for q in qs), torch.zeros_like(h)) for qs in (u, p))
        whole = length(h) ** 2 + 1e-6
        vcr = min(1.0, max(0.045, length(h_u) ** 2 / whole))
        pcr = min(0.92, length(h_p) ** 2 / whole)
        n = min(3.2, self.kappa * (1 - vcr) / (vcr + 1e-6))
        strength = min(3.8, self.lam * pcr / (1 - pcr + 1e-6))
        if not self.gates.above(("pcr", r), pcr, self.pcr_threshold, max(self.pcr_threshold, 1e-3)):
            strength = 0.0
        new = h_u + h_p / (1 + n + strength) + (h - h_u - h_p) / (1 + n)
        return 0.24 * h + 0.76 * new * (length(h) / length(new)) ** 0.74

    def directions(self, x, count):
        _, size, v = torch.linalg.svd(x, full_matrices=False)
        return [v[j] for j in range(min(count, len(size))) if size[j] > 1e-6 * size[0]]


@dataclass
class Only(Reference):
    """Keeps what ONLY needs of layer `layers[0]`: the weights [H, L, L] and values [L, Hkv, D]."""

    kept: dict = field(default_factory=dict)

    def attach(self, twin):
        v = ref.decoder(twin).layers[self.layers[0]].self_attn.v_proj
        return [v.register_forward_hook(lambda m, a, o: self.kept.__setitem__("value", o[0].clone()))]

    def mixed(self, a, layer):
        self.kept["weights"] = a.clone()
