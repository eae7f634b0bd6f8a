"""Contrast methods: token-identical to branches recomputed from scratch, in every decoding mode; sharing; joined steps."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import pytest
import torch
from transformers import LogitsProcessor

import vlm_fix
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.decoding import Cake, second_prompt
from tests.support.run import VAR_TINY, Streamed, error, greedy
from vlm_fix.families.compat import cache_of
from vlm_fix.registry import parse_spec

STEPS = 4
CAKE = (
    f"layercake:punctuation={'|'.join(map(str, range(3, 40)))},concepts={'|'.join(map(str, range(40, 60)))},beta=0.01"
)
SPECS = [
    "vcd:beta=0.01",
    "pai:alpha=0.5,gamma=1.3",
    "icd:tokens=11|12|13,beta=0.01",
    "m3id:decay=0.3,beta=0.01",
    "sid:beta=0.01",
    "decore:head_list=1.0|1.3|2.2|3.1",
    "iava:tokens=21|22|23,beta=0.01",
    "causalmm:beta=0.01",
    CAKE,
]
MORE = ["sid:keep=5,layers=3,refresh=false,alpha=2", "sid:keep=5,refresh=false",
        "decore:head_list=0.1|3.1,normalised=true,cap=0.5,beta=0.1",
        "iava:tokens=21|22,coverage=1,high=0.2,drop=-5,beta=0", "causalmm:vision=reversed,language=none",
        "causalmm:vision=uniform,language=uniform,gamma=2", "causalmm:vision=random,language=random,seed=3",
        "causalmm:vision=none,language=reverse,layers=1|3"]  # fmt: skip


def name(spec):
    return spec if len(spec) < 80 else spec.partition(":")[0]


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


def distribution(model, twin, spec, inputs, answer):
    """Log-probabilities [V] of the token after `answer`, one unpadded sample, both branches from scratch."""
    method, ids = vlm_fix.parse_spec(spec), inputs["input_ids"]
    n, visual, t = ids.shape[1], ref.visual_columns(ids), len(answer)
    run = ref.PaiReference(visual, n, [2, 3], alpha=method.alpha) if method.name == "pai" else None
    main = ref.teacher_forced(twin, run, inputs, answer)[-1].log_softmax(-1)
    if method.name == "vcd":
        call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), inputs)
        other = ref.teacher_forced(
            twin, None, {**inputs, "pixel_values": method.noised(inputs["pixel_values"], call)}, answer
        )
    elif method.name in ("pai", "m3id", "icd"):
        other = ref.teacher_forced(twin, None, second_prompt("icd" if method.name == "icd" else "m3id", inputs), answer)
    elif method.name == "sid":
        first = int(str(method.layers or 2).rstrip("-"))
        run = SidReference(visual, n, [0, 1, 2, 3], keep=method.keep, refresh=method.refresh, first=first)
        other = ref.teacher_forced(twin, run, inputs, answer)
    elif method.name == "decore":
        heads = tuple(tuple(map(int, item.split("."))) for item in method.head_list)
        other = ref.teacher_forced(twin, DecoreReference(visual, n, [0, 1, 2, 3], heads=heads), inputs, answer)
    elif method.name == "layercake":
        m = method.resolve(vlm_fix.families.arch_of(model))
        run = Cake(visual, n, list(m.layers), m.prompt_rows, ids=[*ids[0].tolist(), *answer.tolist()], method=m)
        other = ref.teacher_forced(twin, run, inputs, answer)
    elif method.name == "iava":
        kept = iava_kept(twin, method, inputs)
        other = with_embeddings(twin, lambda x: x * kept[:, None], None, inputs, answer)
    l, p = main, main.exp()
    if method.name == "causalmm":
        layers, others = method.resolve(vlm_fix.families.arch_of(model)).layers, []
        if method.vision != "none":
            new = causal_images(twin, method, inputs)
            others.append(with_embeddings(twin, lambda x: new, None, inputs, answer))
        if method.language != "none":
            run = CausalReference(visual, n, layers, how=method.language, seed=method.seed)
            others.append(ref.teacher_forced(twin, run, inputs, answer))
        o = torch.stack([x[-1].log_softmax(-1) for x in others]).mean(0)
    else:
        o = other[-1].log_softmax(-1)
    weight = getattr(method, "alpha", None)
    if method.name == "causalmm":
        weight = method.gamma * len(others)
    elif method.name == "pai":
        weight = method.gamma - 1
    elif method.name == "m3id":
        g = math.exp(-method.decay * (t + 1))
        weight = (1 - g) / g
    elif method.name == "decore":
        entropy = -sum(float(v) * math.log(float(v)) for v in p if v > 0)
        weight = method.alpha * (entropy / math.log(len(p)) if method.normalised else entropy)
        weight = min(weight, math.inf if method.cap is None else method.cap)
    z = (1 + weight) * l - weight * o
    cut = torch.tensor([float(v) < method.beta * float(p.max()) for v in p])
    return z.masked_fill(cut, -math.inf).log_softmax(-1)


class Scratch(LogitsProcessor):
    """Replaces the scores by `distribution`, row by row: the same `generate`, without caches, hooks or engine."""

    def __init__(self, model, spec, family, images):
        self.model, self.twin, self.spec = model, ref.double(model), spec
        self.alone = [single(family, images, row) for row in range(len(images))]
        self.length = make_inputs(family, images)["input_ids"].shape[1]

    def __call__(self, input_ids, scores):
        times = len(input_ids) // len(self.alone)
        rows = [
            distribution(self.model, self.twin, self.spec, self.alone[i // times], row[self.length :])
            for i, row in enumerate(input_ids)
        ]
        return torch.stack(rows).to(scores.dtype)


class NoImages(LogitsProcessor):
    """No special tokens in the answer: the passes from scratch would take them for images."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(IMAGE, 96), -math.inf)


MODES = {
    "greedy": ([1, 2, 1], {"do_sample": False}),
    "sampling": ([2, 1], {"do_sample": True, "temperature": 0.8, "top_k": 20}),
    "beams": ([1], {"do_sample": False, "num_beams": 3}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_tokens_of_branches_from_scratch(family, model, spec, mode):
    images, options = MODES[mode]
    compare(family, model, spec, images, {"max_new_tokens": STEPS, **options})


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_streamed_tokens_of_branches_from_scratch(family, model, spec):
    compare(family, model, spec, [2], {"max_new_tokens": STEPS, "do_sample": True}, Streamed())


def compare(family, model, spec, images, options, streamer=None):
    inputs = make_inputs(family, images)
    torch.manual_seed(3)
    theirs = model.generate(**inputs, **options, logits_processor=[Scratch(model, spec, family, images), NoImages()])
    with vlm_fix.wrapped(model, spec):
        torch.manual_seed(3)
        ours = model.generate(**inputs, **options, streamer=streamer, logits_processor=[NoImages()])
    assert torch.equal(ours, theirs)
    assert streamer is None or streamer.tokens == theirs[0].tolist()


@pytest.mark.parametrize("spec", [*SPECS, *MORE], ids=name)
def test_scores_of_branches_from_scratch(family, model, spec):
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    with vlm_fix.wrapped(model, spec):
        tokens, logits, scores = greedy(model, inputs, 3)
    for t in range(3):
        theirs = distribution(model, twin, spec, inputs, tokens[0, :t])
        cut = torch.isinf(theirs)
        assert torch.equal(torch.isinf(scores[0, t]), cut)
        assert error(scores[0, t][~cut], theirs[~cut]) < 1e-5
        assert float((scores[0, t] - logits[0, t].log_softmax(-1))[~cut].abs().max()) > 1e-3, "the contrast must matter"


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_joined_steps_equal_separate_ones(family, model, spec, monkeypatch):
    """The 2B batch gives the tokens and scores of one branch after the other, and the caller sees nothing of it."""
    from vlm_fix.decoding import joint

    inputs, joined, attention = make_inputs(family, [1, 2, 1]), [], joint.Joint.attention
    monkeypatch.setattr(joint.Joint, "attention", lambda self, *a, **k: joined.append(1) or attention(self, *a, **k))

    def run(**options):
        torch.manual_seed(1)
        return model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, **options)

    modes = ({"do_sample": False}, {"do_sample": True, "num_return_sequences": 2})
    with vlm_fix.wrapped(model, [spec, f"var:branch=main,{VAR_TINY}"]):
        fast = [run(**mode) for mode in modes]
        assert len(joined) == 2 * 4 * 4, "four steps after the first, four layers"
        run(num_beams=2, do_sample=False)
        assert len(joined) == 2 * 4 * 4, "beams move: they do not join"
        monkeypatch.setattr(joint, "joinable", lambda *_: False)
        slow = [run(**mode) for mode in modes]
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a.sequences, b.sequences)
        x, y = torch.stack(a.scores), torch.stack(b.scores)
        assert torch.equal(torch.isinf(x), torch.isinf(y)) and torch.allclose(x, y, atol=1e-4)
        assert [k.keys.shape for k in cache_of(a).layers] == [k.keys.shape for k in cache_of(b).layers]


@pytest.mark.parametrize(
    ("spec", "passes", "rows"),
    [("icd:tokens=11|12|13", 1, "tail"), ("decore:head_list=1.0|3.1", 1, "last"), ("sid", 1, "last"),
     ("iava:tokens=21|22", 1, "all"), ("causalmm", 1, "all"), ("m3id", 1, "tail"), ("vcd", 2, "all")],
)  # fmt: skip
def test_branches_share_layers_and_columns_up_to_their_change(family, model, spec, passes, rows):
    """The vision tower runs once per distinct image; columns before the prompts part are not computed again."""
    inputs, runs, lengths = single(family, [1, 2], 1), [], []
    tower = vlm_fix.families.get_part(model, vlm_fix.families.family_of(model).vision)
    handles = [
        tower.register_forward_hook(lambda *a: runs.append(1)),
        model.model.language_model.layers[0].register_forward_hook(lambda m, a, o: lengths.append(o.shape[1])),
    ]
    try:
        with vlm_fix.wrapped(model, spec):
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    whole, ids = inputs["input_ids"].shape[1], inputs["input_ids"][0].tolist()
    after = whole - max(i for i, t in enumerate(ids) if t == IMAGE) - 1
    before = ids.index(IMAGE)
    expected = {
        "icd": after - (family != "llava") + 3,
        "decore": 1,
        "sid": 1,
        "m3id": whole - before - ids.count(IMAGE),
    }
    assert len(runs) == passes and lengths[0] == whole
    assert lengths[-1] == (whole if rows == "all" else expected[spec.partition(":")[0]])


@pytest.mark.parametrize(
    "spec", ["sid:beta=0.01", "sid:keep=5,refresh=false,beta=0", "sid:keep=5,layers=2,refresh=false"]
)
def test_branch_that_starts_at_a_later_layer_equals_the_whole_one(family, model, spec, monkeypatch):
    """Layers and columns that the branch does not compute change nothing; the later layers keep what they need."""
    from vlm_fix.decoding import contrast

    lengths, options = [], {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_scores": True}
    modes = [([1, 2, 1], {}), ([1, 0, 2], {"num_return_sequences": 2, "do_sample": True}), ([2, 1], {"num_beams": 3}),
             ([1], {"num_beams": 2}), ([1, 2], {"prefill_chunk_size": 40}), ([1], {"prompt_lookup_num_tokens": 2})]  # fmt: skip
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, o: lengths.append(o.shape[1]))
        for layer in model.model.language_model.layers
    ]

    def run(images, mode):
        torch.manual_seed(1)
        lengths.clear()
        inputs = make_inputs(family, images)
        return model.generate(**inputs, **{"do_sample": False, **options, **mode}, logits_processor=[NoImages()])

    try:
        with vlm_fix.wrapped(model, [spec, "pai:branch=negative,layers=2-,alpha=0.5,gamma=1"]):
            ours = [run(*mode) for mode in modes]
            whole = make_inputs(family, [1])["input_ids"].shape[1]
            visual = (make_inputs(family, [1])["input_ids"] == IMAGE).sum()
            rows = whole - visual + 5 if spec.startswith("sid:keep=5,refresh") else whole
            run([1], {})
            assert lengths[:8] == [whole] * 4 + [1, 1, rows, rows]
            monkeypatch.setattr(contrast.Branch, "_fork", lambda *args: 0)
            theirs = [run(*mode) for mode in modes]
            run([1], {})
            assert lengths[:8] == [whole] * 8
    finally:
        for hook in hooks:
            hook.remove()
    for a, b, (_, mode) in zip(ours, theirs, modes, strict=True):
        assert torch.equal(a.sequences, b.sequences), mode
        x, y = torch.stack(a.scores), torch.stack(b.scores)
        assert torch.equal(torch.isinf(x), torch.isinf(y)) and torch.allclose(x, y, atol=1e-4), mode


@pytest.mark.parametrize("pruner", ["fastv:keep=9,layer=3", "fastv:keep=9,layer=1"])
@pytest.mark.filterwarnings("ignore:.* changed nothing in this call. its keep covers every image token")
def test_sid_beside_a_pruner(family, model, pruner):
    """Rankings follow the columns that a pruner leaves in later layers."""
    with vlm_fix.wrapped(model, ["sid:keep=5,beta=0", pruner]):
        batch = greedy(model, make_inputs(family, [1, 2, 1]), 3)[2]
        for row in range(3):
            assert torch.allclose(batch[row], greedy(model, single(family, [1, 2, 1], row), 3)[2][0], atol=1e-4)
    with pytest.raises(vlm_fix.VlmFixError, match="sid does not follow"):
        vlm_fix.wrap(model, ["sid", "knorm:keep=9"])


def test_edit_in_one_branch_leaves_the_other_alone(family, model):
    """`branch` says where an attention edit of the stack acts."""
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    visual, n = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    for branch in ("both", "main", "negative"):
        with vlm_fix.wrapped(model, [f"pai:alpha=0.5,branch={branch}", "icd:tokens=11|12|13,beta=0"]):
            tokens, logits, scores = greedy(model, inputs, 3)
        prompt = second_prompt("icd", inputs)
        run = {b: None for b in ("main", "negative")}
        if branch != "negative":
            run["main"] = ref.PaiReference(visual, n, [2, 3], alpha=0.5)
        if branch != "main":
            run["negative"] = ref.PaiReference(visual, prompt["input_ids"].shape[1], [2, 3], alpha=0.5)
        main = ref.teacher_forced(twin, run["main"], inputs, tokens[0, :-1])
        other = ref.teacher_forced(twin, run["negative"], prompt, tokens[0, :-1])
        assert error(logits[0], main) < 1e-5
        z = 2 * main.log_softmax(-1) - other.log_softmax(-1)
        assert error(scores[0], z.log_softmax(-1)) < 1e-5
    with pytest.raises(vlm_fix.VlmFixError, match="branch=negative needs a contrast"):
        vlm_fix.wrap(model, "pai:branch=negative")


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_drafted_tokens_are_checked_against_the_contrast(family, model, spec):
    """Drafted tokens are checked against the contrast: the tokens are those of greedy."""
    from tests.support import models

    inputs, draft = single(family, [1, 2], 1), models.BUILD[family](seed=0, depth=2)
    with vlm_fix.wrapped(model, spec):
        inputs["logits_processor"] = [NoImages()]
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": draft}):
            got = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
            assert torch.equal(got, expected), options


def test_combine_equals_three_tokens_by_hand():
    """Three tokens, p = (.6, .3, .1) against q = (.5, .1, .4)."""
    p, q = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()

    def scores(spec):
        return vlm_fix.parse_spec(spec).combine_at(0, p, q)[0]

    for name in ("vcd:alpha=1,beta=0.4", "icd:alpha=1,beta=0.4", "sid:alpha=1,beta=0.4", "iava:alpha=1,beta=0.4"):
        z = scores(name)
        assert z[:2].tolist() == pytest.approx([math.log(0.72), math.log(0.9)]) and z[2] == -math.inf  # .36/.5, .09/.1
    z = scores("pai:gamma=2,beta=0.4")
    assert z[:2].tolist() == pytest.approx([math.log(0.72), math.log(0.9)]) and z[2] == -math.inf
    h = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert scores("decore").tolist() == pytest.approx(
        [math.log(0.6) + h * math.log(1.2), math.log(0.3) + h * math.log(3), math.log(0.1) - h * math.log(4)]
    )
    assert scores("decore:normalised=true,alpha=3,cap=1").tolist() == pytest.approx(
        [math.log(0.72), math.log(0.9), math.log(0.025)]
    )


def test_decore_calibration_repeats_for_a_seed_and_leaves_the_weights(family, model):
    """The same heads for the same seed, the model as it was, and a spec that wraps."""
    from vlm_fix.sample import Sample

    samples = [Sample(single(family, [1], 0, seed=s), 5, 6) for s in range(4)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shares = []
    found = vlm_fix.parse_spec("decore:share=0.2").calibrate(
        model, samples, 3, lambda what, share: shares.append(share)
    )
    again = vlm_fix.parse_spec("decore:share=0.2").calibrate(model, samples, 3, lambda what, share: None)
    assert found == again and shares[-1] == 1 and 1 <= len(found["head_list"]) <= 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with vlm_fix.wrapped(model, vlm_fix.registry.get_method("decore")(**found)):
        greedy(model, single(family, [1], 0), 2)
    with pytest.raises(vlm_fix.VlmFixError, match="vlm-fix calibrate decore"):
        vlm_fix.wrap(model, "decore")


@dataclass
class Copied(ref.Reference):
    targets: tuple = ()
    hits: dict = field(default_factory=dict)

    def edited(self, row):
        return row >= self.prompt_len - len(self.targets)

    def weight(self, a, layer, head, row):
        best = max(range(len(a)), key=lambda j: float(a[j]))
        target = self.targets[row - self.prompt_len + len(self.targets)]
        self.hits[layer, head] = self.hits.get((layer, head), 0) + (best == target) / len(self.targets)
        return a


def test_copying_heads_equal_reference(family, model):
    from vlm_fix.engine import Engine
    from vlm_fix.methods.contrast.decore import copies

    g = torch.Generator().manual_seed(1)
    hay, needle = torch.randint(3, 9, (20,), generator=g).tolist(), [3, 4, 5, 6, 7]
    ids = torch.tensor([[1, *hay[:9], *needle, *hay[9:], *needle[:-1]]])
    run = Copied([], ids.shape[1], [0, 1, 2, 3], targets=tuple(range(11, 15)))
    ref.teacher_forced(ref.double(model), run, {"input_ids": ids}, ids[0, :0])
    engine = Engine(model, [])
    engine.install(idle=True)
    try:
        found = copies(engine, ids, 10, 5)
    finally:
        engine.remove()
    assert sum(run.hits.values()) > 0
    for (layer, head), rate in run.hits.items():
        assert float(found[layer, head]) == pytest.approx(rate)


@pytest.mark.parametrize("spec", ["causalmm:language=none", "causalmm:vision=none"])
def test_causalmm_contrasts_every_token(family, model, spec):
    """The official cache is shared, so that from the second token on nothing is contrasted: not here."""
    with vlm_fix.wrapped(model, spec + ",beta=0"):
        _, logits, scores = greedy(model, single(family, [1, 2], 1), 6)
    difference = (scores[0] - logits[0].log_softmax(-1)).abs().amax(-1)
    assert (difference > 1e-2).all(), difference


@pytest.mark.parametrize("spec", [s for s in SPECS if parse_spec(s).needs_image], ids=name)
def test_row_without_image_gets_the_plain_models_tokens(family, model, spec):
    inputs = make_inputs(family, [1, 0, 2])
    tokens = greedy(model, inputs, STEPS)[0]
    with vlm_fix.wrapped(model, spec):
        ours, _, scores = greedy(model, inputs, STEPS)
    assert torch.equal(ours[1], tokens[1]) and not torch.isnan(scores).any()


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_half_precision_scores_stay_near_those_of_single(family, spec):
    """bf16 scores stay near those of the same weights in fp32, on fp32's tokens."""
    from tests.support import models

    half, inputs = models.BUILD[family](torch.bfloat16), single(family, [1, 2], 1, dtype=torch.bfloat16)
    whole = models.BUILD[family]()
    whole.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    scores = []
    for model in (whole, half):
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with vlm_fix.wrapped(model, spec):
            scores.append(greedy(model, inputs, 1)[2][0, 0])
    both = torch.isfinite(scores[0]) & torch.isfinite(scores[1])
    assert both.sum() > 3 and error(scores[1][both], scores[0][both].double()) < 0.1


@pytest.mark.parametrize("spec", ["vcd:beta=0.01", "vcd:alpha=2,noise_step=999", "pai:alpha=0.5,gamma=1.3"])
def test_contrast_equals_cache_free_reference(family, model, spec):
    """Both branches recomputed from scratch at every step, combined by hand."""
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    method = vlm_fix.parse_spec(spec)
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs)
    visual, n = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    run = ref.PaiReference(visual, n, [2, 3], alpha=0.5) if spec.startswith("pai") else None
    main = ref.teacher_forced(twin, run, inputs, tokens[0, :-1]).log_softmax(-1)
    if spec.startswith("pai"):
        keep = inputs["input_ids"][0] != IMAGE
        ids = inputs["input_ids"][:, keep]
        negative = ref.teacher_forced(twin, None, {"input_ids": ids}, tokens[0, :-1]).log_softmax(-1)
        z = method.gamma * main - (method.gamma - 1) * negative
    else:
        call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), inputs)
        noised = {**inputs, "pixel_values": method.noised(inputs["pixel_values"], call)}
        negative = ref.teacher_forced(twin, None, noised, tokens[0, :-1]).log_softmax(-1)
        z = (1 + method.alpha) * main - method.alpha * negative
    for t in range(len(z)):
        p = main[t].exp()
        cut = torch.tensor([float(p[v]) < method.beta * float(p.max()) for v in range(len(p))])
        expected = z[t].masked_fill(cut, -torch.inf).log_softmax(-1)
        assert torch.equal(torch.isinf(scores[0, t]), cut)
        assert int(tokens[0, t]) == int(expected.argmax())
        assert error(scores[0, t][~cut], expected[~cut]) < 1e-5
