"""Float64 references of contrasts: every branch recomputed from scratch for every token."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import torch

import vlm_fix
from tests.support.models import IMAGE
from tests.support.references import base as ref
from tests.support.references.attention import window_order
from tests.support.references.decoding import Cake, second_prompt


@dataclass
class SidReference(ref.Reference):
    keep: float = 100 / 576
    first: int = 2
    refresh: bool = True
    rows: str = "all"
    means: dict = field(default_factory=dict)

    def weight(self, a, layer, head, row):
        if layer == self.first - 1:
            self.means[row] = self.means.get(row, 0) + a
        return a

    def score(self, z, layer, head, row):
        if layer < self.first:
            return z
        s = self.means[max(row, self.prompt_len - 1) if self.refresh else self.prompt_len - 1]
        count = max(1, round(self.keep * len(self.visual))) if self.keep <= 1 else int(self.keep)
        stay, z = sorted(self.visual, key=lambda j: (float(s[j]), j))[:count], z.clone()
        for j in self.visual:
            if j not in stay:
                z[j] = -math.inf
        return z


@dataclass
class TextReference(SidReference):
    """CRoPS's text branch: the least attended columns of all, how many by the row's own token."""

    counts: object = None

    def edited(self, row):
        return True

    def score(self, z, layer, head, row):
        if layer < self.first:
            return z
        last = max(row, self.prompt_len - 1)
        seen = sorted(range(last + 1), key=lambda j: (float(self.means[last][j]), j))
        stay, z = seen[: self.counts(last - self.prompt_len + 2)], z.clone()
        stay = stay if min(stay) <= row else [row]
        for j in range(len(z)):
            if j not in stay:
                z[j] = -math.inf
        return z


@dataclass
class OwlReference(ref.Reference):
    """Reads the ratios of the model as it is (sign 0), or edits scores by them."""

    method: object = None
    sign: int = 0
    ratio: dict = field(default_factory=dict)
    heads: int = 4

    def columns(self):
        """Text of the prompt before the first and after the last image."""
        return [j for j in range(self.prompt_len) if j < min(self.visual) or j > max(self.visual)]

    def weight(self, a, layer, head, row):
        if not self.sign:
            seen, read = sum(a[self.visual].tolist()), sum(a[self.columns()].tolist())
            self.ratio[layer, row] = self.ratio.get((layer, row), 0.0) + seen / read / self.heads
        return a

    def score(self, z, layer, head, row):
        m, z = self.method, z.clone()
        if not self.sign:
            return z
        a, b = m.alpha, m.beta_text
        if m.base is not None:
            x, y = self.ratio[layer, row], m.base[self.layers.index(layer)]
            if x < y:
                a, b = (min(m.cap, s + m.boost * abs(x - y) / y) for s in (a, b))
        for j in self.visual:
            z[j] = z[j] + self.sign * a * abs(z[j])
        for j in self.columns():
            if j > 0:
                z[j] = z[j] - self.sign * b * abs(z[j])
        return z


@dataclass
class AscdReference(ref.Reference):
    """The main branch (`heads` given) or the other one."""

    method: object = None
    heads: tuple | None = None

    def score(self, z, layer, head, row):
        m, new = self.method, z.clone()
        if self.heads is not None:
            for j in self.visual if (layer, head) in self.heads else ():
                new[j] = z[j] + m.boost * abs(z[j])
            return new
        n = len(self.visual)
        count = max(1, math.floor(m.critical * n)) if m.critical <= 1 else int(m.critical)
        for j in sorted(self.visual, key=lambda j: (-float(z[j]), j))[:count]:
            new[j] = z[j] - m.damp * abs(z[j])
        return new


@dataclass
class DecoreReference(ref.Reference):
    heads: tuple = ()

    def score(self, z, layer, head, row):
        return torch.zeros_like(z) if (layer, head) in self.heads else z


@dataclass
class Look(ref.Reference):
    rows: str = "all"
    seen: dict = field(default_factory=dict)

    def weight(self, a, layer, head, row):
        if row == self.prompt_len - 1:
            self.seen[layer] = self.seen.get(layer, 0) + a[self.visual] / 4
        return a


def mixed(*places):
    """CausalMM's stateless draw, in Python's own integers."""
    x, whole = 1, 2**64
    for place in places:
        x = (x + place) * 0x2545F4914F6CDD1D % whole
        x = (x ^ (x >> 29) & 0x7FFFFFFFF) * 0x1B873593CC9E2D51 % whole
        x ^= x >> 32
    return (x >> 11) / 2**53


@dataclass
class CausalReference(ref.Reference):
    how: str = ""
    seed: int = 0
    rows: str = "all"

    def weight(self, a, layer, head, row):
        n, new, top = row + 1, torch.zeros_like(a), max(a.tolist())
        for j in range(n):
            if self.how.startswith("reverse"):
                new[j] = top - a[j]
            else:
                new[j] = 1 / n if self.how == "uniform" else mixed(self.seed, layer, head, row, j)
        if self.how == "reverse":
            return new
        return new / new.sum() if new.sum() else a


def bilinear(a, h, w):
    """[S, S] -> [h, w], each point between its four nearest entries, by hand."""

    def near(i, n):
        x = max((i + 0.5) * len(a) / n - 0.5, 0)
        low = min(int(x), len(a) - 1)
        return low, min(low + 1, len(a) - 1), x - int(x)

    out = torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            (p, q, s), (u, v, t) = near(i, h), near(j, w)
            out[i, j] = (1 - s) * ((1 - t) * a[p, u] + t * a[p, v]) + s * ((1 - t) * a[q, u] + t * a[q, v])
    return out


@torch.no_grad()
def causal_images(twin, method, inputs):
    """[N, C] image embeddings under the counterfactual attention, image by image."""
    pixels, grids, seen = inputs["pixel_values"].double(), inputs.get("image_grid_thw"), []
    blocks = [m for m in twin.modules() if type(m).__name__ in ("CLIPAttention", "Qwen2_5_VLVisionAttention")]
    hook = blocks[1 if grids is not None else 2].register_forward_pre_hook(
        lambda m, a, k: seen.append((m, (a[0] if a else k["hidden_states"]).clone(), k)), with_kwargs=True
    )
    extra = {} if grids is None else {"image_grid_thw": grids}
    features = torch.cat(list(twin.model.get_image_features(pixels, return_dict=True, **extra).pooler_output))
    hook.remove()
    (attn, x, kwargs), parts, start, unit = *seen, [], 0, 0
    if grids is None:
        states = twin.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    for n in range(len(pixels) if grids is None else len(grids)):
        if grids is None:
            q, k = (f(x[n]).view(37, 4, 8).transpose(0, 1) for f in (attn.q_proj, attn.k_proj))
            own, h, w = pixels[n], 6, 6
        else:
            (_, h, w), (cos, sin) = grids[n].tolist(), kwargs["position_embeddings"]
            q, k, _ = attn.qkv(x).view(len(x), 3, 2, 16).permute(1, 2, 0, 3)
            q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
            q, k, own = q[:, start : start + h * w], k[:, start : start + h * w], pixels[start : start + h * w]
            start, h, w = start + h * w, h // 2, w // 2
        draw = torch.Generator().manual_seed(zlib.crc32(own.float().contiguous().numpy().tobytes(), method.seed))
        total = 0
        for a, b in zip(q, k, strict=True):
            a = (a @ b.T / math.sqrt(a.shape[1])).softmax(-1)
            if method.vision == "shuffle":
                a = a.flatten()[torch.randperm(a.numel(), generator=draw)].view_as(a)
            elif method.vision == "random":
                a = 2 * torch.rand(a.shape, generator=draw).double()
            else:
                a = a.max() - a if method.vision == "reversed" else torch.full_like(a, a.mean())
            total = total + bilinear(a, h, w) / len(q)
        factor = total.flatten()[:, None]
        parts.append(
            twin.model.multi_modal_projector(states[n] * factor)
            if grids is None
            else features[unit : unit + h * w] * factor
        )
        unit += h * w
    return torch.cat(parts)


def with_embeddings(twin, change, *args):
    """`teacher_forced` with the image embeddings [N, C] changed on the way into the language model."""

    def hook(module, args, kwargs):
        x = kwargs["inputs_embeds"].clone()
        x[0, args_visual] = change(x[0, args_visual])
        return args, {**kwargs, "inputs_embeds": x}

    args_visual = ref.visual_columns(args[1]["input_ids"])
    handle = twin.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return ref.teacher_forced(twin, *args)
    finally:
        handle.remove()


@torch.no_grad()
def shield_images(twin, method, inputs):
    """[N, C] image embeddings without the tower's mean answer to noise, image by image."""
    pixels, grids, parts, start = inputs["pixel_values"].double(), inputs.get("image_grid_thw"), [], 0
    projector = twin.model.visual.merger if grids is not None else twin.model.multi_modal_projector
    before = []
    hook = projector.register_forward_pre_hook(lambda m, args: before.append(args[0].clone()))
    orders = [] if grids is None else [torch.tensor(order) for order in window_order(grids)]
    for n in range(len(pixels) if grids is None else len(grids)):
        size = 1 if grids is None else int(grids[n].prod())
        own = pixels[start : start + size]
        draw = torch.Generator().manual_seed(method.seed)
        noise = torch.rand(method.samples, *(own.shape if size > 1 else own.shape[1:]), generator=draw)
        if grids is not None:  # both frames of a patch are the same picture
            for c in range(3):
                first = noise[..., 32 * c : 32 * c + 16].clone()
                noise[..., 32 * c + 16 : 32 * c + 32] = first
        total = 0
        for image in [own, *noise.double()]:
            extra = {} if grids is None else {"image_grid_thw": grids[n : n + 1]}
            twin.model.get_image_features(image if size > 1 else image.view(1, *own.shape[1:]), **extra)
            total = total + (before[-1] if len(before) == 1 else -method.bias * before[-1] / method.samples)
        before.clear()
        z = projector(total)
        if grids is not None:
            place = torch.empty_like(orders[n])
            place[orders[n]] = torch.arange(len(place))
            z = z.view(len(place), -1)[place]
        parts.append(z.view(-1, z.shape[-1]))
        before.clear()
        start += size
    hook.remove()
    return torch.cat(parts)


ATTACKED = {}  # pixels do not depend on the answer


def shield_pixels(model, method, inputs):
    """pixel_values after the attack, image by image: torch's Adam on gradients through the model's own tower."""
    pixels, grids, parts, start = inputs["pixel_values"], inputs.get("image_grid_thw"), [], 0
    key = (id(model), method, pixels.detach().float().numpy().tobytes())
    if key in ATTACKED:
        return ATTACKED[key]
    projector, seen = model.model.visual.merger if grids is not None else model.model.multi_modal_projector, []
    hook = projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for n in range(len(pixels) if grids is None else len(grids)):
        size = 1 if grids is None else int(grids[n].prod())
        v = pixels[start : start + size]
        extra = {} if grids is None else {"image_grid_thw": grids[n : n + 1]}

        def states(x, extra=extra):
            model.model.get_image_features(x, **extra)
            tokens = seen.pop()
            return tokens[0] if grids is None else tokens.reshape(-1, 4 * tokens.shape[-1])

        crc = zlib.crc32(v.float().contiguous().numpy().tobytes(), method.seed)
        shape = v.shape if grids is None else (len(v), 3, 1, 16)
        frames = (lambda d: d) if grids is None else lambda d: d.expand(-1, -1, 2, -1).reshape(len(d), -1)
        d = torch.rand(shape, generator=torch.Generator().manual_seed(crc)).to(v)
        d = (method.lr * (2 * d - 1)).clamp(-method.epsilon, method.epsilon).requires_grad_()
        adam, low, high = torch.optim.Adam([d], lr=method.lr), float(v.min()), float(v.max())
        with torch.enable_grad():
            clean = states(v).detach()
            for _ in range(method.steps):
                x = states((v + method.scale * frames(d)).clamp(low, high))
                near = [(a @ b) / a.norm() / b.norm() for a, b in zip(x, clean, strict=True)]
                loss = sum(near) / len(near)
                if loss < 0:
                    break
                (d.grad,) = torch.autograd.grad(loss, d)
                adam.step()
                d.data.clamp_(-method.epsilon, method.epsilon)
        parts.append((v + method.scale * frames(d.detach())).clamp(low, high))
        start += size
    hook.remove()
    ATTACKED[key] = torch.cat(parts)
    return ATTACKED[key]


def iava_kept(twin, method, inputs):
    """[N] 1 for irrelevant image tokens, by the formula."""
    ids, sums = inputs["input_ids"][0].tolist(), []
    at = max(i for i, t in enumerate(ids) if t == IMAGE) + 1
    at += ids[at] == 94
    for prompt in (ids[:at] + list(method.tokens), ids):
        new = torch.tensor([prompt])
        run = Look(ref.visual_columns(new), len(prompt), [0, 1, 2, 3])
        ref.teacher_forced(twin, run, {**inputs, "input_ids": new}, new[0, :0])
        sums.append([[float(v) for v in run.seen[i]] for i in range(4)])
    mass = [sum(layer) for layer in sums[0]]
    used, held = [], 0.0
    for i in sorted(range(4), key=lambda i: -mass[i]):
        if held < method.coverage * sum(mass):
            used.append(i)
            held += mass[i]
    g, u = ([sum(s[i][j] for i in used) / len(used) for j in range(len(s[0]))] for s in sums)
    d = [a - b for a, b in zip(g, u, strict=True)]

    def limit(x, c):
        mean = sum(x) / len(x)
        return mean + c * math.sqrt(sum((v - mean) ** 2 for v in x) / len(x))

    kept = [a > limit(g, method.high) and b > limit(d, method.drop) for a, b in zip(g, d, strict=True)]
    return torch.tensor(kept, dtype=torch.float64)


def avisc_kept(twin, method, inputs):
    """[N] 1 for blind image tokens, by the formula."""
    run = Look(ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1], [0, 1, 2, 3])
    ref.teacher_forced(twin, run, inputs, inputs["input_ids"][0, :0])
    rows = [[float(v) for v in run.seen[i]] for i in range(4)]
    used, held = [], 0.0
    for i in sorted(range(4), key=lambda i: -sum(rows[i])):
        if held < method.coverage * sum(map(sum, rows)):
            used.append(i)
            held += sum(rows[i])
    a = [sum(rows[i][j] for i in used) / len(used) for j in range(len(rows[0]))]
    mean = sum(a) / len(a)
    limit = mean + method.lam * math.sqrt(sum((v - mean) ** 2 for v in a) / (len(a) - 1))
    return torch.tensor([v >= limit for v in a], dtype=torch.float64)


def branches(model, twin, spec, inputs, answer):
    """Logits [V] of the token after `answer` in the main branch and in the others, one unpadded sample, all from scratch."""
    method, ids = vlm_fix.parse_spec(spec), inputs["input_ids"]
    n, visual = ids.shape[1], ref.visual_columns(ids)
    run = ref.PaiReference(visual, n, [2, 3], alpha=method.alpha) if method.name == "pai" else None
    if method.name == "ascd":
        method = method.resolve(vlm_fix.families.arch_of(model))
        heads = tuple(tuple(map(int, item.split("."))) for item in method.head_list or ())
        run = AscdReference(visual, n, list(method.layers), method=method, heads=heads)
    if method.name == "shield" and method.bias:
        new = shield_images(twin, method, inputs)
        main, others = with_embeddings(twin, lambda x: new, None, inputs, answer)[-1], []
    else:
        main, others = ref.teacher_forced(twin, run, inputs, answer)[-1], []
    if method.name == "vcd":
        call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), inputs)
        noised = {**inputs, "pixel_values": method.noised(inputs["pixel_values"], call)}
        others.append(ref.teacher_forced(twin, None, noised, answer))
    elif method.name == "shield":
        attacked = {**inputs, "pixel_values": shield_pixels(model, method, inputs)}
        others.append(ref.teacher_forced(twin, None, attacked, answer))
    elif method.name == "ritual":  # its transforms have loops of their own, in test_ritual.py
        call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), inputs)
        others.append(ref.teacher_forced(twin, None, method.negative(call), answer))
    elif method.name in ("pai", "m3id", "icd", "marine"):
        prompt = second_prompt("icd" if method.name in ("icd", "marine") else "m3id", inputs)
        others.append(ref.teacher_forced(twin, None, prompt, answer))
    elif method.name == "sid":
        first = int(str(method.layers or 2).rstrip("-"))
        run = SidReference(visual, n, [0, 1, 2, 3], keep=method.keep, refresh=method.refresh, first=first)
        others.append(ref.teacher_forced(twin, run, inputs, answer))
    elif method.name == "crops":
        if method.alpha:
            run = SidReference(visual, n, [0, 1, 2, 3], keep=method.keep)
            others.append(ref.teacher_forced(twin, run, inputs, answer))
        if method.decay:
            prompt = second_prompt("m3id", inputs)
            run = TextReference([], prompt["input_ids"].shape[1], [0, 1, 2, 3])
            run.counts = lambda t: math.floor(
                method.text_low + method.text_more * (1 - math.exp(-method.text_rate * t))
            )
            others.append(ref.teacher_forced(twin, run, prompt, answer))
    elif method.name == "owl":
        layers = list(method.resolve(vlm_fix.families.arch_of(model)).layers)
        plain = OwlReference(visual, n, layers, method=method)
        ref.teacher_forced(twin, plain, inputs, answer)
        for sign in (1, -1):
            run = OwlReference(visual, n, layers, method=method, sign=sign, ratio=plain.ratio)
            others.append(ref.teacher_forced(twin, run, inputs, answer))
    elif method.name == "ascd":
        run = AscdReference(visual, n, list(method.layers), method=method)
        others.append(ref.teacher_forced(twin, run, inputs, answer))
    elif method.name == "decore":
        heads = tuple(tuple(map(int, item.split("."))) for item in method.head_list)
        others.append(ref.teacher_forced(twin, DecoreReference(visual, n, [0, 1, 2, 3], heads=heads), inputs, answer))
    elif method.name == "layercake":
        m = method.resolve(vlm_fix.families.arch_of(model))
        run = Cake(visual, n, list(m.layers), m.prompt_rows, ids=[*ids[0].tolist(), *answer.tolist()], method=m)
        others.append(ref.teacher_forced(twin, run, inputs, answer))
    elif method.name == "iava":
        kept = iava_kept(twin, method, inputs)
        others.append(with_embeddings(twin, lambda x: x * kept[:, None], None, inputs, answer))
    elif method.name == "avisc":
        kept = avisc_kept(twin, method, inputs)
        others.append(with_embeddings(twin, lambda x: x * kept[:, None], None, inputs, answer))
    elif method.name == "causalmm":
        if method.vision != "none":
            new = causal_images(twin, method, inputs)
            others.append(with_embeddings(twin, lambda x: new, None, inputs, answer))
        if method.language != "none":
            layers = method.resolve(vlm_fix.families.arch_of(model)).layers
            run = CausalReference(visual, n, layers, how=method.language, seed=method.seed)
            others.append(ref.teacher_forced(twin, run, inputs, answer))
    return main, [o[-1] for o in others]


def contrasted(method, step, main, others):
    """(1 + sum of the weights) main - weight * others [V], cut off: of logits or of log-probabilities, as they are given."""
    p, weight = main.softmax(-1), getattr(method, "alpha", None)
    if method.name == "causalmm":
        weight = method.gamma
    elif method.name == "pai":
        weight = method.gamma - 1
    elif method.name == "m3id":
        g = math.exp(-method.decay * (step + 1))
        weight = (1 - g) / g
    elif method.name == "decore":
        entropy = -sum(float(v) * math.log(float(v)) for v in p if v > 0)
        weight = method.alpha * (entropy / math.log(len(p)) if method.normalised else entropy)
        weight = min(weight, math.inf if method.cap is None else method.cap)
    if method.name == "marine":
        return gated(method, main, main + method.gamma * (others[0] - main))
    if method.name == "crops":
        return crops(method, step + 1, main, others)
    z = main + sum(weight * (main - other) for other in others)
    if method.name == "ritual":
        z = main + weight * others[0]
    if method.name == "owl":
        z = (1 + method.lam) * others[0] - method.lam * others[1]
    z = z.masked_fill(torch.tensor([float(v) < method.beta * float(p.max()) for v in p]), -math.inf)
    return gated(method, main, z)


def crops(method, t, main, others):
    """CRoPS's generalised contrast of log-probabilities [V], token by token, as its official sampler writes it."""
    p = main.softmax(-1).tolist()
    kept = [v for v in range(len(p)) if p[v] >= method.beta * max(p)]
    total = sum(p[v] for v in kept)
    if max(p) / total >= method.gate:
        return main
    others, z = [o.log_softmax(-1) for o in others], torch.full_like(main, -math.inf)
    image, text = others[0] if method.alpha else None, others[-1] if method.decay else None
    gamma = math.exp(-method.decay * t)
    for v in kept:
        own = math.log(p[v] / total)
        z[v] = own + (0 if text is None else (1 - gamma) / gamma * (own - float(text[v])))
        z[v] = z[v] if image is None else (1 + method.alpha) * z[v] - method.alpha * float(image[v])
    return z


def gated(method, main, z):
    """Scores z [V] as `gate` and `entropy` leave them, token by token."""
    p = main.softmax(-1).tolist()
    if max(p) >= method.gate < 1:
        return main
    h = -sum(v * math.log(v) for v in p if v > 0)
    w = {"none": 1.0, "nats": h, "normalised": h / math.log(len(p))}[method.entropy]
    return torch.stack([a if a == -math.inf else b + w * (a - b) for a, b in zip(z, main, strict=True)])


def distribution(model, twin, spec, inputs, answer):
    """Log-probabilities [V] of the token after `answer`."""
    main, others = branches(model, twin, spec, inputs, answer)
    return contrasted(vlm_fix.parse_spec(spec), len(answer), main, others).log_softmax(-1)
