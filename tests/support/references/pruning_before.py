"""Float64 references of what is pruned before the language model: the choices, the tower's scores, masked prompts."""

from __future__ import annotations

import math

import torch

from tests.support.models import IMAGE
from tests.support.references import base as ref
from tests.support.references.attention import window_order
from tests.support.run import STEPS


def cosine_distance(a, b):
    return max(0.0, 1 - float(a @ b) / float(a @ a) ** 0.5 / float(b @ b) ** 0.5)


def best(scores, allowed):
    """The index with the highest score; the lowest one among equals (float64 noise is no difference)."""
    top = max(scores[i] for i in allowed)
    return min(i for i in allowed if scores[i] > top - 1e-12)


def far_apart(z, budget, weight=None):
    n = len(z)
    d = [[cosine_distance(a, b) for b in z] for a in z]
    scores = weight or [min((d[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
    kept = []
    while len(kept) < budget:
        kept.append(best(scores, [i for i in range(n) if i not in kept]))
        scores = [min(d[i][j] for j in kept) * (weight[i] if weight else 1) for i in range(n)]
    return sorted(kept)


def divprune(image, budget, method):
    return far_apart(image["z"], budget)


@torch.no_grad()
def sensitivity(image, method):
    raw, shape = image["raw"], image["raw"][0].shape
    u = torch.randn((method.directions, shape.numel()), generator=torch.Generator().manual_seed(method.seed)).double()
    s = []
    for x in raw:
        total = 0.0
        for row in u:
            unit = row.view(shape) / math.sqrt(sum(float(v) ** 2 for v in row))
            plus, minus = (image["project"](x + sign * method.step * unit) for sign in (1, -1))
            total += math.sqrt(float((plus - minus).pow(2).sum())) / (2 * method.step)
        s.append(total / len(u))
    return s


def zoo_prune(image, budget, method):
    s = sensitivity(image, method)
    low, high = min(s), max(s)
    return far_apart(image["z"], budget, [(v - low) / (high - low) for v in s])


def uniform_grid(image, budget, method):
    """Rows and columns are the centres of equal strips."""
    h, w = image["grid"]
    rows = max(math.ceil(budget / w), min(h, budget, round(math.sqrt(budget * h / w))))
    kept = []
    for i in range(rows):
        count = math.floor((i + 1) * budget / rows) - math.floor(i * budget / rows)
        kept += [math.floor((i + 0.5) * h / rows) * w + math.floor((k + 0.5) * w / count) for k in range(count)]
    return sorted(kept)


def ranked(scores, allowed):
    return sorted(allowed, key=lambda i: (-float(scores[i]), i))


def closest(x, others):
    """The position in `others` with the highest cosine."""
    return best([-cosine_distance(x, y) for y in others], range(len(others)))


def vscan(image, budget, method):
    """-> {kept index: feature}."""
    (h, w), z = image["grid"], image["z"]
    local, deep = (image["first"][i] for i in (min(image["first"]), max(image["first"])))
    kept, parts = [], method.windows
    for v in range(parts):
        for u in range(parts):
            inside = [y * w + x for y in range(h) for x in range(w) if y * parts // h == v and x * parts // w == u]
            kept += ranked(local, inside)[: budget // 2 // parts**2]
    kept += ranked(deep, [i for i in range(h * w) if i not in kept])[: budget - len(kept)]
    kept = sorted(kept)
    groups = {i: [z[i]] for i in kept}
    for j in set(range(h * w)) - set(kept):
        groups[kept[closest(z[j], [z[i] for i in kept])]].append(z[j])
    return {i: sum(g) / len(g) for i, g in groups.items()}


@torch.no_grad()
def visionzip(image, budget, method):
    (scores,), (keys,) = ([v[max(v)]] for v in (image["first"], image["keys"]))
    n, targets = len(scores), round(budget * method.contextual)
    dominant = ranked(scores, range(n))[: budget - targets]
    rest = [i for i in range(n) if i not in dominant]
    target = rest[:: max(1, len(rest) // targets)][:targets] if targets else []
    groups = {t: [] for t in target}
    for j in rest:
        if targets and j not in target:
            groups[target[closest(keys[j], [keys[t] for t in target])]].append(image["raw"][j])
    result = {i: image["z"][i] for i in dominant}
    for t, g in groups.items():
        result[t] = image["project"](image["raw"][t] + sum(g) / len(g)) if g else image["z"][t]
    return dict(sorted(result.items()))


@torch.no_grad()
def images_of(family, twin, inputs):
    """One dict per image: grid, z [N, C] projected, raw [N, ...] before the projector, project(one token), and by layer
    the class token's attention ("first", Qwen: attention received) and the keys' mean over heads."""
    name, seen_by = (
        ("CLIPAttention", {0: None, 2: None}) if family == "llava" else ("VisionAttention", {1: None, 3: None})
    )
    attentions = [m for m in twin.model.modules() if type(m).__name__.endswith(name)]
    assert len(attentions) == 4
    hooks = [
        attentions[i].register_forward_pre_hook(
            lambda m, a, k, i=i: seen_by.__setitem__(i, ((a[0] if a else k["hidden_states"]).clone(), k)),
            with_kwargs=True,
        )
        for i in seen_by
    ]
    pixels, grids = inputs["pixel_values"].double(), inputs.get("image_grid_thw")
    projector, seen = twin.model.multi_modal_projector if family == "llava" else twin.model.visual.merger, []
    hook = projector.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    extra = {} if grids is None else {"image_grid_thw": grids}
    features = list(twin.model.get_image_features(pixels, return_dict=True, **extra).pooler_output)
    for h in (hook, *hooks):
        h.remove()
    if family == "llava":
        result = [
            {"grid": (6, 6), "z": z, "raw": seen[0][i], "project": projector, "first": {}, "keys": {}}
            for i, z in enumerate(features)
        ]
        for layer, (x, _) in seen_by.items():
            for image, states in zip(result, x, strict=True):
                q, k = (f(states).view(37, 4, 8) for f in (attentions[layer].q_proj, attentions[layer].k_proj))
                rows = [
                    torch.tensor([float(q[0, h] @ k[j, h]) / 8**0.5 for j in range(37)]).double().softmax(0)
                    for h in range(4)
                ]
                image["first"][layer] = (sum(rows) / 4)[1:]
                image["keys"][layer] = [sum(k[j, h] for h in range(4)) / 4 for j in range(1, 37)]
        return result
    units, result, start = seen[0].view(-1, 4, seen[0].shape[-1]), [], 0
    orders = window_order(grids)
    if not hasattr(twin.model.visual, "window_size"):  # Qwen2-VL and Qwen3-VL see each image whole
        orders = [sorted(order) for order in orders]
    for (_, h, w), order, z in zip(grids.tolist(), orders, features, strict=True):
        raw = [None] * len(z)
        for u, place in enumerate(order):
            raw[place] = units[start + u]
        image = {
            "grid": (h // 2, w // 2),
            "z": z,
            "raw": raw,
            "project": lambda x: projector(x)[0],
            "first": {},
            "keys": {},
        }
        for layer, (x, kw) in seen_by.items():
            cos, sin = kw["position_embeddings"]
            heads = attentions[layer].num_heads
            dim = x.shape[1] // heads
            q, k, _ = attentions[layer].qkv(x).view(len(x), 3, heads, dim).permute(1, 2, 0, 3)
            q, k = (y * cos + torch.cat([-y[..., dim // 2 :], y[..., : dim // 2]], -1) * sin for y in (q, k))
            q, k = (y[:, 4 * start : 4 * (start + len(z))] for y in (q, k))
            received, mean = ref.received(q, k, dim**-0.5), sum(k) / heads
            image["first"][layer], image["keys"][layer] = [None] * len(z), [None] * len(z)
            for u, place in enumerate(order):
                image["first"][layer][place] = float(received[4 * u : 4 * u + 4].mean())
                image["keys"][layer][place] = mean[4 * u : 4 * u + 4].mean(0)
        result.append(image)
        start += len(z)
    return result


@torch.no_grad()
def masked_logits(family, twin, inputs, kept, tokens, compact=False):
    """Logits of the full-length prompt whose dropped columns are masked; kept: indices, or {index: z}."""
    ids, visual = inputs["input_ids"], ref.visual_columns(inputs["input_ids"])
    full = torch.cat([ids, tokens[None, :-1]], 1)
    mask = torch.ones_like(full)
    mask[0, visual] = 0
    mask[0, [visual[i] for i in kept]] = 1
    embeds = twin.get_input_embeddings()(full)
    embeds[0, visual] = torch.cat([image["z"] for image in images_of(family, twin, inputs)])
    for i, z in kept.items() if isinstance(kept, dict) else ():
        embeds[0, visual[i]] = z
    if family == "llava":
        position = (mask.cumsum(-1) - 1).clamp(min=0) if compact else torch.arange(full.shape[1])[None]
    else:
        types = torch.nn.functional.pad((ids == IMAGE).int(), (0, STEPS - 1))  # a generated image token is text
        position = twin.model.get_rope_index(full, image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=types)[0]
    hidden = twin.model.language_model(
        inputs_embeds=embeds, position_ids=position, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return twin.lm_head(hidden)[0, -STEPS:]
