"""Cache pruning against a full-length float64 pass in which the answer's rows do not see the dropped keys, head by head."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import BUILD, IMAGE, make_inputs, single
from tests.support.references import pruning_after
from tests.support.references.pruning_after import STEPS, Slow, quota
from tests.support.references.pruning_before import ranked
from tests.support.run import VAR_TINY, error, greedy
from vlm_fix import AttentionOutputEdit, MLPOutputEdit
from vlm_fix.attention.inputs import AttentionInputs
from vlm_fix.families.compat import CACHE, cache_of
from vlm_fix.pruning import PruningWing
from vlm_fix.pruning.cache import ShortLayer
from vlm_fix.wing import engine_of


class SlowCache(Slow):
    """`choose(run, layer, keys [Hkv, L, D], values)` -> per key-value head the image columns that stay."""

    def __init__(self, family, model, inputs, method, choose):
        super().__init__(family, model, inputs, (), choose)
        self.model = model
        self.method, self.normed, self.kv_heads = method, {}, model.config.get_text_config().num_key_value_heads
        self.visual = {j for image in self.images for j in image}

    def hook(self, i):
        def enter(module, args, kwargs):
            self.normed[i] = module.input_layernorm(args[0] if args else kwargs["hidden_states"])[0]

        return enter

    def masked(self, layer, z, keys, values):
        self.weights[layer] = z[0].softmax(-1)
        if layer not in self.method.layers:
            return z
        prompt = self.last + 1
        kept = self.choose(self, layer, keys[:, :prompt], values[:, :prompt])
        groups = z.shape[1] // len(kept)
        for h in range(z.shape[1]):
            z[0, h, prompt:, sorted(self.visual - set(kept[h // groups]))] = -torch.inf
        if self.method.name == "razor":
            for h in range(z.shape[1]):
                group = range(h // groups * groups, (h // groups + 1) * groups)
                for image in () if any((layer, other) in HEADS for other in group) else self.images:
                    rest = image[: len(image) - quota(self.method.keep, len(image))]
                    z[0, h, prompt:, rest] = (sum(z[0, h, prompt:, j] for j in rest) / len(rest))[:, None]
        if hasattr(self.method, "core"):
            self.wander(layer, z, kept[0])
        return z

    def wander(self, layer, z, stored):
        """A-VL, row by row of the answer: most see the core of the image alone, and each head forgets text of its own."""
        m, last = self.method, self.last
        core = ranked(self.seen_by(layer, last), sorted(stored))[: quota(m.core, len(self.visual))]
        text = [list(self.question) for _ in range(self.kv_heads)]
        got = [[0.0] * z.shape[-1] for _ in text]
        groups = z.shape[1] // len(text)

        def look(r, g):
            for h in range(g * groups, (g + 1) * groups):
                for j, w in enumerate(z[0, h, r, : r + 1].softmax(-1).tolist()):
                    got[g][j] += w

        def forget(r):
            total = r + 1 - self.question[0]
            n = max(round(m.text_keep * total), m.text_start)
            newest = n - int(m.heavy * n)
            for g in range(len(text)):
                if len(text[g]) > n:
                    old, recent = text[g][: len(text[g]) - newest], text[g][len(text[g]) - newest :]
                    text[g] = sorted(ranked(got[g], old)[: n - newest]) + recent

        for g in range(len(text)):
            for r in self.question:
                look(r, g)
        if m.text_keep < 1:
            forget(last)
        for r in range(last + 1, z.shape[2]):
            for g in range(len(text)):
                text[g].append(r)
                gone = [j for j in range(self.question[0], r) if j not in text[g]]
                z[0, g * groups : (g + 1) * groups, r, gone] = -torch.inf
            whole = m.core >= 1 or (r - last) % m.every == 0
            if not whole:
                z[0, :, r, sorted(self.visual - set(core))] = -torch.inf
            for g in range(len(text)):
                look(r, g)
            if whole:
                row = z[0, :, r, : r + 1].softmax(-1).mean(0)
                core = ranked(row, sorted(stored))[: quota(m.core, len(self.visual))]
            if m.text_keep < 1 and (r - last) % m.text_every == 0:
                forget(r)


def per_image(run, scores):
    kept = []
    for image in run.images:
        kept += ranked(scores, image)[: quota(run.method.keep, len(image))]
    return kept


def chosen(run, scores):
    """scores [Hkv][n] by head -> the choice, each head's own or that of their mean."""
    if run.method.heads == "mean":
        mean = [sum(s[j] for s in scores) / len(scores) for j in range(len(scores[0]))]
        return [per_image(run, mean)] * len(scores)
    return [per_image(run, s) for s in scores]


def knorm(run, layer, keys, values):
    return chosen(run, [[-math.sqrt(sum(float(x) ** 2 for x in k)) for k in head] for head in keys])


def a_vl(run, layer, keys, values):
    return [per_image(run, run.seen_by(layer, run.last))] * len(keys)


def expected_attention(run, layer, keys, values):
    attn, n, dim = run.layers[layer].self_attn, keys.shape[1], keys.shape[2]
    method, ids = run.method, run.inputs["input_ids"]
    q = attn.q_proj(run.normed[layer][:n]).view(n, -1, dim)
    first = n
    if run.family == "qwen2_5_vl":
        grid, types = run.inputs["image_grid_thw"], run.inputs["mm_token_type_ids"]
        first = int(run.twin.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=types)[0].max()) + 1
    turn = torch.zeros(dim, dim, dtype=torch.float64)
    for p in range(first, first + method.future):
        for i in range(dim // 2):
            angle = p / 10000.0 ** (2 * i / dim)
            a, b = i, i + dim // 2
            turn[a, a] += math.cos(angle) / method.future
            turn[b, b] += math.cos(angle) / method.future
            turn[a, b] -= math.sin(angle) / method.future
            turn[b, a] += math.sin(angle) / method.future
    groups, scores = q.shape[1] // len(keys), [[0.0] * n for _ in keys]
    for h in range(q.shape[1]):
        rows = [q[i, h] for i in range(method.sinks, n)]
        mean = sum(rows) / len(rows)
        sigma = sum(torch.outer(r - mean, r - mean) for r in rows) / len(rows)
        mu, sigma = turn @ mean, turn @ sigma @ turn.T
        z = {}
        for j in range(method.sinks, n):
            k = keys[h // groups, j]
            z[j] = float(mu @ k) / math.sqrt(dim) + (float(k @ sigma @ k) / 2 / dim if method.covariance else 0.0)
        top = max(z.values())
        total = sum(math.exp(v - top) for v in z.values())
        for j, v in z.items():
            scores[h // groups][j] += math.exp(v - top) / total / groups
    for g, head in enumerate(scores):
        for j in range(n):
            norm = float(values[g, j].norm()) if method.value_norm else 1.0
            head[j] = math.inf if j < method.sinks else (head[j] + method.epsilon * method.value_norm) * norm
    return chosen(run, scores)


def kvcompose(run, layer, keys, values):
    """A budget for all layers: from a pass of its own over the prompt."""
    method, plain, outer = run.method, getattr(run, "plain", None), pruning_after.RUN
    if plain is None:
        plain = run.plain = Slow(run.family, run.model, run.inputs, (), None)
        plain.logits(torch.ones(STEPS, dtype=torch.long))
        pruning_after.RUN = outer
    heads, layers = len(keys), sorted(method.layers)
    groups = len(plain.weights[0]) // heads

    def scores(i):
        s = []
        for g in range(heads):
            rows = [plain.weights[i][h] for h in range(g * groups, (g + 1) * groups)]
            s.append(
                [sum(max(float(w[r, j]) for r in run.question) for w in rows) / groups for j in range(run.last + 1)]
            )
        mean = [sum(head[j] for head in s) / heads for j in range(run.last + 1)]
        return [[v + m * method.share for v, m in zip(head, mean, strict=True)] for head in s]

    kept = [[] for _ in range(heads)]
    for image in run.images:
        composed = {}
        for i in layers:
            sorted_heads = [sorted((s[j] for j in image), reverse=True) for s in scores(i)]
            composed[i] = [sum(column) / heads for column in zip(*sorted_heads, strict=True)]
            composed[i][: method.least] = [math.inf] * method.least
        composed[layers[0]] = [max(column) for column in zip(*composed.values(), strict=True)]
        flat = sorted(((-c, i, k) for i in layers for k, c in enumerate(composed[i])))
        count = sum(i == layer for _, i, _ in flat[: quota(method.keep, len(image)) * len(layers)])
        for g, s in enumerate(scores(layer)):
            kept[g] += ranked(s, image)[:count]
    return kept


def razor(run, layer, keys, values):
    """Everything stays: `SlowCache.masked` then gives what is outside the window one score."""
    return [sorted(run.visual)] * len(keys)


HEADS = ((0, 1), (2, 3), (3, 0), (3, 2))
SPECS = {
    "razor:keep=3,head_list=0.1|2.3|3.0|3.2": razor,
    "razor:keep=0.3,head_list=0.1|2.3|3.0|3.2,layers=0|2": razor,
    "kvcompose:keep=3": kvcompose,
    "kvcompose:keep=0.2,share=false,least=2,layers=1-3": kvcompose,
    "knorm:keep=3": knorm,
    "knorm:keep=0.2,heads=mean,layers=1|3": knorm,
    "expected_attention:keep=3": expected_attention,
    "expected_attention:keep=0.2,heads=mean,future=7,sinks=6,epsilon=0.1,covariance=false": expected_attention,
    "expected_attention:keep=4,value_norm=false,layers=0": expected_attention,
    "a_vl:core=0.1,every=2,text_keep=1": a_vl,
    "a_vl:core=1,keep=0.2,text_keep=1,layers=1|3": a_vl,
    "a_vl:core=1,keep=6,text_start=3,text_every=1": a_vl,
    "a_vl:keep=0.5,core=0.2,every=3,text_keep=0.4,text_start=2,text_every=2,heavy=0.5": a_vl,
}
EVERY = [
    "knorm:keep=3",
    "kvcompose:keep=3",
    "razor:keep=3,head_list=1.0",
    "expected_attention:keep=3",
    "a_vl:core=0.2,text_start=3,text_every=2",
]


@pytest.mark.parametrize("spec", SPECS)
def test_answers_equal_reference(family, model, spec):
    """Each row of a left-padded batch against its own full-length pass."""
    images = [1, 2, 1]
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, make_inputs(family, images), STEPS, suppress_tokens=[IMAGE])
        method = engine_of(model).wing(PruningWing).pruners.cacher
    plain = greedy(model, make_inputs(family, images), STEPS, suppress_tokens=[IMAGE])[1]
    assert torch.equal(plain[:, 0], logits[:, 0]), "the prompt is computed in full"
    assert float((plain[:, 1] - logits[:, 1]).abs().max()) > 1e-3
    for row in range(3):
        run = SlowCache(family, model, single(family, images, row), method, SPECS[spec])
        assert error(logits[row], run.logits(tokens[row])) < 1e-5


@pytest.mark.parametrize("spec", EVERY)
def test_batch_equals_single_beside_edit_contrast_and_pruner(family, model, spec):
    images = [1, 2, 1]
    with vlm_fix.wrapped(model, [spec, "pai:alpha=0.5", "vcd:beta=0.01", "divprune:keep=8"]):
        batch = make_inputs(family, images)
        tokens, _, scores = greedy(model, batch, STEPS)
        beams = None
        if "a_vl" not in spec:
            beams = model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)[:, -4:]
        for row in range(3):
            alone = single(family, images, row)
            t, _, s = greedy(model, alone, STEPS)
            finite = ~torch.isinf(s[0])
            assert torch.equal(t[0], tokens[row]) and torch.equal(finite, ~torch.isinf(scores[row]))
            assert float((s[0] - scores[row])[finite].abs().max()) < 2e-4
            if beams is not None:
                b = model.generate(**alone, max_new_tokens=4, num_beams=3, do_sample=False)[:, -4:]
                assert torch.equal(b[0], beams[row])


def test_own_loop_on_a_shorter_cache(family, model):
    """The cache holds fewer keys and says it is as long as the sequence, so that a caller's loop counts on."""
    inputs = single(family, [1], 0)
    length, size = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    with vlm_fix.wrapped(model, "knorm:keep=3,layers=0|2"), torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
        out, got = model(**inputs), []
        lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
        assert lengths == [length - size + 3, length] * 2 and cache_of(out).get_seq_length() == length
        for _ in range(5):
            token = out.logits[:, -1:].argmax(-1)
            got.append(int(token))
            out = model(input_ids=token, **{CACHE: cache_of(out)})
    assert got == expected


def test_short_layer_rolls_back_and_moves_rows():
    from transformers import DynamicCache

    cache = DynamicCache()
    keys = torch.randn(2, 1, 5, 3)
    cache.update(keys, keys, 0)
    cache.layers[0] = ShortLayer.of(cache.layers[0], 4)
    assert cache.get_seq_length() == 9
    cache.update(keys[:, :, :2], keys[:, :, :2], 0)
    cache.crop(-1)
    assert cache.get_seq_length() == 10 and cache.layers[0].keys.shape[2] == 6
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys[0, :, :5], keys[1])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 4 and cache.get_seq_length() == 10


def widths(model, inputs, steps, layer=1):
    """[columns that attention of `layer` computed], step by step after the prompt, and the run's output."""
    seen = []
    module = model.model.language_model.layers[layer].self_attn

    def spy(self):
        seen.append(self.key.shape[2]) if self.module is module else None
        return sdpa(self)

    with pytest.MonkeyPatch.context() as patch:
        sdpa = AttentionInputs.sdpa
        patch.setattr(AttentionInputs, "sdpa", spy)
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True)
    return seen[1:], out


def test_a_vl_computes_the_core_alone(family, model):
    """What attention is given is as short as the core and the text; what is stored is not, and no column is lost."""
    inputs = single(family, [1], 0)
    length, size = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    after = length - 1 - int((inputs["input_ids"][0] == IMAGE).nonzero().max())
    stored, core = round(0.5 * size), round(0.2 * size)
    with vlm_fix.wrapped(model, "a_vl:core=0.2,every=4,text_keep=1"):
        got, out = widths(model, inputs, 10)
    text = [length - size + i for i in range(1, 10)]
    assert got == [n + (core if i % 4 else stored) for i, n in enumerate(text, 1)]
    layer = cache_of(out).layers[1]
    assert (
        layer.keys.shape[2] == text[-1] + core and layer.aside[0].shape[2] == layer.aside[1].shape[2] == stored - core
    )
    assert cache_of(out).get_seq_length() == length + 9
    with vlm_fix.wrapped(model, "a_vl:keep=1,core=1,text_start=3,text_every=1"):
        got, _ = widths(model, inputs, 10)
    assert got == [length - after + max(3, round(0.5 * (after + i))) + 1 for i in range(9)], (
        "a step adds its own column"
    )


@torch.no_grad()
def test_a_vl_in_a_callers_loop_gives_generates_tokens(family, model):
    """Several rows at once see all that is stored; a row can become several, but none is rolled back or moved."""
    words = torch.tensor([[5, 6]])

    def loop(spec, *steps):
        with vlm_fix.wrapped(model, spec):
            out = model(**single(family, [1], 0))
            for ids in steps:
                if len(ids) > len(out.logits):
                    cache_of(out).batch_repeat_interleave(len(ids))
                out = model(input_ids=ids, **{CACHE: cache_of(out)})
        return out

    spec = "a_vl:core=0.1,every=3,text_start=3,text_every=1"
    whole, some = loop("a_vl:core=1,text_start=3,text_every=1", words), loop(spec, words)
    assert torch.equal(whole.logits, some.logits)
    split = cache_of(loop(spec, words[:, :1]))
    assert split.layers[1].aside is not None and split.layers[1].keys.shape[2] < cache_of(whole).layers[1].keys.shape[2]
    both = loop(spec, words[:, :1], words.T, words.T, words.T)
    for row in range(2):
        word = words[:, row : row + 1]
        alone = loop(spec, words[:, :1], word, word, word)
        assert error(alone.logits[0], both.logits[row].double()) < 1e-5
    for change in (lambda: split.crop(-1), lambda: split.reorder_cache(torch.tensor([0]))):
        with pytest.raises(vlm_fix.VlmFixError, match="cannot be rolled back, nor its rows moved"):
            change()


@pytest.mark.parametrize("spec", ["knorm:keep=10", "a_vl:keep=10,text_start=3"])
@pytest.mark.filterwarnings("ignore:.* changed nothing in this call. its keep covers every image token")
def test_longest_row_loses_nothing(spec):
    """Row 0's two images are below the budget and it stays as long as it was; row 1 loses columns all the same."""
    model, images = BUILD["qwen2_5_vl"](), [2, 1, 1]
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, make_inputs("qwen2_5_vl", images), STEPS)
        for row in range(3):
            t, alone, _ = greedy(model, single("qwen2_5_vl", images, row), STEPS)
            assert torch.equal(t[0], tokens[row]) and float((alone[0] - logits[row]).abs().max()) < 2e-4


def test_hidden_edits_of_the_prompt_are_the_same(family, model):
    """The prompt's rows are computed before anything is dropped: an edit finds its rows among all of them."""
    inputs, edit = make_inputs(family, [1, 2, 1]), Louder()
    with vlm_fix.wrapped(model, edit):
        alone = greedy(model, inputs, 2)[1][:, 0]
    for spec in EVERY:
        with vlm_fix.wrapped(model, [edit, spec]):
            assert torch.equal(greedy(model, inputs, 2)[1][:, 0], alone)


@dataclass(frozen=True)
class Louder(AttentionOutputEdit, MLPOutputEdit):
    name: ClassVar[str] = "louder"

    def attention_output(self, x, rows):
        return x + 0.5

    def mlp_output(self, x, rows):
        return 1.1 * x


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (["knorm", f"var:{VAR_TINY}"], "which var does not follow; use one of them at a time"),
        (["knorm", "fastv"], "which fastv does not follow"),
        (["knorm", "a_vl"], "which a_vl does not follow"),
        ("knorm:heads=all", "heads='all' is not one of each, mean"),
    ],
)
def test_refused_stacks(models, spec, sentence):
    with pytest.raises(vlm_fix.VlmFixError) as caught:
        vlm_fix.wrap(models["llava"], spec)
    assert sentence in str(caught.value)


def test_options_of_generate_that_do_not_fit_are_refused(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "a_vl"):
        with pytest.raises(vlm_fix.VlmFixError, match="a_vl does not work with beams"):
            model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        with pytest.raises(vlm_fix.VlmFixError, match="drop use_cache=False"):
            model.generate(**inputs, max_new_tokens=3, use_cache=False, do_sample=False)
        with pytest.raises(vlm_fix.VlmFixError, match="a_vl does not work with a static cache"):
            model.generate(**inputs, max_new_tokens=3, cache_implementation="static", do_sample=False)
    with vlm_fix.wrapped(model, ["a_vl", "opera"]), pytest.raises(vlm_fix.VlmFixError, match="a decoding loop"):
        model.generate(**inputs, max_new_tokens=3)


READ = {"llava_next", "llava_onevision", "llava_next_video", "video_llava", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"}
RESIZED = {"llava_onevision"}  # its prompt holds an image larger than anyres_max_2, of which no token is a patch's
READ_HYBRID = {"qwen3_5", "qwen3_5_moe"}  # here it is the decoder that ptp does not work with
HYBRID = {"qwen3_5", "qwen3_5_moe", "lfm2_vl", "minicpmv4_6"}
WINDOWS = {"gemma3", "aya_vision", "cohere2_vision", "paligemma2", "exaone4_5", "gemma4", "kimi_k25", "llama4", *HYBRID}
PLACES = {"paligemma", "molmo2", "ernie4_5_vl_moe"}


@pytest.mark.parametrize("name", [n for n in families.TINY if n != "mllama"])
def test_batches_of_other_families_equal_single_or_are_refused(name):
    """Batches equal single rows, or one clear refusal. Where a tower cannot be read, an image is a run of image tokens."""
    model, batch = families.build(name), families.prompt(name, [1, 2, 1])
    plain = greedy(model, batch, 4)[1]
    looking = ["ptp:keep=0.2", "vscan"] if name in READ - RESIZED else []
    for spec in ("fastv:keep=0.2", "knorm:keep=0.2", *looking):
        if name in WINDOWS or (name in PLACES and "fastv" in spec):
            with pytest.raises(vlm_fix.VlmFixError, match="does not work with this model's"):
                vlm_fix.wrap(model, spec)
            continue
        with vlm_fix.wrapped(model, spec):
            tokens, logits, _ = greedy(model, batch, 4)
            assert float((logits - plain).abs().max()) > 1e-3
            for row in range(3):
                t, alone, _ = greedy(model, families.prompt(name, [1, 2, 1], rows=[row]), 4)
                assert torch.equal(t[0], tokens[row]) and float((alone[0] - logits[row]).abs().max()) < 2e-4
    if name not in READ:
        reason = (
            "does not work with this model's linear attention"
            if name in READ_HYBRID
            else "cannot read the vision tower"
        )
        with pytest.raises(vlm_fix.VlmFixError, match=f"ptp {reason}"):
            vlm_fix.wrap(model, "ptp")


def test_images_whose_rows_end_in_a_token():
    """Mistral 3 breaks an image after each row: its tokens are still one image with one budget."""
    model, inputs = families.build("mistral3"), families.prompt("mistral3", [1])
    with vlm_fix.wrapped(model, "knorm:keep=3"), torch.no_grad():
        out = model(**inputs)
    length = inputs["input_ids"].shape[1]
    size = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert cache_of(out).layers[0].keys.shape[2] == length - size + 3


@pytest.mark.parametrize("spec", ["knorm:keep=0.5", "fastv:keep=0.5", "a_vl:keep=0.5"])
@pytest.mark.parametrize("next_method", [None, "pai:alpha=0.5"])
def test_a_cache_outlives_its_pruner_as_an_error(spec, next_method):
    """Masks and positions of a plain model do not fit to what a pruner left: neither do those of the next method."""
    model, inputs = BUILD["llava"](), single("llava", [1, 2], 0)
    with vlm_fix.wrapped(model, spec):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        early = copy.deepcopy(cache_of(out))
    ids, cache = out.sequences, cache_of(out)
    more = {"input_ids": torch.cat([ids, ids[:, :4]], dim=1), "max_new_tokens": 2}
    for kept in (early, copy.deepcopy(cache), cache):
        with contextlib.ExitStack() as stack:
            if next_method:
                stack.enter_context(vlm_fix.wrapped(model, next_method))
            told = "the cache was filled while" if next_method else "no longer on the model dropped tokens"
            stack.enter_context(pytest.raises(vlm_fix.VlmFixError, match=told))
            model.generate(**more, **{CACHE: kept})
