"""Float64 references of pruners before the language model that read more of the tower, of the question, or of frames."""

from __future__ import annotations

import itertools
import math

import torch

from tests.support.references import base as ref
from tests.support.references.attention import window_order
from tests.support.references.pruning_before import best, closest, images_of, ranked


def cosine(a, b):
    return float(a.flatten() @ b.flatten()) / float(a.norm()) / float(b.norm())


# ---- choices ----------------------------------------------------------------------------------------------------------------


def cdpruner(image, budget, method):
    z, words = image["z"], image["question"]
    n = len(z)
    s = [sum(cosine(x, e) for e in words) / len(words) for x in z]
    s = [-v for v in s] if method.inverse else s
    r = [(v - min(s) + 1e-6) / (max(s) - min(s)) for v in s]
    if method.theta is not None:
        r = [math.exp(method.theta / 2 / (1 - method.theta) * v) for v in r]
    kernel = torch.tensor([[r[i] * cosine(z[i], z[j]) * r[j] for j in range(n)] for i in range(n)], dtype=torch.float64)
    kept = []
    while len(kept) < budget:  # by determinants themselves
        before = float(torch.linalg.det(kernel[kept][:, kept])) if kept else 1.0
        free = [i for i in range(n) if i not in kept]
        gains = {i: float(torch.linalg.det(kernel[[*kept, i]][:, [*kept, i]])) / before for i in free}
        if max(gains.values()) <= max(float(kernel[i, i]) for i in range(n)) / 1e6:
            kept += ranked([float(kernel[i, i]) for i in range(n)], free)[: budget - len(kept)]
            break
        kept.append(best(gains, free))
    return sorted(kept)


def vispruner(image, budget, method):
    a = image["first"][max(image["first"])]
    order = ranked(a, range(len(a)))
    important = math.floor(budget * method.important)
    kept, rest = order[:important], order[important:]
    wanted = budget - important
    while wanted and len(rest) > wanted:
        even, odd = [rest[i] for i in range(0, len(rest), 2)], [rest[i] for i in range(1, len(rest), 2)]
        alike = {i: max(cosine(image["raw"][i], image["raw"][j]) for j in odd) for i in even}
        go = min(method.step, len(rest) - wanted, len(even))
        rest = sorted(even, key=lambda i: -round(alike[i], 12))[go:] + odd
    return sorted(kept + (rest if wanted else []))


def holov(image, budget, method):
    a, z = [float(v) for v in image["first"][max(image["first"])]], image["z"]
    n, crops = len(z), min(method.crops, len(z))
    runs, start = [], 0
    for p in range(crops):
        size = n // crops + (p < n % crops)
        runs.append(range(start, start + size))
        start += size
    scores = []
    for run in runs:
        if len(run) == 1:
            scores.append(a[run[0]])
            continue
        variance = []
        for i in run:
            row = [0.0 if i == j else cosine(z[i], z[j]) for j in run]
            mean = sum(row) / (len(run) - 1)
            variance.append(sum((v - mean) ** 2 for v in row) / (len(run) - 1))
        level = sum(1000 * a[i] for i in run) / len(run)
        gain = level / (sum(variance) / len(run) + 1e-6)
        scores.append(level + method.alpha * gain * sum(variance) / len(run))
    quotas = [min(math.floor(budget * s / (sum(scores) + 1e-6)), len(run)) for s, run in zip(scores, runs, strict=True)]
    while sum(quotas) < budget:
        for p in ranked(scores, range(crops)):
            if sum(quotas) < budget and quotas[p] < len(runs[p]):
                quotas[p] += 1
    return sorted(i for run, q in zip(runs, quotas, strict=True) for i in ranked(a, run)[:q])


def scope(image, budget, method):
    a, x = image["first"][max(image["first"])], image["raw"]
    n = len(x)
    alike, covered, kept = [[cosine(p, q) for q in x] for p in x], [0.0] * n, []
    while len(kept) < budget:
        gains = [
            float(a[j]) ** method.alpha * sum(max(0.0, alike[i][j] - covered[i]) for i in range(n)) for j in range(n)
        ]
        kept.append(best(gains, [j for j in range(n) if j not in kept]))
        covered = [max(covered[i], alike[i][kept[-1]]) for i in range(n)]
    return sorted(kept)


def flowcut(image, budget, method):
    layers = sorted(image["flow"])[:-1] or sorted(image["flow"])
    alive, memory = list(range(len(image["z"]))), {}
    for step, layer in enumerate(layers):
        rows = image["flow"][layer]
        relation, semantic = (sum(rows[i][k] for i in alive) for k in (0, 1))
        a = {i: rows[i][0] / relation for i in alive}
        for i in alive:
            score = (a[i] + (rows[i][1] / semantic if semantic else 0.0)) * rows[i][2]
            memory[i] = score if not step else (1 - method.memory) * memory[i] + method.memory * score
        d = len(layers) - 1 - step
        if d % 2 or len(alive) <= budget:
            continue
        entropy = -sum(v * math.log(v) for v in a.values()) / math.log(len(alive))
        drop = round((len(alive) - budget) / math.sqrt(d) * (1 - entropy**2)) if d else len(alive)
        alive = sorted(ranked(memory, alive)[: max(budget, len(alive) - drop)])
    return alive


def agilepruner(image, budget, method):
    x = image["z"] if method.space == "projected" else image["raw"]
    a = image["first"][max(image["first"])]
    values = torch.linalg.eigvalsh(torch.stack([p.flatten() for p in x]) @ torch.stack([p.flatten() for p in x]).T)
    p = [math.sqrt(max(0.0, float(v))) for v in values]
    p = [v / sum(p) for v in p if v / sum(p) > 1e-12]
    ratio = math.exp(-sum(v * math.log(v) for v in p)) / method.erank_avg if method.erank_avg else 1.0
    kept, left = [], list(range(len(x)))
    while len(kept) < budget:
        if not left:
            return sorted(kept + ranked(a, [i for i in range(len(x)) if i not in kept])[: budget - len(kept)])
        kept.append(ranked(a, left)[0])
        tau = min(method.tau_max, method.slope * len(kept) * ratio)
        left = [i for i in left if i != kept[-1] and 1 - cosine(x[i], x[kept[-1]]) >= tau]
    return sorted(kept)


def prumerge(image, budget, method):
    a, keys = image["joint"]
    a, x, n = [float(v) for v in a], image["raw"], len(image["raw"])
    salient = budget - 1 - round(method.spatial * (budget - 1))
    if method.adaptive:
        s = sorted(a)

        def quartile(q):
            place = q * (n - 1)
            low = math.floor(place)
            return s[low] + (s[min(low + 1, n - 1)] - s[low]) * (place - low)

        salient = max(1, sum(v > quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25)) for v in a))
    kept = set(ranked(a, range(n))[:salient])
    if method.adaptive:
        kept |= set(range(0, n - 1, max(1, n // salient // 3))) if method.spatial else set()
    else:
        rest, spaced = [i for i in range(n) if i not in kept], budget - 1 - salient
        kept |= {rest[i * len(rest) // spaced] for i in range(spaced)}
    result = {}
    for i in kept:
        near = ranked([cosine(keys[i], k) for k in keys], [j for j in range(n) if j != i])[: method.neighbours]
        result[i] = x[i] + sum(a[j] * x[j] for j in near)
    dropped = [i for i in range(n) if i not in kept]
    if dropped:
        result[dropped[-1]] = sum(a[j] * x[j] for j in dropped)
    return {i: image["project"](result[i]).flatten() for i in sorted(result)}


@torch.no_grad()
def visiontrim(image, budget, method):
    """-> {kept index: feature}."""
    x, z, words, n = image["raw"], image["z"], image["question"], len(image["raw"])
    g, flat = [float(v) for v in image["first"][max(image["first"])]], [p.flatten().tolist() for p in image["raw"]]
    if method.rating == "received":
        r = [float(v) for v in image["received"]]
        s = [
            a / math.sqrt(sum(v * v for v in g)) + b / math.sqrt(sum(v * v for v in r))
            for a, b in zip(g, r, strict=True)
        ]
    else:
        (h, w), places = image["grid"], []
        h //= image.get("frames", 1)
        spread, apart = variance([v for p in flat for v in p]), variance([*range(h)] * w + [*range(w)] * h)
        for i in range(n):
            t, (row, column), total = i // (h * w), divmod(i % (h * w), w), 0.0
            for v in range(row - method.reach, row + method.reach + 1):
                for u in range(column - method.reach, column + method.reach + 1):
                    if 0 <= v < h and 0 <= u < w:
                        other = flat[t * h * w + v * w + u]
                        far = sum((a - b) ** 2 for a, b in zip(flat[i], other, strict=True))
                        total -= far / spread if spread else 0.0
                        total -= ((v - row) ** 2 + (u - column) ** 2) / apart / 2 if apart else 0.0
            places.append(total / (2 * method.reach + 1) ** 2)
        looked, local = softmax(g), softmax(softmax(places))
        a, b = variance(looked), variance(local)
        s = [(b * p + a * q) / (a + b) if a + b else 0.0 for p, q in zip(looked, local, strict=True)]
    count = round(budget * method.complement) if words is not None and len(words) else 0
    dominant = ranked(s, range(n))[: budget - count]
    result = {i: z[i] for i in dominant}
    if not count:
        return dict(sorted(result.items()))
    like = [sum(cosine(p, e) for e in words) for p in z]
    targets = sorted(ranked(like, [i for i in range(n) if i not in dominant])[:count])
    grown = {t: x[t] for t in targets}
    for _ in range(method.rounds):
        seen, came = {t: image["project"](y).flatten() for t, y in grown.items()}, {t: [] for t in targets}
        for i in range(n):
            if i not in dominant and i not in targets:
                match = {t: sum(cosine(z[i], e) * cosine(e, y) for e in words) for t, y in seen.items()}
                came[best(match, targets)].append(x[i])
        grown = {t: y + sum(came[t]) / len(came[t]) if came[t] else y for t, y in grown.items()}
    result |= {t: image["project"](y).flatten() for t, y in grown.items()}
    return dict(sorted(result.items()))


def softmax(values):
    top = max(values)
    e = [math.exp(v - top) for v in values]
    return [v / sum(e) for v in e]


def variance(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)


def fastvid(image, budget, method):
    z, frames = image["z"], image["frames"]
    n = len(z) // frames
    a = [float(row[0]) for row in image["flow"][max(image["flow"])]]
    share = max(1, math.floor(method.keep * n) if method.keep <= 1 else budget // frames)
    mean = [sum(z[t * n : (t + 1) * n]) / n for t in range(frames)]
    likeness = [cosine(p, q) for p, q in itertools.pairwise(mean)]
    ends = {frames - 1} | set(sorted(range(frames - 1), key=lambda t: likeness[t])[: method.segments - 1])
    ends |= {t for t, c in enumerate(likeness) if c < method.tau}
    result, start = {}, 0
    for end in sorted(ends):
        own = [t for t in range(start, end + 1) if t == end or likeness[t] < method.ignore]
        total = share * (end + 1 - start)
        context = max(1, math.floor(total * method.context))
        quota = {t: (total - context) // len(own) + (i < (total - context) % len(own)) for i, t in enumerate(own)}
        back = own[::-1][:: method.every]
        dense = {t: min(max(1, n // 2), context // len(back) + (i < context % len(back))) for i, t in enumerate(back)}
        salient, anchors = [], []
        for t in own:
            tokens = range(t * n, (t + 1) * n)
            shown = ranked(a, tokens)[: min(quota[t], n - dense.get(t, 0))]
            salient += shown
            if t in dense:
                anchors.append(density_peaks(z, [i for i in tokens if i not in shown], dense[t]))
        result |= {i: z[i] for i in salient}
        for group in anchors:
            came = {i: [] for i in group}
            for j in range(start * n, (end + 1) * n):
                if j not in salient and j not in group:
                    came[group[closest(z[j], [z[i] for i in group])]].append(z[j])
            for i, others in came.items():
                w = max(method.own, 1 / (1 + len(others)))
                result[i] = w * z[i] + (1 - w) * sum(others) / len(others) if others else z[i]
        start = end + 1
    return dict(sorted(result.items()))


def density_peaks(z, tokens, count):
    distance = {(i, j): float((z[i] - z[j]).norm()) / math.sqrt(len(z[i])) for i in tokens for j in tokens}
    density = {}
    for i in tokens:
        near = sorted(distance[i, j] for j in tokens)[:4]
        density[i] = math.exp(-sum(d * d for d in near) / len(near))
    far = max(distance.values())
    score = {}
    for i in tokens:
        denser = [distance[i, j] for j in tokens if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score[i] = min([*denser, far]) * density[i]
    return sorted(sorted(tokens, key=lambda i: (-score[i], i))[:count])


# ---- the tower, by hand ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def described(family, twin, inputs):
    """`images_of`, with "flow" {layer: [(relation, semantic, norm)]} up to the last layer read, "joint" (attention, keys) of
    the last layer, "question" and "frames"."""
    name = "CLIPAttention" if family == "llava" else "VisionAttention"
    modules, seen = [m for m in twin.model.modules() if type(m).__name__.endswith(name)], {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen.__setitem__(
                i, ((args[0] if args else kwargs["hidden_states"]).clone(), kwargs)
            ),
            with_kwargs=True,
        )
        for i, module in enumerate(modules)
    ]
    images = images_of(family, twin, inputs)
    for hook in hooks:
        hook.remove()
    words = inputs["input_ids"][0, max(ref.visual_columns(inputs["input_ids"])) + 1 :]
    question, start = twin.get_input_embeddings()(words), 0
    orders = [None] * len(images) if family == "llava" else window_order(inputs["image_grid_thw"])
    full = getattr(twin.config.vision_config, "fullatt_block_indexes", None) or range(len(modules))
    if family != "llava" and not hasattr(twin.model.visual, "window_size"):
        orders = [sorted(order) for order in orders]
    for number, (image, order) in enumerate(zip(images, orders, strict=True)):
        image |= {"question": question, "frames": 1, "flow": {}}
        for layer in full:
            x, kwargs = seen[layer]
            if family == "llava":
                parts = (f(x[number]) for f in (modules[layer].q_proj, modules[layer].k_proj, modules[layer].v_proj))
                q, k, v = (p.view(len(p), modules[layer].num_heads, -1) for p in parts)
            else:
                size, heads = 4 * len(image["z"]), modules[layer].num_heads
                q, k, v = modules[layer].qkv(x[start : start + size]).view(size, 3, heads, -1).unbind(1)
                cos, sin = (t[start : start + size, None] for t in kwargs["position_embeddings"])
                half = q.shape[-1] // 2
                q, k = (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (q, k))
            image["flow"][layer] = flow(q, k, v, family == "llava", order)
        last = max(full)
        if family == "llava":
            deep = modules[max(image["first"])]
            q, k = (f(seen[max(image["first"])][0][number]).view(37, 4, 8) for f in (deep.q_proj, deep.k_proj))
            image["received"] = ref.received(q.transpose(0, 1), k.transpose(0, 1), 8**-0.5)[1:]
            q, k = (f(seen[last][0][number]) for f in (modules[last].q_proj, modules[last].k_proj))
            z = torch.tensor([float(q[0] @ row) / math.sqrt(len(row)) for row in k], dtype=torch.float64)
            image["joint"] = z.softmax(0)[1:], k[1:]
            image["flow"] = {i: rows for i, rows in image["flow"].items() if i < last}
        else:
            image["joint"] = image["first"][last], image["keys"][last]
            image["received"] = image["first"][max(image["first"])]
            start += 4 * len(image["z"])
    return images


def flow(q, k, v, classed, order):
    """[S, H, D] of one image -> per token (relation, semantic, norm); a merge unit has its patches' mean."""
    heads, dim, size = q.shape[1], q.shape[2], len(q)
    relation, semantic = [0.0] * size, [0.0] * size
    for h in range(heads):
        asking = q[0, h] if classed else sum(q[i, h] for i in range(size)) / size
        e = [math.exp(float(asking @ k[j, h]) / math.sqrt(dim)) for j in range(size)]
        w = [math.exp(float(v[0, h] @ v[j, h])) for j in range(size)]
        relation = [r + x / sum(e) / heads for r, x in zip(relation, e, strict=True)]
        semantic = [s + x / sum(w) / heads * classed for s, x in zip(semantic, w, strict=True)]
    norm = [float((v[j].sum(0) / heads).abs().sum()) for j in range(size)]
    rows = list(zip(relation, semantic, norm, strict=True))
    if classed:
        return rows[1:]
    units = [[sum(row[c] for row in rows[4 * u : 4 * u + 4]) / 4 for c in range(3)] for u in range(size // 4)]
    placed = [None] * len(units)
    for u, place in enumerate(order):
        placed[place] = units[u]
    return placed
