"""PAINT, ACT, TAME, CCA and secondary sinks against float64 loops that share nothing with the engine."""

from __future__ import annotations

import copy
import math
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import families
import pytest
import reference as ref
import torch
from conftest import BUILD, IMAGE, make_inputs, single
from test_attention_methods import CASES as OLDER
from test_attention_methods import GIFT, Matrices
from test_methods import STEPS, error, greedy, window_order, works_unwrapped

import vlm_fix

# ---- the methods ---------------------------------------------------------------------------------------------------


@dataclass
class TAME(Matrices):
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
class ACT(Matrices):
    rows: str = "all"
    beta: float = 0.4
    threshold: float = 0.1
    heads: tuple = ()  # (layer, head); empty: all
    given: dict = field(default_factory=dict)  # layer -> sinks of all heads
    margin: float = 1.0
    hits: int = 0

    def mixed(self, a, layer):
        for h in range(len(a)):
            if self.heads and (layer, h) not in self.heads:
                continue
            sinks = self.given.get(layer, [])
            if not self.given:
                seen = [[x for x in a[h, : self.prompt_len, j].tolist() if x] for j in range(self.prompt_len)]
                means = [sum(column) / len(column) for column in seen]
                self.margin = min([self.margin, *(abs(m - self.threshold) for m in means)])
                sinks = [j for j, m in enumerate(means) if m > self.threshold][1:]
            self.hits += len(sinks)
            for r in range(a.shape[1]):
                old = a[h, r].clone()
                rest = sum(float(old[j]) for j in range(len(old)) if j not in sinks)
                moved = sum(float(old[j]) for j in sinks) * (1 - self.beta)
                for j in range(len(old)):
                    a[h, r, j] = old[j] * self.beta if j in sinks else old[j] + moved * old[j] / rest
                assert abs(float(a[h, r].sum()) - 1) < 1e-12


@dataclass
class PAINT(Matrices):
    alpha: float = 0.7
    beta: float = 0.3
    share: float = 0.25
    sensitive: bool = False
    encoder: list = field(default_factory=list)  # per image (early [N], late [N])
    margin: float = 1.0

    def __post_init__(self):
        self.strength, columns = {}, iter(self.visual)
        for early, late in self.encoder:
            n, given, late = len(early), late.tolist(), sorted(late.tolist())

            def quartile(q, values=late, n=n):
                place = q * (n - 1)
                low = math.floor(place)
                return values[low] + (place - low) * (values[min(low + 1, n - 1)] - values[low])

            bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
            self.margin = min([self.margin, *(abs(x - bound) for x in given)])
            order = sorted(range(n), key=lambda i: (-float(early[i]), i))
            local = set(order[: int(self.share * n)])
            for i in range(n):
                self.strength[next(columns)] = self.beta if given[i] > bound else self.alpha if i in local else 0.0

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


@torch.no_grad()
def encoder_scores(family, twin, inputs, layers):
    """Per image, per layer [N]: the class token's attention, or without one the attention received, by loops."""
    seen, grids = {}, inputs.get("image_grid_thw")
    if family == "llava":
        blocks = [m for m in twin.model.vision_tower.modules() if type(m).__name__ == "CLIPAttention"]
    else:
        blocks = [b.attn for b in twin.model.visual.blocks]

    def keep(i):
        return lambda m, a, k: seen.__setitem__(i, ((a[0] if a else k["hidden_states"]).clone(), k))

    hooks = [blocks[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    extra = {} if grids is None else {"image_grid_thw": grids}
    twin.model.get_image_features(inputs["pixel_values"].double(), return_dict=True, **extra)
    for hook in hooks:
        hook.remove()
    result = []
    if family == "llava":
        for n in range(len(inputs["pixel_values"])):
            found = []
            for i in layers:
                q, k = (f(seen[i][0][n]).view(37, 4, 8) for f in (blocks[i].q_proj, blocks[i].k_proj))
                heads = [
                    torch.tensor([float(q[0, h] @ k[j, h]) * 8**-0.5 for j in range(37)], dtype=torch.float64).softmax(
                        0
                    )
                    for h in range(4)
                ]
                found.append(sum(heads)[1:])
            result.append(found)
        return result
    start = 0
    for (_, h, w), order in zip(grids.tolist(), window_order(grids), strict=True):
        found = []
        for i in layers:
            x, kw = seen[i]
            cos, sin = kw["position_embeddings"]
            q, k, _ = blocks[i].qkv(x).view(len(x), 3, 2, 16).permute(1, 2, 0, 3)
            q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
            s = ref.received(q[:, start : start + h * w], k[:, start : start + h * w], 16**-0.5)
            restored = torch.zeros(h * w // 4, dtype=torch.float64)
            for u, place in enumerate(order):
                restored[place] = s[4 * u : 4 * u + 4].mean()
            found.append(restored)
        result.append(found)
        start += h * w
    return result


HEADS = ((1, 0), (1, 2), (2, 3))
CASES = {
    "tame": lambda v, n, e: TAME(v, n, [0, 1, 2, 3]),
    "tame:gamma=2,layers=1|3": lambda v, n, e: TAME(v, n, [1, 3], gamma=2),
    "act:threshold=0.06": lambda v, n, e: ACT(v, n, [2], threshold=0.06),
    "act:threshold=0.04,beta=0,head_list=1.0|1.2|2.3": lambda v, n, e: ACT(
        v, n, [1, 2], threshold=0.04, beta=0, heads=HEADS
    ),
    "paint": lambda v, n, e: PAINT(v, n, [2, 3], encoder=e),
    "paint:alpha=1.5,beta=0.5,head_scale=sensitive,layers=0-": lambda v, n, e: PAINT(
        v, n, [0, 1, 2, 3], alpha=1.5, beta=0.5, sensitive=True, encoder=e
    ),
}
LAYERS = {"llava": (0, 2), "qwen2_5_vl": (1, 3)}  # of PAINT in the tiny encoders


@pytest.mark.parametrize("spec", CASES)
def test_edit_equals_reference(family, model, spec):
    inputs = single(family, [1, 2], 1, seed=3 if family == "llava" else 0)  # its images have summary tokens
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, suppress_tokens=[IMAGE])  # the reference would look for its image
    twin = ref.double(model)
    twin.set_attn_implementation({"text_config": "matrix_loops"})
    encoder = encoder_scores(family, twin, inputs, LAYERS[family]) if spec.startswith("paint") else None
    run = CASES[spec](ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1], encoder)
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    expected = ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
    assert float((expected - plain).abs().max()) > 1e-2, "the edit must matter for this test to mean anything"
    assert getattr(run, "margin", 1.0) > 1e-7, "pick another seed: a gate lies on its threshold"
    assert getattr(run, "hits", 1)
    if spec.startswith("paint"):
        assert {run.alpha, run.beta, 0.0} == set(run.strength.values()), "the case must hold all three kinds of token"
    assert error(logits[0], expected) < 1e-5


# ---- bf16 --------------------------------------------------------------------------------------------------------------

ONCE = ("zerotuning:rate=0.2", "vaf", "avar", "locore", "hgai", "gift:alpha=3", "ad_hh", "spin:keep=0.8")
IN_BF16 = {spec: build for spec, build in OLDER.items() if spec.startswith(ONCE)} | {
    "tame": CASES["tame"],
    "act:threshold=0.06": CASES["act:threshold=0.06"],
    "paint:local_share=1": lambda v, n, e: PAINT(v, n, [2, 3], share=1, encoder=e),
    "paint:local_share=1,head_scale=sensitive": lambda v, n, e: PAINT(v, n, [2, 3], share=1, sensitive=True, encoder=e),
}


@pytest.fixture(scope="module")
def half():
    """{family: (bfloat16 model, its float64 twin with the loops)}"""
    pairs = {}
    for name, build in BUILD.items():
        model = build(torch.bfloat16)
        twin = ref.double(model)
        twin.set_attn_implementation({"text_config": "matrix_loops"})
        pairs[name] = model, twin
    return pairs


@pytest.mark.parametrize("spec", IN_BF16)
def test_bf16_equals_reference(family, half, spec, record_property):
    """Every step within 3e-2 of the largest logit, or 1.5 times what the same loops are off in bfloat16 themselves.

    A gate close to its threshold may fall either way, in the loops too: where a method has one within the band, steps off
    by more than 6e-2 are counted as flips, and no more than half of the steps may be.
    """
    model, twin = half[family]
    inputs = single(family, [1, 2], 1, dtype=torch.bfloat16)
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, suppress_tokens=[IMAGE])
    visual, n = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    scores = encoder_scores(family, twin, inputs, LAYERS[family]) if spec.startswith("paint") else None

    def loops(net):
        run = IN_BF16[spec](visual, n) if spec in OLDER else IN_BF16[spec](visual, n, scores)
        for _ in range(1 + isinstance(run, GIFT)):  # GIFT: a first pass for the map
            found = ref.teacher_forced(net, run, inputs, tokens[0, :-1])
        return found, run

    expected, run = loops(twin)
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation({"text_config": "matrix_loops"})
    gate, band = getattr(run, "margin", math.inf), 1.0 if spec.startswith("spin") else 2e-2  # SPIN's sums are in tens
    bound = max(3e-2, 1.5 * error(loops(eager)[0], expected) if gate > band else 6e-2)
    steps = (logits[0].double() - expected).abs().amax(dim=-1) / expected.abs().max()
    flips = int((steps > bound).sum())
    record_property("gate_flips", flips)
    assert float((expected - plain).abs().max() / expected.abs().max()) > 1e-2
    assert flips == 0 or (gate <= band and flips <= STEPS // 2)


@pytest.mark.parametrize("spec", ["tame", "act:threshold=0.04,layers=0-"])
def test_gemma3_equals_reference(spec):
    """Grouped-query heads, windows of 24 columns, bidirectional image blocks; those who cannot work there say so."""
    model, inputs = families.build("gemma3"), families.prompt("gemma3", [1, 2], rows=[1])
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, suppress_tokens=[IMAGE])
    twin, text = ref.double(model), model.config.get_text_config()
    twin.set_attn_implementation({"text_config": "matrix_loops"})
    windows = {i: text.sliding_window for i, kind in enumerate(text.layer_types) if kind == "sliding_attention"}
    visual, n = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    assert set(windows.values()) == {24} and len(windows) < 4 and n > 24
    run = (
        TAME(visual, n, [0, 1, 2, 3], windows=windows)
        if spec == "tame"
        else ACT(visual, n, [0, 1, 2, 3], threshold=0.04)
    )
    expected = ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    assert float((expected - plain).abs().max()) > 1e-2 and getattr(run, "hits", 1)
    assert getattr(run, "margin", 1.0) > 1e-6, "pick another seed: a gate lies on its threshold"
    assert error(logits[0], expected) < 1e-5
    with pytest.raises(vlm_fix.VlmFixError, match="cannot in gemma3"):
        vlm_fix.wrap(model, "paint")
    with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="cca:mask=false"):
        greedy(model, inputs)


# ---- secondary sinks -----------------------------------------------------------------------------------------------


def secondary_by_loops(twin, inputs, cosine, more, fewer):
    """{layer: columns} from the hidden states of a plain pass over the prompt, the final norm's output included."""
    states = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: states.append((a[0] if a else k["hidden_states"])[0].tolist()), with_kwargs=True
        )
        for layer in twin.model.language_model.layers
    ]
    twin.model.rope_deltas = None
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        states.append(twin.model(**double, use_cache=False).last_hidden_state[0].tolist())
    for hook in hooks:
        hook.remove()

    def dot(x, y):
        return sum(p * q for p, q in zip(x, y, strict=True))

    norms = [sum(math.sqrt(dot(x[j], x[j])) for x in states) for j in range(3)]
    bos, margin = norms.index(max(norms)), 1.0
    alive: dict[int, list[int]] = {}
    for layer, x in enumerate(states):
        for j in range(bos, len(x)):
            cos = abs(dot(x[j], x[bos])) / math.sqrt(dot(x[j], x[j]) * dot(x[bos], x[bos]))
            margin = min(margin, abs(cos - cosine))
            if cos > cosine:
                alive.setdefault(j, []).append(layer)
    assert margin > 1e-6, "pick another cosine: a token lies on it"
    kept = [j for j, life in alive.items() if more < len(life) < fewer]
    return {layer: [j for j in kept if layer in alive[j]] for layer in range(len(states) - 1)}


SECONDARY = {
    "act:sinks=secondary,life=1|4,beta=0.1,layers=0-": (1, 4),
    "var:detector=secondary,life=0|5,min_visual_mass=0,rho=0,p=0.9,layers=0-": (0, 5),
    "var:detector=secondary,min_visual_mass=0,rho=0,p=0.9,layers=0-": (4 / 24 * 4, 9 / 24 * 4),  # the rule for 4 layers
}


@pytest.mark.parametrize("spec", SECONDARY)
@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_secondary_sinks(family, model, spec, monkeypatch):
    """The detector and the edits that use it; random weights have no sinks, so the cosine is lowered."""
    from vlm_fix.attention import sinks

    cosine, seed = (0.15, 0) if family == "llava" else (0.2, 1)
    monkeypatch.setattr(sinks, "COSINE", cosine)
    images = [1, 1, 2]
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, make_inputs(family, images, seed=seed), suppress_tokens=[IMAGE])
        for row in range(3):
            inputs = single(family, images, row, seed=seed)
            t, seen, _ = greedy(model, inputs, suppress_tokens=[IMAGE])
            assert torch.equal(t[0], tokens[row]) and float((seen[0] - logits[row]).abs().max()) < 2e-4
    twin = ref.double(model)
    found = secondary_by_loops(twin, inputs, cosine, *SECONDARY[spec])
    visual, n = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    assert any(set(visual) & set(columns) for columns in found.values())
    twin.set_attn_implementation({"text_config": "matrix_loops"})
    if spec.startswith("act"):
        run = ACT(visual, n, [0, 1, 2, 3], beta=0.1, given=found)
    else:
        run = SecondaryVar(visual, n, [0, 1, 2, 3], p=0.9, rho=0, min_visual_mass=0, given=found)
        twin.set_attn_implementation({"text_config": "reference_loops"})
    plain = ref.teacher_forced(twin, None, inputs, t[0, :-1])
    expected = ref.teacher_forced(twin, run, inputs, t[0, :-1])
    assert float((expected - plain).abs().max()) > 1e-2 and run.hits > 10
    assert error(seen[0], expected) < 1e-5


@dataclass
class SecondaryVar(ref.VarReference):
    given: dict = field(default_factory=dict)

    def sinks(self, layer):
        return self.given[layer]


def test_lifetimes():
    """Hand-made lives in a model of 36 layers: 4 < layers < 21; below 24 layers the limits shrink."""
    from vlm_fix.attention.sinks import lifetime_limits, secondary

    assert lifetime_limits(36) == (4, 21) and lifetime_limits(48) == (4, 33) and lifetime_limits(24) == (4, 9)
    assert lifetime_limits(12) == (2, 4.5)
    alive = torch.zeros(37, 1, 5, dtype=torch.bool)
    for column, (first, count) in enumerate([(0, 37), (10, 4), (10, 5), (12, 20), (5, 21)]):
        alive[first : first + count, 0, column] = True
    found = secondary(alive, lifetime_limits(36))
    assert found.any(dim=0)[0].tolist() == [False, False, True, True, False]
    assert torch.equal(found[:, :, 2:4], alive[:, :, 2:4])


# ---- CCA -----------------------------------------------------------------------------------------------------------


def concentric_places(inputs, ids, mrope, positions=True):
    """By hand, image by image: [3, n] position ids (equal, but for M-RoPE's own), and (image, ring) of image columns."""
    grids = [(int(h) // 2, int(w) // 2) for _, h, w in inputs["image_grid_thw"]] if mrope else [(6, 6)] * 2
    place, where, rings, i = 0, [], {}, 0
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


@torch.no_grad()
def concentric(net, inputs, generated, positions, mask):
    """Logits [T + 1, V] with positions and an L x L mask filled in by hand, in the precision of `net`."""
    ids = torch.cat([inputs["input_ids"][0], generated]).tolist()
    n, grids = len(ids), {k: v for k, v in inputs.items() if k == "image_grid_thw"}
    where, rings = concentric_places(inputs, ids, bool(grids), positions)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            seen[q, k] = k <= q
            if mask and q in rings and k in rings and rings[q][0] == rings[k][0]:
                seen[q, k] = rings[k][1] <= rings[q][1]
    embeds = net.get_input_embeddings()(torch.tensor([ids]))
    pixels = inputs["pixel_values"].to(embeds.dtype)
    features = net.model.get_image_features(pixels, return_dict=True, **grids).pooler_output
    embeds[0, sorted(rings)] = torch.cat(list(features))
    net.set_attn_implementation({"text_config": "sdpa"})
    hidden = net.model.language_model(
        inputs_embeds=embeds,
        position_ids=where[:, None] if grids else where[:1],
        attention_mask=seen[None, None],
        use_cache=False,
    ).last_hidden_state
    return net.lm_head(hidden)[0, inputs["input_ids"].shape[1] - 1 :]


@pytest.mark.parametrize("spec", ["cca", "cca:mask=false", "cca:positions=false"])
def test_cca_equals_reference(family, model, spec):
    images = [1, 2, 1]
    inputs, only = single(family, images, 1), {"suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, make_inputs(family, images), **only)
        for row in range(3):
            t, seen, _ = greedy(model, single(family, images, row), **only)
            assert torch.equal(t[0], tokens[row]) and float((seen[0] - logits[row]).abs().max()) < 2e-4
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for option in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **option), plain), option
        beams = model.generate(**make_inputs(family, [1, 2]), max_new_tokens=5, num_beams=3, do_sample=False)[1, -5:]
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)[0, -5:], beams)
    before = greedy(model, inputs, **only)[1]
    positions, mask = "positions=false" not in spec, "mask=false" not in spec
    expected = concentric(ref.double(model), inputs, tokens[1, :-1], positions, mask)
    assert error(logits[1], expected) < 1e-5
    assert float((before[0, 0] - logits[1, 0]).abs().max()) > 1e-2


@pytest.mark.parametrize("spec", ["cca", "cca:mask=false", "cca:positions=false"])
def test_cca_in_bf16(family, half, spec):
    """Every step within 3e-2 of the largest logit, or 1.5 times what the hand-made run is off in bfloat16 itself."""
    model, twin = half[family]
    inputs = single(family, [1, 2], 1, dtype=torch.bfloat16)
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, suppress_tokens=[IMAGE])
    how = (inputs, tokens[0, :-1], "positions=false" not in spec, "mask=false" not in spec)
    expected, rounded = concentric(copy.deepcopy(twin), *how), concentric(copy.deepcopy(model), *how)
    assert error(logits[0], expected) < max(3e-2, 1.5 * error(rounded, expected))
    plain = concentric(copy.deepcopy(twin), *how[:2], False, False)
    assert float((expected - plain).abs().max() / expected.abs().max()) > 5e-2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_cca_in_further_mrope_families(name):
    """The model itself, given position ids made by hand: two images of unlike grids, prompt and three words more."""
    model, inputs = families.build(name), families.prompt(name, [1, 2], rows=[1])
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)
    where = concentric_places(inputs, ids[0].tolist(), mrope=True)[0][:, None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
    given |= {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        expected, plain = model(**given, position_ids=where).logits, model(**given).logits
        with vlm_fix.wrapped(model, "cca:mask=false"):
            assert torch.allclose(model(**given).logits, expected, atol=1e-5)
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
            batch = families.prompt(name, [1, 2])
            rows = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
    assert not torch.allclose(expected, plain, atol=1e-2) and torch.equal(rows[1, -4:], tokens[0, -4:])


def test_cca_with_edits_and_text(family, model):
    """It stacks with edits and a contrast; a text-only row keeps its positions; what it cannot do is said."""
    inputs = make_inputs(family, [1, 0, 2])
    plain = greedy(model, inputs)[1]
    with vlm_fix.wrapped(model, "cca"):
        got = greedy(model, inputs)[1]
    assert float((got[1] - plain[1]).abs().max()) < 1e-5 and not torch.allclose(got[0], plain[0])
    with vlm_fix.wrapped(model, ["cca", "paint", "pai:alpha=0.3", "vcd:beta=0.01"]):
        tokens = greedy(model, make_inputs(family, [1, 2, 1]))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, [1, 2, 1], row))[0][0], tokens[row])
    with (
        vlm_fix.wrapped(model, ["cca", "hiprune:keep=4"]),
        pytest.raises(vlm_fix.VlmFixError, match="without a pruning"),
    ):
        greedy(model, make_inputs(family, [1]))
    if family == "qwen2_5_vl":
        del inputs["mm_token_type_ids"]
        with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="3-D positions"):
            model(**inputs)


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7), (1, 3), (24, 24)])
def test_rings_of_any_grid(models, height, width):
    """Positions and rings of one h x w image between two words, against peeling the image from outside."""
    from vlm_fix.families import arch_of, family_of
    from vlm_fix.methods import cca
    from vlm_fix.session import Call, Session

    model, ids = models["llava"], torch.tensor([[5] + [IMAGE] * height * width + [6, 7]])
    method = vlm_fix.parse_spec("cca").resolve(arch_of(model))
    session = Session(Call(model, family_of(model), {"input_ids": ids}), prompt_len=ids.shape[1])
    session.advance(0, torch.where(ids == IMAGE, 2, 1))
    with vlm_fix.wrapped(model, "cca"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cca, "image_cells", lambda *a: [torch.arange(height * width).view(height, width)])
        ring, image, shift = method.places(session)
    left, peeled, depth = {(y, x) for y in range(height) for x in range(width)}, {}, 0
    while left:
        inner = {(y, x) for y, x in left if {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} <= left}
        peeled.update(dict.fromkeys(left - inner, depth))
        left, depth = inner, depth + 1
    order = [peeled[y, x] for y in range(height) for x in range(width)]
    expected = [0, *(1 + r for r in order), 1 + depth, 2 + depth]
    assert (torch.arange(ids.shape[1]) + shift[0]).tolist() == expected and ring[0, 1:-2].tolist() == order
    assert image[0].tolist() == [0] + [1] * height * width + [0, 0]
    assert depth == 12 or (height, width) != (24, 24)


# ---- GIFT's content words --------------------------------------------------------------------------------------------


@dataclass
class ContentGIFT(GIFT):
    content: tuple = ()

    def look(self, a):
        shift = [dict.fromkeys(self.visual, 0.0) for _ in a]
        for h in range(len(a)):
            for q in range(max(self.visual) + 2, self.prompt_len):
                if q in self.content:
                    for j in self.visual:
                        shift[h][j] += max(0.0, float(a[h, q, j] - a[h, q - 1, j]))
        self.map = self.normalised(shift)


@pytest.mark.parametrize("stack", [[], ["random_tokens:keep=5"]])
def test_gift_of_content_words(family, model, monkeypatch, stack):
    """Even ids stand for content words: the map counts their rows only, in batches and beside a pruner too."""
    from vlm_fix import words

    monkeypatch.setattr(words, "tokenizer_of", lambda name: None)
    monkeypatch.setattr(words, "content_tokens", lambda tokenizer, ids: tuple(i % 2 == 0 for i in ids))
    images, spec, only = [1, 2, 1], "gift:alpha=3,source_layer=1,layers=2-3,pos=content", {"suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(model, [spec, *stack]):
        tokens, logits, _ = greedy(model, make_inputs(family, images), **only)
        for row in range(3):
            inputs = single(family, images, row)
            t, seen, _ = greedy(model, inputs, **only)
            assert torch.equal(t[0], tokens[row]) and float((seen[0] - logits[row]).abs().max()) < 2e-4
    if stack:
        return
    twin, ids = ref.double(model), inputs["input_ids"][0].tolist()
    twin.set_attn_implementation({"text_config": "matrix_loops"})
    content = tuple(i for i, token in enumerate(ids) if token % 2 == 0)
    run = ContentGIFT(
        ref.visual_columns(inputs["input_ids"]),
        len(ids),
        [1, 2, 3],
        alpha=3,
        source=1,
        edited_layers=(2, 3),
        content=content,
    )
    ref.teacher_forced(twin, run, inputs, t[0, :-1])
    assert 0 < len(set(content) & set(range(max(run.visual) + 2, len(ids)))) < len(ids) - max(run.visual) - 2
    assert error(seen[0], ref.teacher_forced(twin, run, inputs, t[0, :-1])) < 1e-5


@pytest.fixture
def tagger(tmp_path):
    """NLTK's tagger, with its data from the pack if they are not on this machine."""
    nltk = pytest.importorskip("nltk")
    before = list(nltk.data.path)
    pack = Path(__file__).resolve().parents[2] / "shared" / "data" / "nltk_pack.tar.gz"
    try:
        nltk.pos_tag(["dog"])
    except LookupError:
        if not pack.exists():
            pytest.skip("the data of NLTK's tagger are not on this machine")
        with tarfile.open(pack) as archive:
            archive.extractall(tmp_path, filter="data")
        nltk.data.path.insert(0, str(tmp_path / "nltk_pack"))
    yield
    nltk.data.path[:] = before


@pytest.mark.parametrize("pieces", ["bytes", "words"])
def test_content_tokens(tagger, pieces):
    """Function words, be and punctuation are out, whatever the tokens are: single letters or words with their space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vlm_fix.words import content_tokens

    text = " Is the small brown dog running quickly?"
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    if pieces == "words":
        for word in text.replace("?", " ?").split():
            for i in range(1, len(word) + (word != "?")):
                pair = ("Ġ" + word[: i - 1], word[i - 1 : i]) if i > 1 else ("Ġ", word[0])
                merges += [pair] if pair not in merges else []
                vocab.setdefault("".join(pair), len(vocab))
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = tuple(tokenizer(text)["input_ids"])
    found = content_tokens(tokenizer, ids)
    kept = "".join(tokenizer.decode([i]) for i, content in zip(ids, found, strict=True) if content)
    assert kept.split() == ["small", "brown", "dog", "running", "quickly"] or kept == "smallbrowndogrunningquickly"
    assert len(ids) == (len(text) if pieces == "bytes" else 8)


def test_content_words_say_what_they_need(models, monkeypatch):
    import nltk

    from vlm_fix import words

    model, inputs = models["llava"], single("llava", [1], 0)
    with (
        vlm_fix.wrapped(model, "gift:pos=content"),
        pytest.raises(vlm_fix.VlmFixError, match="need the model's tokenizer"),
    ):
        greedy(model, inputs)

    def missing(tokens):
        raise LookupError

    class Letters:
        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    monkeypatch.setattr(nltk, "pos_tag", missing)
    with pytest.raises(vlm_fix.VlmFixError, match=r"nltk\.downloader averaged_perceptron_tagger_eng"):
        words.content_tokens(Letters(), (68, 111, 103))


# ---- the official code's faults ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_official_var_leak(family, model):
    """VAR's official code keeps the sinks of the first sample for later ones; here the second sees its own only."""
    from vlm_fix.methods.var import VAR

    spec = "var:tau=2.2,min_visual_mass=0.1,rho=0.2,layers=1-3"
    first, second = single(family, [2], 0, seed=1), single(family, [1], 0, seed=2)
    with vlm_fix.wrapped(model, spec):
        alone, sinks = greedy(model, second)[1], {}

        def note(self, x, layer, session, original=VAR.watch):
            original(self, x, layer, session)
            own = sinks.setdefault(id(session), (session, {}))[1]  # held: the next session may take a freed one's id
            own[layer] = session.state(self)[layer].clone()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VAR, "watch", note)
            greedy(model, first)
            after = greedy(model, second)[1]
        (_, old), (_, new) = sinks.values()
        width = second["input_ids"].shape[1]
        assert any(not torch.equal(old[i][:, :width], new[i][:, :width]) for i in new), (
            "the samples must differ in sinks"
        )

        def leak(self, a, rows, original=VAR.weights):
            rows.state[rows.layer] = old[rows.layer][:, :width]
            return original(self, a, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VAR, "weights", leak)
            assert not torch.equal(greedy(model, second)[1], alone), "a leak must be visible here"
    assert torch.equal(after, alone)


def test_act_calibrates_heads(model, family):
    """The sweep keeps the heads that, alone, answer more samples right: here against the sweep by hand."""
    from vlm_fix.calibration import Sample, answer_scores

    samples = [
        Sample(single(family, [1, 1], row, seed=seed), 5 + seed, 40 + seed) for seed in range(4) for row in (0, 1)
    ]
    seen, spec = [], "act:threshold=0.03,beta=0,layers=1-2"
    found = vlm_fix.parse_spec(spec).calibrate(model, samples, 0, lambda what, share: seen.append(what))["head_list"]
    before, better = int((answer_scores(model, samples).diff(dim=1) < 0).sum()), []
    for name in [f"{layer}.{head}" for layer in (1, 2) for head in range(4)]:
        with vlm_fix.wrapped(model, f"{spec},head_list={name}"):
            better += [name] if int((answer_scores(model, samples).diff(dim=1) < 0).sum()) > before else []
    assert found == tuple(better) and len(seen) == 8


def test_refusals(models):
    for spec, message in {
        "act:head_list=9.0": "layer.head",
        "act:head_list=1": "layer.head",
        "paint:local_layer=9": "full-attention layer",
        "paint:alpha=-1": "at least 0",
        "act:sinks=none": "mass, secondary",
    }.items():
        with pytest.raises(vlm_fix.VlmFixError, match=message):
            vlm_fix.wrap(models["llava"], spec)
    with (
        vlm_fix.wrapped(models["llava"], "act:sinks=secondary,life=3"),
        pytest.raises(vlm_fix.VlmFixError, match="two numbers"),
    ):
        greedy(models["llava"], single("llava", [1], 0))


def test_cca_keeps_to_causal_prompts():
    """All of PaliGemma's prompt sees all of it: rings have nothing to add, their positions do."""
    model, inputs = families.build("paligemma"), families.prompt("paligemma", [1])
    plain = greedy(model, inputs)[1]
    with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="cca:mask=false"):
        greedy(model, inputs)
    with vlm_fix.wrapped(model, "cca:mask=false"):
        assert not torch.allclose(greedy(model, inputs)[1], plain, atol=1e-3)


def test_crops_are_refused():
    """LLaVA-NeXT shows an image as several grids with newlines between."""
    model, inputs = families.build("llava_next"), families.prompt("llava_next", [1])
    with pytest.raises(vlm_fix.VlmFixError, match="cannot in llava_next"):
        vlm_fix.wrap(model, "paint")
    with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="one grid in reading order"):
        greedy(model, inputs)
    with vlm_fix.wrapped(model, ["act", "tame"]):
        greedy(model, inputs)


@pytest.mark.parametrize("depth", [1, 2, 3, 28, 32, 40])
def test_defaults_fit_every_depth(models, depth):
    for model in models.values():
        arch = replace(vlm_fix.families.arch_of(model), depth=depth)
        for name in ("tame", "act", "paint"):
            resolved = vlm_fix.parse_spec(name).resolve(arch)
            assert resolved.layers and set(resolved.layers) <= set(range(depth)) and not resolved.neutral
            assert vlm_fix.parse_spec(resolved.spec()) == replace(resolved, layers="|".join(map(str, resolved.layers)))


NEUTRAL = ["tame:gamma=0", "act:beta=1", "act:threshold=1", "paint:alpha=0,beta=0", "cca:positions=false,mask=false"]


@pytest.mark.parametrize("spec", NEUTRAL)
def test_neutral_is_bit_identical(family, model, spec):
    inputs = make_inputs(family, [1, 2, 0])
    tokens, logits, _ = greedy(model, inputs)
    with vlm_fix.wrapped(model, spec):
        t, seen, _ = greedy(model, inputs)
    assert torch.equal(t, tokens) and torch.equal(seen, logits)


@pytest.mark.parametrize("spec", CASES)
def test_batch_equals_single(family, model, spec):
    """Left-padded rows with 1, 2 and 1 images against each row alone; a prompt twice gives the same."""
    images = [1, 2, 1]
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, make_inputs(family, images, seed=3))
        for row in range(3):
            t, seen, _ = greedy(model, single(family, images, row, seed=3))
            assert torch.equal(t[0], tokens[row])
            assert float((seen[0] - logits[row]).abs().max()) < 2e-4
        assert torch.equal(greedy(model, make_inputs(family, images, seed=3))[1], logits), "state survived a call"


@pytest.mark.parametrize("spec", CASES)
def test_beams_static_cache_and_chunks(family, model, spec):
    one, batch = single(family, [1, 2], 1), make_inputs(family, [1, 2])
    with vlm_fix.wrapped(model, spec):
        plain = model.generate(**one, max_new_tokens=6, do_sample=False)
        for option in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
            assert torch.equal(model.generate(**one, max_new_tokens=6, do_sample=False, **option), plain), option
        if family == "llava":
            chunks = {"max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": 11}
            if spec.startswith("paint"):
                if works_unwrapped(BUILD[family](), one, {"prefill_chunk_size": 11}):
                    assert torch.equal(model.generate(**one, **chunks), plain)
            else:
                with pytest.raises(vlm_fix.VlmFixError, match="whole prompt in one forward"):
                    model.generate(**one, **chunks)
        beams = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)[1, -5:]
        alone = model.generate(**one, max_new_tokens=5, num_beams=3, do_sample=False)[0, -5:]
        assert torch.equal(alone, beams)


def test_text_only_row(family, model):
    """PAINT leaves a text-only row alone; TAME and ACT are made for language models and work on it."""
    inputs = make_inputs(family, [1, 0])
    plain = greedy(model, inputs)[1]
    for spec in CASES:
        with vlm_fix.wrapped(model, spec):
            got = greedy(model, inputs)[1]
        assert torch.equal(got[1], plain[1]) == spec.startswith("paint"), spec
        assert not torch.equal(got[0], plain[0])


def test_stack_with_pruning_and_contrast(family, model):
    """Encoder scores for PAINT beside a pruner's own; the scores follow the tokens that are kept."""
    images, stack = [1, 2, 1], ["hiprune:keep=6", "paint", "tame", "act:threshold=0.06", "vcd:beta=0.01"]
    with vlm_fix.wrapped(model, stack):
        tokens = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


@pytest.mark.parametrize("spec", ["cca", *CASES])
def test_second_turn_on_a_kept_cache(family, model, spec):
    """The next question, asked on the first turn's cache. CCA only changes inputs: the whole prompt gives the same."""
    inputs = single(family, [2], 0)
    images = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    with vlm_fix.wrapped(model, spec):
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family == "qwen2_5_vl":
            turn["mm_token_type_ids"] = (ids == IMAGE).int()
        again = model.generate(**turn, past_key_values=first.past_key_values, **options)
        whole = model.generate(**turn, **images, **options)
    plain = model.generate(**turn, **images, **options)
    logits, expected, before = (torch.stack(out.logits) for out in (again, whole, plain))
    assert torch.isfinite(logits).all() and not torch.allclose(logits[0], before[0], atol=1e-3)
    if spec == "cca":
        assert torch.equal(again.sequences, whole.sequences) and torch.allclose(logits, expected, atol=2e-4)


def test_paint_follows_the_kept_tokens(model, family):
    """With every token kept but re-packed by a pruner, PAINT's strengths stay on their tokens."""
    inputs = single(family, [1, 2], 1)
    seen = {}
    from vlm_fix.methods.paint import PAINT as Method

    def spy(self, session, kwargs, original=Method.prepare):
        kwargs = original(self, session, kwargs)
        if session.start == 0:
            seen[session.kept is not None] = (session.state(self)["strength"][0], session.kept)
        return kwargs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "prepare", spy)
        for stack in (["paint"], ["paint", "random_tokens:keep=5"]):
            with vlm_fix.wrapped(model, stack):
                greedy(model, inputs, steps=1)
    (whole, _), (pruned, kept) = seen[False], seen[True]
    assert torch.equal(pruned, whole[kept.index[0]]) and pruned.any() and len(pruned) < len(whole)
