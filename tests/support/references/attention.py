"""Float64 references of the attention and hidden-state methods, each written from its formula alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from tests.support.models import IMAGE, IMAGE_END
from tests.support.references import base as ref
from tests.support.references.base import Reference

# ---- scores and weights --------------------------------------------------------------------------------------------------


@dataclass
class ZeroTuning(Reference):
    rows: str = "all"
    rate: float = 1.0
    heads: tuple = (0, 1, 2, 3)

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            if h in self.heads:
                a[h, r, 0] *= self.rate
                a[h, r] /= sum(a[h, r].tolist())


@dataclass
class Factors(Reference):  # VAF and AVAR
    rows: str = "after_image"
    image: float = 1.0
    system: float = 1.0

    def scores(self, z, layer):
        for h, r in self.cells(z):
            z[h, r, self.visual] *= self.image
            z[h, r, : min(self.visual)] *= self.system


@dataclass
class VisualTopK(Reference):
    k: float = 1.0
    choosers: tuple = ()
    chosen: dict = field(default_factory=dict)

    def mixed(self, a, layer):
        count = max(1, round(self.k * len(self.visual)) if self.k <= 1 else int(self.k))
        for r in filter(self.edited, range(a.shape[1])):
            if layer in self.choosers or not self.choosers:
                shares = [
                    [float(head[r, j]) / sum(float(head[r, i]) for i in self.visual) for j in self.visual] for head in a
                ]
                votes = [sum(column) for column in zip(*shares, strict=True)]
                top = self.gates.largest((layer, r), votes, count)
                self.chosen[r] = [self.visual[i] for i in top if votes[i] > 0]
            if layer in self.choosers or r not in self.chosen:
                continue
            for h in range(a.shape[0]):
                a[h, r, [j for j in self.visual if j not in self.chosen[r]]] = 0
                a[h, r] /= sum(a[h, r].tolist())


@dataclass
class PADE(Reference):
    lam: float = 0.0
    scaled: bool = True
    seen: dict = field(default_factory=dict)  # row -> its image weights, layer by layer

    def scores(self, z, layer):
        self.raw = z.clone()

    def mixed(self, a, layer):
        for r in filter(self.edited, range(a.shape[1])):
            now = [sum(a[:, r, j].tolist()) / len(a) for j in self.visual]
            self.seen[r] = [now] if layer == self.layers[0] else [*self.seen[r], now]
            if layer != self.layers[-1]:
                continue
            pairs = list(zip(self.seen[r], self.seen[r][1:], strict=False))
            p = [sum(max(0.0, new[i] - old[i]) for old, new in pairs) / len(pairs) for i in range(len(now))]
            open_ = [max(a[:, r, j].tolist()) > 0 for j in self.visual]
            p = [v if seen else 0.0 for v, seen in zip(p, open_, strict=True)]
            p = [v / max(p) for v in p] if self.scaled else p
            for h in range(len(a)):
                shown = [j for j in range(r + 1) if a[h, r, j] > 0]
                z = {j: float(self.raw[h, r, j]) for j in shown}
                image = [z[j] for j in self.visual if j in z]
                mad = middle([abs(v - middle(image)) for v in image])
                added = [self.lam * mad * v for v in p]
                for j, d in zip(self.visual, added, strict=True):
                    if j in z:
                        z[j] += d
                for j in shown:
                    if j < min(self.visual):
                        z[j] -= sum(added) / sum(open_)
                total = sum(math.exp(v) for v in z.values())
                for j in shown:
                    a[h, r, j] = math.exp(z[j]) / total


def middle(values):
    """The lower median."""
    return sorted(values)[(len(values) - 1) // 2]


@dataclass
class FarSight(Reference):
    rows: str = "all"
    sigma: float = 0.0
    registers: int | None = None
    slopes: str = "one"

    def scores(self, z, layer):
        self.raw = z.clone()

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            decay = self.sigma * (2 ** (-8 * (h + 1) / len(a)) if self.slopes == "alibi" else 1)
            count = max(0, self.prompt_len - 1 - r) if self.registers is None else self.registers
            taken = sum(math.exp(-decay * d) for d in range(1, count + 1))
            shown = [j for j in range(a.shape[2]) if a[h, r, j] > 0]
            total = sum(math.exp(float(self.raw[h, r, j])) for j in shown) + taken
            for j in shown:
                a[h, r, j] = math.exp(float(self.raw[h, r, j])) / total


@dataclass
class LocoRE(Reference):
    beta: float = 0.0
    window: int = 0

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            for j in range(max(self.prompt_len, r + 1 - self.window), r + 1):
                a[h, r, j] *= 1 + self.beta
            a[h, r] /= sum(a[h, r].tolist())


@dataclass
class HGAI(Reference):
    alpha: float = 0.0

    def scores(self, z, layer):
        for r in filter(self.edited, range(z.shape[1])):
            for j in self.visual:
                mean = sum(map(abs, z[:, r, j].tolist())) / len(z)
                for h in range(len(z)):
                    z[h, r, j] += self.alpha * mean


@dataclass
class GIFT(Reference):
    """Two passes: the map from one over the plain model (no row that feeds it is edited), then the edit."""

    alpha: float = 0.0
    source: int = 0
    edited_layers: tuple = ()
    content: tuple | None = None  # rows whose words count for the map; None: all
    template: tuple | None = None  # its columns after the image and at the prompt's end; None: an end mark of the image
    map: dict = field(default_factory=dict)  # column -> m
    looking: bool = False
    query: range = range(0)

    def forward(self, twin, inputs, generated):
        self.read(inputs["input_ids"][0].tolist())
        given, self.looking = self.given, True
        if given and min(self.edited_layers) < self.source:  # the map was made in a pass over the prompt alone
            self.given = replace(given, plain=True)
        ref.teacher_forced(twin, self, inputs, generated[:0] if self.given is not given else generated)
        assert max(self.map.values()) == 1
        self.looking, self.given = False, given
        return ref.teacher_forced(twin, self, inputs, generated)

    def read(self, ids):
        first = max(self.visual) + 1
        head, tail = self.template or (int(ids[first] == IMAGE_END), 0)
        self.query = range(first + head, self.prompt_len - tail)

    def top(self, key, values):
        return self.gates.largest(key, values, len(values) // 2)

    def look(self, a):
        """[H, L, L] of the source layer."""
        shift = [dict.fromkeys(self.visual, 0.0) for _ in a]
        for h in range(len(a)):
            for q in self.query:
                if q == max(self.visual) + 1:
                    continue
                if self.content is None or q in self.content:
                    old, new = a[h, q - 1].tolist(), a[h, q].tolist()
                    for j in self.visual:
                        shift[h][j] += max(0.0, new[j] - old[j])
        chosen = self.top("map", [sum(s.values()) for s in shift])
        m = [sum(shift[h][j] for h in chosen) / len(chosen) for j in self.visual]
        mean = sum(m) / len(m)
        std = math.sqrt(sum((x - mean) ** 2 for x in m) / len(m))
        m = [min(max(x, mean - 3 * std), mean + 3 * std) for x in m]
        self.map = {j: (x - min(m)) / (max(m) - min(m)) for j, x in zip(self.visual, m, strict=True)}

    def mixed(self, a, layer):
        if self.looking and layer == self.source:
            self.look(a)
        if self.looking or layer not in self.edited_layers:
            return
        query = self.query
        for r in range(self.prompt_len - 1, a.shape[1]):
            old = a[:, r].clone()
            seeing = self.top(("seeing", layer, r), [float(sum(old[h, j] for j in self.visual)) for h in range(len(a))])
            reading = self.top(("reading", layer, r), [float(sum(old[h, j] for j in query)) for h in range(len(a))])
            for h in seeing:
                for j in self.visual:
                    a[h, r, j] *= math.exp(self.alpha * self.map[j])
            grown = sum(a[h, r, j] for h in seeing for j in self.visual) / sum(
                old[h, j] for h in seeing for j in self.visual
            )
            for h in reading:
                for j in query:
                    a[h, r, j] *= grown
            for h in range(len(a)):
                a[h, r] /= sum(a[h, r].tolist())


@dataclass
class ADHH(Reference):
    heads: tuple = ()
    threshold: float = 0.0
    hits: int = 0

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            if (layer, h) in self.heads:
                text = range(max(self.visual) + 1, r + 1)
                if self.gates.above((layer, h, r), sum(a[h, r, j].item() for j in text), self.threshold):
                    self.hits += 1
                    for j in text:
                        a[h, r, j] = 0


@dataclass
class SPIN(Reference):
    keep: int = 0
    epsilon: float = 1.0

    def scores(self, z, layer):
        self.dropped = {}
        for r in filter(self.edited, range(z.shape[1])):
            seen = [sum(float(z[h, r, j]) for j in self.visual) for h in range(len(z))]
            kept = self.gates.largest((layer, r), seen, self.keep)
            self.dropped[r] = [h for h in range(len(z)) if h not in kept]

    def mixed(self, a, layer):
        for r, heads in self.dropped.items():
            for h in heads:
                a[h, r] *= self.epsilon  # scales the head's output


@dataclass
class TAME(Reference):
    rows: str = "all"
    gamma: float = 0.8
    windows: dict = field(default_factory=dict)  # layer -> columns that it still holds when it decodes

    def projected(self, q, k, layer):
        self.q = [sum(float(x @ x) for x in q[:, r]) / len(q) for r in range(q.shape[1])]
        self.k = [sum(float(x @ x) for x in k[:, r]) / len(k) for r in range(k.shape[1])]

    def scores(self, z, layer):
        n = self.prompt_len
        for r in range(z.shape[1]):
            queries = sum(self.q[:n]) if r < n else self.q[r]
            keys = sum(self.k[max(0, r + 1 - self.windows.get(layer, r + 1)) : r + 1] if r >= n else self.k[:n])
            for trace in (queries, keys):
                z[:, r] *= 1 + self.gamma / math.log(max(trace, math.e))


@dataclass
class ACT(Reference):
    rows: str = "all"
    beta: float = 0.4
    threshold: float = 0.1
    heads: tuple = ()  # (layer, head); empty: all
    secondary: dict | None = None  # layer -> sinks of all heads, found in another way
    hits: int = 0

    def mixed(self, a, layer):
        for h in range(len(a)):
            if self.heads and (layer, h) not in self.heads:
                continue
            if self.secondary is not None:
                sinks = self.secondary[layer]
            else:
                seen = [[x for x in a[h, : self.prompt_len, j].tolist() if x] for j in range(self.prompt_len)]
                means = [sum(column) / len(column) for column in seen]
                t = self.threshold
                sinks = [j for j, m in enumerate(means) if self.gates.above((layer, h, j), m, t, t)][1:]
            self.hits += len(sinks)
            for r in range(a.shape[1]):
                old = a[h, r].tolist()
                rest = sum(x for j, x in enumerate(old) if j not in sinks)
                moved = sum(old[j] for j in sinks) * (1 - self.beta)
                new = [x * self.beta if j in sinks else x + moved * x / rest for j, x in enumerate(old)]
                assert abs(sum(new) - 1) < 1e-12
                a[h, r] = torch.tensor(new, dtype=a.dtype)


@dataclass
class PAINT(Reference):
    alpha: float = 0.7
    beta: float = 0.3
    share: float = 0.25
    sensitive: bool = False
    encoder: list = field(default_factory=list)  # per image (early [N], late [N])

    def strengths(self):
        """{column: strength}"""
        strength, columns = {}, iter(self.visual)
        for i, (early, late) in enumerate(self.encoder):
            n, early, late = len(early), early.tolist(), late.tolist()

            def quartile(q, values=late, n=n):
                place, values = q * (n - 1), sorted(values)
                low = math.floor(place)
                return values[low] + (place - low) * (values[min(low + 1, n - 1)] - values[low])

            bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
            local = self.gates.largest(("local", i), early, int(self.share * n))
            for j in range(n):
                summary = self.gates.above(("summary", i, j), late[j], bound, bound)
                strength[next(columns)] = self.beta if summary else self.alpha if j in local else 0.0
        return strength

    def forward(self, twin, inputs, generated):
        self.strength = self.strengths()
        return super().forward(twin, inputs, generated)

    def scores(self, z, layer):
        self.raw = z.clone()
        if not self.sensitive:
            for h, r in self.cells(z):
                for j in self.visual:
                    z[h, r, j] += self.strength[j] * abs(z[h, r, j])

    def mixed(self, a, layer):
        if self.sensitive:
            for r in filter(self.edited, range(a.shape[1])):
                seen = [sum(float(a[h, r, j]) for j in self.visual) for h in range(len(a))]
                for h in range(len(a)):
                    for j in self.visual:
                        a[h, r, j] *= math.exp(seen[h] / max(seen) * self.strength[j] * abs(float(self.raw[h, r, j])))
                    a[h, r] /= a[h, r].sum()


@dataclass
class HeadPursuit(Reference):
    factors: dict = field(default_factory=dict)  # (layer, head) -> factor on the edited rows

    def scale(self, out, layer):
        out = out.clone()
        for (i, head), factor in self.factors.items():
            for r in filter(self.edited, range(out.shape[1])):
                if i == layer:
                    out[head, r] = out[head, r] * factor
        return out


@dataclass
class Chain(Reference):
    """A stack: scores in the order listed, then the log-weights of columns, then weights and heads in the order listed."""

    runs: list = field(default_factory=list)

    def each(self, layer, name, *args):
        for run in sorted(self.runs, key=lambda run: name == "mixed" and not isinstance(run, ZeroTuning | LocoRE)):
            run.inputs = self.inputs
            if layer in run.layers:
                getattr(run, name)(*args, layer)

    def forward(self, twin, inputs, generated):
        looking = [run for run in self.runs if isinstance(run, GIFT)]
        for run in looking:
            run.looking = True
            run.read(inputs["input_ids"][0].tolist())
        if looking:
            ref.teacher_forced(twin, self, inputs, generated)
        for run in looking:
            run.looking = False
        return ref.teacher_forced(twin, self, inputs, generated)

    def projected(self, q, k, layer):
        self.each(layer, "projected", q, k)

    def scores(self, z, layer):
        self.each(layer, "scores", z)

    def mixed(self, a, layer):
        self.each(layer, "mixed", a)

    def scale(self, out, layer):
        for run in self.runs:
            out = run.scale(out, layer) if layer in run.layers else out
        return out


# ---- hidden states, positions and masks --------------------------------------------------------------------------------


@dataclass
class IRI(Reference):
    """Hooks that inject what earlier layers wrote to the residual stream, row by row."""

    rates: dict = field(default_factory=dict)  # "attention" or "mlp" -> a rate for each layer
    strength: dict = field(default_factory=dict)
    sources: int = 0
    targets: int = 0

    def attach(self, twin):
        handles, kept = [], {}
        for part, rates in self.rates.items():
            order = sorted(range(len(rates)), key=lambda i: rates[i], reverse=True)
            targets = [i for i in order[: self.targets] if i in self.layers]
            for i, layer in enumerate(ref.decoder(twin).layers):

                def inject(module, args, output, i=i, part=part, src=order[: self.sources], tgt=targets):
                    x = (output[0] if isinstance(output, tuple) else output).clone()
                    kept[part, i] = x.clone()
                    for r in filter(self.edited, range(x.shape[1])) if i in tgt else []:
                        a, b = x[0, r], x[0, r].clone()
                        for k in src:
                            if k < i:
                                b = b + self.strength[part] * self.rates[part][k] * kept[part, k][0, r]
                        x[0, r] = b * (a.pow(2).sum().sqrt() / b.pow(2).sum().sqrt())
                    return (x, *output[1:]) if isinstance(output, tuple) else x

                handles.append(writer(layer, part).register_forward_hook(inject))
        return handles


def writer(layer, part):
    """The module whose output joins the residual stream: in Gemma 3 a norm follows attention and MLP."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.post_attention_layernorm if part == "attention" else layer.post_feedforward_layernorm
    return layer.self_attn if part == "attention" else layer.mlp


@dataclass
class CCA(Reference):
    grids: list = field(default_factory=list)  # per image (height, width) in tokens
    mrope: bool = False
    positions: bool = True
    mask: bool = True

    def extra(self, full):
        where, self.rings = concentric(full["input_ids"][0].tolist(), self.grids, self.mrope, self.positions)
        return {"position_ids": where[:, None] if self.mrope else where[:1]}

    def visible(self, mask):
        mask = mask.clone()
        for q, (image, ring) in self.rings.items() if self.mask else ():
            for k, (other, inner) in self.rings.items():
                if image == other:
                    mask[q, k] = 0 if inner <= ring else torch.finfo(mask.dtype).min
        return mask


def concentric(ids, grids, mrope, positions=True):
    """By hand, image by image: [3, n] position ids (equal, but for M-RoPE's own), and (image, ring) of image columns."""
    place, where, rings, i, grids = 0, [], {}, 0, list(grids)
    while i < len(ids):
        if ids[i] != IMAGE:
            where.append([place] * 3)
            place, i = place + 1, i + 1
            continue
        height, width = grids.pop(0)
        for y in range(height):
            for x in range(width):
                ring = min(y, x, height - 1 - y, width - 1 - x)
                rings[i + width * y + x] = (i, ring)
                own = [place, place + y, place + x] if mrope else [place + width * y + x] * 3
                where.append([place + ring] * 3 if positions else own)
        if positions:
            place += (min(height, width) + 1) // 2
        else:
            place += max(height, width) if mrope else height * width
        i += height * width
    return torch.tensor(where).T, rings


# ---- what methods look at besides ----------------------------------------------------------------------------------------


def secondary(gates, states, prompt_len, cosine, more, fewer):
    """{layer: columns} that live more than `more` and fewer than `fewer` layers, from the inputs [L, C] of all layers and
    the output of the final norm."""

    def dot(x, y):
        return sum(p * q for p, q in zip(x, y, strict=True))

    states = [x[:prompt_len].tolist() for x in states]
    norms = [sum(math.sqrt(dot(x[j], x[j])) for x in states) for j in range(3)]
    bos = gates.largest("bos", norms, 1)[0]
    alive: dict[int, list[int]] = {}
    for layer, x in enumerate(states):
        for j in range(bos, prompt_len):
            cos = abs(dot(x[j], x[bos])) / math.sqrt(dot(x[j], x[j]) * dot(x[bos], x[bos]))
            if j == bos or gates.above((layer, j), cos, cosine):
                alive.setdefault(j, []).append(layer)
    kept = [j for j, life in alive.items() if more < len(life) < fewer]
    return {layer: [j for j in kept if layer in alive[j]] for layer in range(len(states) - 1)}


@torch.no_grad()
def encoder_scores(net, inputs, layers):
    """Per image, per layer [N] in float64: the class token's attention, or without one the attention received, by loops."""
    seen, grids = {}, inputs.get("image_grid_thw")
    if grids is None:
        blocks = [m for m in net.model.vision_tower.modules() if type(m).__name__ == "CLIPAttention"]
    else:
        blocks = [b.attn for b in net.model.visual.blocks]

    def keep(i):
        return lambda m, a, k: seen.__setitem__(i, ((a[0] if a else k["hidden_states"]).clone(), k))

    hooks = [blocks[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    extra = {} if grids is None else {"image_grid_thw": grids}
    pixels = inputs["pixel_values"].to(next(net.parameters()).dtype)
    net.model.get_image_features(pixels, return_dict=True, **extra)
    for hook in hooks:
        hook.remove()
    result = []
    if grids is None:
        for n in range(len(pixels)):
            found = []
            for i in layers:
                q, k = (f(seen[i][0][n]).view(37, 4, 8).double() for f in (blocks[i].q_proj, blocks[i].k_proj))
                heads = [torch.stack([q[0, h] @ k[j, h] * 8**-0.5 for j in range(37)]).softmax(dim=0) for h in range(4)]
                found.append(sum(heads)[1:])
            result.append(found)
        return result
    start = 0
    for (_, h, w), order in zip(grids.tolist(), window_order(grids), strict=True):
        found = []
        for i in layers:
            x, kw = seen[i]
            cos, sin = kw["position_embeddings"]
            q, k, _ = blocks[i].qkv(x).view(len(x), 3, 2, 16).permute(1, 2, 0, 3).double()
            q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
            s = ref.received(q[:, start : start + h * w], k[:, start : start + h * w], 16**-0.5)
            restored = torch.zeros(h * w // 4, dtype=torch.float64)
            for u, place in enumerate(order):
                restored[place] = s[4 * u : 4 * u + 4].mean()
            found.append(restored)
        result.append(found)
        start += h * w
    return result


def window_order(grids):
    """Qwen2.5-VL's window order by hand: windows of 2 x 2 merge units (16 px / 4 px / 2), row by row."""
    result = []
    for _, h, w in grids.tolist():
        h, w = h // 2, w // 2
        result.append(
            [
                y * w + x
                for wy in range(0, h, 2)
                for wx in range(0, w, 2)
                for y in range(wy, min(wy + 2, h))
                for x in range(wx, min(wx + 2, w))
            ]
        )
    return result
