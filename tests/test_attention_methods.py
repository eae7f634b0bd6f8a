"""Attention methods against float64 loops over whole attention matrices that share nothing with the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import reference as ref
import torch
from conftest import BUILD, make_inputs, single
from test_methods import STEPS, error, greedy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import vlm_fix


@dataclass
class Matrices(ref.Reference):
    """A reference that sees all heads and rows of a layer: scores(z [H, L, L]), mixed(a [H, L, L]), edited in place."""

    def projected(self, q, k, layer):
        pass

    def scores(self, z, layer):
        pass

    def mixed(self, a, layer):
        pass

    @property
    def before(self):
        return range(min(self.visual))

    def cells(self, z):
        for h in range(z.shape[0]):
            for r in filter(self.edited, range(z.shape[1])):
                yield h, r


def matrix_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    run, layer = ref.RUN, module.layer_idx
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    z = query @ key.transpose(2, 3) * scaling
    if run is not None and layer in run.layers:
        run.projected(query[0], key[0], layer)
        z = z.masked_fill(attention_mask < -1e9, 0)  # a column outside the window is not there to be summed
        run.scores(z[0], layer)
    a = (z + attention_mask).softmax(-1)
    if run is not None and layer in run.layers:
        run.mixed(a[0], layer)
    return (a @ value.repeat_interleave(groups, 1)).transpose(1, 2), a


AttentionInterface.register("matrix_loops", matrix_attention)
AttentionMaskInterface.register("matrix_loops", eager_mask)


@dataclass
class ZeroTuning(Matrices):
    rows: str = "all"
    rate: float = 1.0
    heads: tuple = (0, 1, 2, 3)

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            if h in self.heads:
                a[h, r, 0] *= self.rate
                a[h, r] /= sum(a[h, r].tolist())


@dataclass
class Factors(Matrices):  # VAF and AVAR
    rows: str = "after_image"
    image: float = 1.0
    system: float = 1.0

    def scores(self, z, layer):
        for h, r in self.cells(z):
            for j in self.visual:
                z[h, r, j] *= self.image
            for j in self.before:
                z[h, r, j] *= self.system


@dataclass
class LocoRE(Matrices):
    beta: float = 0.0
    window: int = 0

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            for j in range(max(self.prompt_len, r + 1 - self.window), r + 1):
                a[h, r, j] *= 1 + self.beta
            a[h, r] /= sum(a[h, r].tolist())


@dataclass
class HGAI(Matrices):
    alpha: float = 0.0

    def scores(self, z, layer):
        for r in filter(self.edited, range(z.shape[1])):
            for j in self.visual:
                mean = sum(abs(float(z[h, r, j])) for h in range(len(z))) / len(z)
                for h in range(len(z)):
                    z[h, r, j] += self.alpha * mean


@dataclass
class GIFT(Matrices):
    """Two passes: the map from one over the plain model (no row that feeds it is edited), then the edit."""

    alpha: float = 0.0
    source: int = 0
    edited_layers: tuple = ()
    map: dict = field(default_factory=dict)  # column -> m
    margin: float = 1.0

    def top(self, values):
        order = sorted(range(len(values)), key=lambda h: -values[h])
        half = len(values) // 2
        self.margin = min(self.margin, values[order[half - 1]] - values[order[half]])
        return order[:half]

    def look(self, a):
        """[H, L, L] of the source layer."""
        shift = [dict.fromkeys(self.visual, 0.0) for _ in a]
        for h in range(len(a)):
            for q in range(max(self.visual) + 2, self.prompt_len):
                for j in self.visual:
                    shift[h][j] += max(0.0, float(a[h, q, j] - a[h, q - 1, j]))
        self.map = self.normalised(shift)

    def normalised(self, shift):
        chosen = self.top([sum(s.values()) for s in shift])
        m = [sum(shift[h][j] for h in chosen) / len(chosen) for j in self.visual]
        mean = sum(m) / len(m)
        std = math.sqrt(sum((x - mean) ** 2 for x in m) / len(m))
        m = [min(max(x, mean - 3 * std), mean + 3 * std) for x in m]
        return {j: (x - min(m)) / (max(m) - min(m)) for j, x in zip(self.visual, m, strict=True)}

    def mixed(self, a, layer):
        if not self.map:
            if layer == self.source:
                self.look(a)
            return
        if layer not in self.edited_layers:
            return
        query = range(max(self.visual) + 1, self.prompt_len)
        for r in range(self.prompt_len - (layer > self.source), a.shape[1]):
            old = a[:, r].clone()
            seeing = self.top([float(sum(old[h, j] for j in self.visual)) for h in range(len(a))])
            reading = self.top([float(sum(old[h, j] for j in query)) for h in range(len(a))])
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
class ADHH(Matrices):
    heads: tuple = ()
    threshold: float = 0.0
    margin: float = 1.0
    hits: int = 0

    def mixed(self, a, layer):
        for h, r in self.cells(a):
            if (layer, h) in self.heads:
                text = range(max(self.visual) + 1, r + 1)
                mass = sum(float(a[h, r, j]) for j in text)
                self.margin = min(self.margin, abs(mass - self.threshold))
                if mass >= self.threshold:
                    self.hits += 1
                    for j in text:
                        a[h, r, j] = 0


@dataclass
class SPIN(Matrices):
    keep: int = 0
    epsilon: float = 1.0
    margin: float = 1.0

    def scores(self, z, layer):
        self.dropped = {}
        for r in filter(self.edited, range(z.shape[1])):
            seen = [sum(float(z[h, r, j]) for j in self.visual) for h in range(len(z))]
            order = sorted(range(len(z)), key=lambda h: -seen[h])
            self.margin = min(self.margin, seen[order[self.keep - 1]] - seen[order[self.keep]])
            self.dropped[r] = order[self.keep :]

    def mixed(self, a, layer):
        for r, heads in self.dropped.items():
            for h in heads:
                a[h, r] *= self.epsilon  # scales the head's output


HEADS = ((0, 0), (0, 2), (1, 1), (1, 3), (3, 0), (3, 1), (3, 2))
CASES = {
    "zerotuning:rate=0.2": lambda v, n: ZeroTuning(v, n, [0, 1, 2, 3], rate=0.2),
    "zerotuning:rate=4,head_indices=0|3,layers=1-2": lambda v, n: ZeroTuning(v, n, [1, 2], rate=4, heads=(0, 3)),
    "vaf:enhance=1.6,suppress=0.5": lambda v, n: Factors(v, n, [1, 2], image=1.6, system=0.5),
    "avar:visual=1.5,system=0.4": lambda v, n: Factors(v, n, [0, 1, 2, 3], image=1.5, system=0.6),
    "locore:beta=0.9,window=3": lambda v, n: LocoRE(v, n, [0, 1, 2, 3], beta=0.9, window=3),
    "hgai:alpha=0.8": lambda v, n: HGAI(v, n, [1, 2], alpha=0.8),
    "gift:alpha=3,source_layer=1,layers=2-3": lambda v, n: GIFT(
        v, n, [1, 2, 3], alpha=3, source=1, edited_layers=(2, 3)
    ),
    "gift:alpha=2,source_layer=2,layers=1-3": lambda v, n: GIFT(
        v, n, [1, 2, 3], alpha=2, source=2, edited_layers=(1, 2, 3)
    ),
    "ad_hh:threshold=0.15,head_list=" + "|".join(f"{i}.{h}" for i, h in HEADS): lambda v, n: ADHH(
        v, n, [0, 1, 3], heads=HEADS, threshold=0.15
    ),
    "spin:keep=0.8,epsilon=0.3,layers=0-": lambda v, n: SPIN(v, n, [0, 1, 2, 3], keep=3, epsilon=0.3),
    "spin:keep=0.25,epsilon=0,layers=1|3": lambda v, n: SPIN(v, n, [1, 3], keep=1, epsilon=0),
}
NEUTRAL = [
    "spin:keep=1",
    "spin:epsilon=1",
    "ad_hh:threshold=1.5,head_list=0.0",
    "zerotuning:rate=1",
    "vaf:enhance=1,suppress=1",
    "avar:visual=1,system=0",
    "locore:beta=0",
    "hgai:alpha=0",
    "gift:alpha=0",
]


@pytest.mark.parametrize("spec", CASES)
def test_edit_equals_reference(family, model, spec):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs)
    twin = ref.double(model)
    twin.set_attn_implementation({"text_config": "matrix_loops"})
    run = CASES[spec](ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1])
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    if isinstance(run, GIFT):
        ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
        assert max(run.map.values()) == 1
    expected = ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
    assert float((expected - plain).abs().max()) > 1e-2, "the edit must matter for this test to mean anything"
    if isinstance(run, ADHH):
        assert 10 < run.hits < STEPS * len(HEADS), "some heads must be cut off and some kept"
    assert getattr(run, "margin", 1.0) > 1e-6, "pick another seed: a gate lies on its threshold"
    assert error(logits[0], expected) < 1e-5


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
        tokens, logits, _ = greedy(model, make_inputs(family, images))
        for row in range(3):
            t, seen, _ = greedy(model, single(family, images, row))
            assert torch.equal(t[0], tokens[row])
            assert float((seen[0] - logits[row]).abs().max()) < 2e-4
        assert torch.equal(greedy(model, make_inputs(family, images))[1], logits), "state survived a call"


@pytest.mark.parametrize("spec", CASES)
def test_beams_static_cache_and_chunks(family, model, spec):
    one, batch = single(family, [1, 2], 1), make_inputs(family, [1, 2])
    with vlm_fix.wrapped(model, spec):
        plain = model.generate(**one, max_new_tokens=6, do_sample=False)
        for option in ({"cache_implementation": "static"}, {"prefill_chunk_size": 11}, {"prompt_lookup_num_tokens": 2}):
            if family == "llava" or "prefill_chunk_size" not in option:
                got = model.generate(**one, max_new_tokens=6, do_sample=False, **option)
                assert torch.equal(got, plain), option
        beams = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)[1, -5:]
        alone = model.generate(**one, max_new_tokens=5, num_beams=3, do_sample=False)[0, -5:]
        assert torch.equal(alone, beams)


def test_stack_with_pruning_and_contrast(family, model):
    images, stack = [1, 2, 1], ["hiprune:keep=4", "vcd:beta=0.01", *(s for s in CASES if "layers" not in s)]
    with vlm_fix.wrapped(model, [*stack, "gift:source_layer=1,layers=2-3", "spin:keep=0.5"]):
        tokens = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


def test_gift_reads_the_question_of_each_turn(models, monkeypatch):
    """On a kept cache the second turn makes a map of its own text rows: the first one's shifts are gone."""
    from vlm_fix.methods.gift import GIFT as Method

    model, seen, inputs = models["llava"], [], single("llava", [1], 0)
    original = Method.saliency

    def spy(self, shift, visual):
        seen.append((shift, original(self, shift, visual)))
        return seen[-1][1]

    monkeypatch.setattr(Method, "saliency", spy)
    with vlm_fix.wrapped(model, "gift:alpha=3,source_layer=1,layers=2-3"):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        mask = torch.ones_like(ids)
        model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=3, do_sample=False
        )
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1][:, : seen[0][1].shape[1]])
    first, second = (float(shift.sum()) for shift, _ in seen)
    assert 0 < second < first, "four new rows shift less than the whole question"


def test_text_only_row(family, model):
    """Edits of the image leave a text-only row alone; edits that need no image work on it."""
    inputs = make_inputs(family, [1, 0])
    plain = greedy(model, inputs)[1]
    for spec in CASES:
        with vlm_fix.wrapped(model, spec):
            got = greedy(model, inputs)[1]
        changed = not torch.equal(got[1], plain[1])
        assert changed == spec.startswith(("zerotuning", "locore")), spec
        assert not torch.equal(got[0], plain[0])


def test_known_sink_dimensions():
    def dims(family, **sizes):
        arch = replace(vlm_fix.families.arch_of(BUILD["llava"]()), family=family, **sizes)
        return vlm_fix.parse_spec("var").resolve(arch).sink_dims

    by_name = {f.name: f for f in vlm_fix.families.FAMILIES}
    llama = {"text_type": "llama", "hidden": 4096, "depth": 32}
    qwen = {"text_type": "qwen2_vl_text", "hidden": 3584, "depth": 28}
    assert dims(by_name["llava"], **llama, vocab=32064) == (1415, 2533)
    assert dims(by_name["llava"], text_type="llama", hidden=5120, depth=40, vocab=32000) == (2100, 4743)
    assert dims(by_name["qwen2_vl"], **qwen, vocab=152064) == (458, 2570)
    assert dims(by_name["internvl"], **llama, vocab=92553) == (3584,)
    for unknown in (
        dims(by_name["llava"], **llama, vocab=128256),
        dims(by_name["qwen2_5_vl"], **qwen, vocab=152064),
        dims(by_name["internvl"], **llama, vocab=151674),
    ):
        assert unknown is None


def test_known_heads_are_those_of_llava():
    arch = replace(vlm_fix.families.arch_of(BUILD["llava"]()), depth=32, heads=32, vocab=32064)
    method: Any = vlm_fix.parse_spec("ad_hh").resolve(arch)
    assert len(set(method.head_list)) == 20 and method.layers[0] == 13 and method.layers[-1] == 31
    other: Any = vlm_fix.parse_spec("ad_hh").resolve(replace(arch, depth=40, heads=40))
    assert len(set(other.head_list)) == 35 and other.layers[0] == 0


def test_refusals(model):
    for spec, message in {
        "zerotuning:head_indices=0|9": "heads 0 to 3",
        "gift:source_layer=7": "layers 0 to 3",
        "vaf:enhance=-1": "at least 0",
        "ad_hh": "head_list",
        "ad_hh:head_list=1.4": "layer.head",
        "ad_hh:head_list=3": "layer.head",
    }.items():
        with pytest.raises(vlm_fix.VlmFixError, match=message):
            vlm_fix.wrap(model, spec)


@pytest.mark.parametrize("depth", [1, 2, 3, 28, 32, 40])
def test_defaults_fit_every_depth(depth):
    for build in BUILD.values():
        arch = replace(vlm_fix.families.arch_of(build()), depth=depth)
        for name in ("zerotuning", "vaf", "avar", "locore", "hgai", "gift", "spin"):
            resolved: Any = vlm_fix.parse_spec(name).resolve(arch)
            assert resolved.layers and set(resolved.layers) <= set(range(depth))
            assert not resolved.neutral
            assert vlm_fix.parse_spec(resolved.spec()) == replace(resolved, layers="|".join(map(str, resolved.layers)))
