"""Pruning inside the language model against a full-length float64 pass that masks the dropped columns layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlm_fix
from tests.support.models import BUILD, IMAGE, make_inputs, single
from tests.support.references.pruning_after import STEPS, Slow, quota
from tests.support.references.pruning_before import images_of, ranked
from tests.support.run import VAR_TINY, error, greedy
from vlm_fix.call import Call
from vlm_fix.families.compat import CACHE, cache_of
from vlm_fix.methods.pruning.pyramid_drop import PyramidDrop
from vlm_fix.packing import left_pack
from vlm_fix.pruning import PruningWing
from vlm_fix.pruning.kinds import LayerPruner, top_per_image
from vlm_fix.session import PAD, Session
from vlm_fix.wing import engine_of

# ---- slow choices ---------------------------------------------------------------------------------------------------


def by_scores(run, layer, scores, budget):
    kept = []
    for image, left in zip(run.images, run.visual_left(layer), strict=True):
        kept += ranked(scores, left)[: budget(len(image))]
    return kept


def fastv(method):
    def choose(run, stage, layer, hidden):
        return by_scores(run, layer, run.seen_by(layer - 1, run.last), lambda n: quota(method.keep, n)), {}

    return choose


def pyramid_drop(method):
    def budget(stage, n):
        keep = method.keep[stage]
        return max(1, math.floor(keep * n)) if keep <= 1 else min(n, int(keep))

    def choose(run, stage, layer, hidden):
        return by_scores(run, layer, run.own_last(layer, hidden), lambda n: budget(stage, n)), {}

    return choose


def vscan(method):
    def choose(run, stage, layer, hidden):
        return by_scores(run, layer, run.own_last(layer, hidden), lambda n: quota(method.llm_keep, n)), {}

    return choose


def raters(first, visual, question):
    match = {t: 0.0 for t in question}
    for v in visual:
        z = {t: float(first[v] @ first[t]) for t in question}
        total = sum(math.exp(y - max(z.values())) for y in z.values())
        for t in question:
            match[t] += math.exp(z[t] - max(z.values())) / total / len(visual)
    return [t for t in question if match[t] > sum(match.values()) / len(match)]


def peaks(states, count):
    """Density-peak clustering by loops: -> {centre: members}, all positions in `states`."""
    n = len(states)
    d = [[float((a - b).pow(2).sum().sqrt()) / math.sqrt(len(a)) for b in states] for a in states]
    density = [math.exp(-sum(v * v for v in sorted(row)[:count]) / count) for row in d]
    most = max(map(max, d))

    def denser(j, i):
        return density[j] > density[i] or (density[j] == density[i] and j < i)

    apart = [min([d[i][j] for j in range(n) if denser(j, i)] or [most]) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-apart[i] * density[i], i))[:count]
    groups = {c: [c] for c in centres}
    for i in range(n):
        if i not in centres:
            groups[min(centres, key=lambda c: (d[i][c], centres.index(c)))].append(i)
    return groups


def sparsevlm(method):
    def choose(run, stage, layer, hidden):
        if stage == 0:
            run.raters = raters(run.first, [j for image in run.images for j in image], run.question) or [run.last]
        rows = [run.seen_by(layer - 1, r) for r in run.raters]
        kept, states = [], {}
        for image, left in zip(run.images, run.visual_left(layer), strict=True):
            scores = {j: sum(row[j] for row in rows) / len(rows) for j in left}
            order, budget = ranked(scores, left), quota(method.keep[stage], len(image))
            if method.rank:
                matrix = torch.tensor([[row[j] for j in left] for row in rows], dtype=torch.float32)
                budget = max(1, len(left) - round(method.rank * (len(left) - int(torch.linalg.matrix_rank(matrix)))))
            kept += order[:budget]
            dropped = order[budget:]
            best = dropped[: math.floor(len(dropped) * method.recycled) + 1] if method.recycled else []
            for centre, members in peaks(hidden[best], len(best) // 10 + 1).items() if best else ():
                kept.append(best[centre])
                states[best[centre]] = sum(hidden[best[m]] for m in members) / len(members)
        return kept, states

    return choose


def ptp(method):
    def scaled(x):
        low, high = min(x), max(x)
        return [(v - low) / (high - low) for v in x] if method.scale == "minmax" else x

    def choose(run, stage, layer, hidden):
        rows, kept = [run.seen_by(layer - 1, r) for r in run.question], []
        encoded = [
            [float(v) for v in im["first"][max(im["first"])]] for im in images_of(run.family, run.twin, run.inputs)
        ]
        sizes, total = [len(b) for b in encoded], sum(quota(method.keep, len(b)) for b in encoded)
        mean = [sum(b) / len(b) for b in encoded]
        share = [total * m / sum(mean) for m in mean]
        while any(s > n for s, n in zip(share, sizes, strict=True)):
            full = {i for i, (s, n) in enumerate(zip(share, sizes, strict=True)) if s >= n}
            left = total - sum(sizes[i] for i in full)
            rest = sum(m for i, m in enumerate(mean) if i not in full)
            share = [sizes[i] if i in full else left * m / rest for i, m in enumerate(mean)]
        budgets = [math.floor(s + 1e-9) for s in share]
        for i in sorted(range(len(share)), key=lambda i: (budgets[i] - share[i], i))[: total - sum(budgets)]:
            budgets[i] += 1
        for image, b, budget in zip(run.images, encoded, budgets, strict=True):
            c = scaled([max(row[j] if j < len(row) else 0.0 for row in rows) for j in image])
            mixed = [(1 - method.alpha) * x + method.alpha * y for x, y in zip(scaled(b), c, strict=True)]
            kept += [image[i] for i in ranked(mixed, range(len(image)))[:budget]]
        return kept, {}

    return choose


def dart(method):
    def choose(run, stage, layer, hidden):
        keys, x = run.keys[layer - 1], run.twin.model.language_model.norm(hidden)
        size = [sum(abs(float(v)) for v in keys[:, j].flatten()) for j in range(keys.shape[1])]
        text, kept = ranked(size, run.question)[: method.pivots], []
        for image in run.images:
            budget = quota(method.keep, len(image))
            own = ranked(size, image)[: min(method.pivots, budget)]
            taken, pivots = list(own), sorted(own + text)
            for n, pivot in enumerate(pivots):
                more = (budget - len(own)) // len(pivots) + (n < (budget - len(own)) % len(pivots))
                alike = {j: float(x[pivot] @ x[j] / x[pivot].norm() / x[j].norm()) for j in image if j not in taken}
                taken += sorted(alike, key=lambda j: (alike[j], j))[:more]
            kept += taken
        return kept, {}

    return choose


SPECS = {
    "dart:keep=9": dart,
    "dart:keep=0.7,layer=1,pivots=3": dart,
    "dart:keep=2,pivots=3,positions=compact": dart,
    "fastv:keep=5": fastv,
    "fastv:keep=0.25,layer=1,positions=compact": fastv,
    "pyramid_drop": pyramid_drop,
    "pyramid_drop:layers=1|3,keep=6|3,positions=original": pyramid_drop,
    "sparsevlm:layers=0|1|2,keep=6|4|2,recycled=1": sparsevlm,
    "sparsevlm:layers=1,keep=0.3,positions=original": sparsevlm,
    "sparsevlm:layers=0|2,keep=9|9,rank=0.5,recycled=0": sparsevlm,
    "pyramid_drop:layers=1|2": pyramid_drop,
    "vscan:keep=1.0,llm_keep=5": vscan,
    "ptp:keep=4": ptp,
    "ptp:keep=0.9,layer=0,scale=none,alpha=0.8": ptp,
}
EVERY = ["dart:keep=7", "fastv:keep=5", "pyramid_drop", "sparsevlm", "vscan:windows=2", "ptp:keep=4"]


def fits(family, spec):
    return family == "llava" or "compact" not in spec


def matched(model):
    return engine_of(model).wing(PruningWing).pruners.dropper


@pytest.mark.parametrize("spec", SPECS)
def test_answer_equals_reference(family, model, spec):
    if not fits(family, spec):
        with pytest.raises(vlm_fix.VlmFixError, match="use positions=original"):
            vlm_fix.wrap(model, spec)
        return
    inputs = single(family, [1, 2], 1)
    plain = greedy(model, inputs, STEPS)[1]
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, STEPS, suppress_tokens=[IMAGE])
        method = matched(model)
    run = Slow(family, model, inputs, method.stages, SPECS[spec](method), method.renumbers)
    assert error(logits[0], run.logits(tokens[0])) < 1e-5
    assert float((plain[0, 0] - logits[0, 0]).abs().max()) > 1e-3, "nothing was dropped"


# ---- the engine, with a choice that needs no score ------------------------------------------------------------------


@dataclass(frozen=True)
class EveryOther(LayerPruner):
    """Keeps every `step`-th of what is left of each image."""

    name: ClassVar[str] = "every_other"

    at: tuple[int, ...] = (0,)
    step: int = 3
    positions: str | None = None

    @property
    def stages(self):
        return self.at

    def choose(self, tokens):
        keep = torch.zeros_like(tokens.images, dtype=torch.bool)
        for b in range(len(keep)):
            for image in range(1, int(tokens.images[b].max()) + 1):
                keep[b, (tokens.images[b] == image).nonzero()[:: self.step, 0]] = True
        return keep, tokens.hidden


def every_other(step):
    return lambda run, stage, layer, hidden: ([j for left in run.visual_left(layer) for j in left[::step]], {})


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("at", [(0,), (2,), (0, 2), (1, 2, 3)])
def test_any_layer_in_a_padded_batch(family, model, at, positions):
    """K = 0, 2 and several stages: each row of a left-padded batch against its own full-length pass."""
    if not fits(family, positions):
        return
    images, method = [1, 2, 1], EveryOther(at, positions=positions)
    with vlm_fix.wrapped(model, method):
        tokens, logits, _ = greedy(model, make_inputs(family, images), STEPS, suppress_tokens=[IMAGE])
    for row in range(3):
        run = Slow(family, model, single(family, images, row), at, every_other(3), positions == "compact")
        assert error(logits[row], run.logits(tokens[row])) < 1e-5


def test_cache_holds_the_kept_tokens_alone(family, model):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, EveryOther((0, 2))), torch.no_grad():
        out = model(**inputs, use_cache=True, output_hidden_states=True)
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    run = Slow(family, model, inputs, (), None)
    text = run.last + 1 - sum(map(len, run.images))
    once = [math.ceil(len(image) / 3) for image in run.images]
    twice = [math.ceil(n / 3) for n in once]
    assert lengths == [text + sum(once)] * 2 + [text + sum(twice)] * 2
    assert cache_of(out).get_seq_length() == run.last + 1, "what generate counts with"
    assert [x.shape[1] for x in out.hidden_states[1:]] == lengths, "hidden states have the tokens that are left"
    assert out.logits.shape[1] == lengths[-1]


def test_attention_edit_sees_what_is_left(family, model):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, ["fastv:keep=5", "pai:alpha=0.5,layers=2-3"]):
        tokens, logits, _ = greedy(model, inputs, STEPS, suppress_tokens=[IMAGE])
        method = matched(model)
    run = Slow(family, model, inputs, (2,), fastv(method), pai=0.5)
    assert error(logits[0], run.logits(tokens[0])) < 1e-5
    run.pai = 0.0
    assert error(logits[0], run.logits(tokens[0])) > 1e-3


@pytest.mark.parametrize("spec", EVERY)
@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_batch_equals_single_beside_edits_contrast_and_logits(family, model, spec):
    """Left-padded rows with 1, 2 and 1 images: greedy and beams."""
    images = [1, 2, 1]
    others = [f"var:{VAR_TINY}", "gift:layers=1-3,source_layer=1", "vcd:beta=0.01", "deco"]
    with vlm_fix.wrapped(model, [spec, *others]):
        batch = make_inputs(family, images)
        tokens, _, scores = greedy(model, batch, 5)
        beams = model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)[:, -4:]
        for row in range(3):
            alone = single(family, images, row)
            t, _, s = greedy(model, alone, 5)
            finite = ~torch.isinf(s[0])
            assert torch.equal(t[0], tokens[row]) and torch.equal(finite, ~torch.isinf(scores[row]))
            assert float((s[0] - scores[row])[finite].abs().max()) < 2e-4
            b = model.generate(**alone, max_new_tokens=4, num_beams=3, do_sample=False)[:, -4:]
            assert torch.equal(b[0], beams[row])


@pytest.mark.parametrize("spec", EVERY)
def test_generate_without_a_cache_drops_the_same_tokens(family, model, spec):
    """use_cache=False drops the same tokens at every step: gapped positions are not read as packed sequences."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(model, spec):
        for inputs in (make_inputs(family, [1, 2]), single(family, [2], 0)):
            cached = model.generate(**inputs, **options)
            assert torch.equal(model.generate(**inputs, use_cache=False, **options), cached)


def test_callers_loop_gives_generates_tokens(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, EveryOther((0, 2))), torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
        out, got = model(**inputs), []
        for _ in range(5):
            token = out.logits[:, -1:].argmax(-1)
            got.append(int(token))
            out = model(input_ids=token, **{CACHE: cache_of(out)})
    assert got == expected


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_clusters_on_random_states(seed):
    from vlm_fix.methods.pruning.sparsevlm import cluster

    g = torch.Generator().manual_seed(seed)
    for x in (torch.randn(23, 6, generator=g), torch.randint(2, (23, 3), generator=g).float()):
        for count in (1, 3, 7):
            groups = peaks(x, count)
            centres, merged = cluster(x, count)
            assert centres.tolist() == list(groups)
            for state, members in zip(merged, groups.values(), strict=True):
                assert float((state - sum(x[m] for m in members) / len(members)).abs().max()) < 1e-5


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 0, 2, 2, 1, 1, 0, 1, 1]])
    images = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 2, 2]])
    kept = top_per_image(scores, images, images, lambda n: 3 if n == 5 else 1)
    assert kept.nonzero()[:, 1].tolist() == [2, 3, 4, 7]


def test_tile_budgets():
    from vlm_fix.methods.pruning.ptp import allot

    assert allot([1.0, 3.0], [10, 10], [4, 4]) == [2, 6]
    assert allot([1.0, 9.0], [10, 10], [0.6, 0.6]) == [2, 10], "what does not fit goes to the other tile"
    assert sum(allot([0.2, 0.3, 0.5], [7, 9, 8], [0.4] * 3)) == 3 + 4 + 3
    assert allot([0.0, 0.0], [4, 4], [1.0, 1.0]) == [4, 4]


def test_one_budget_for_all_stages():
    """A single `keep` is what the last stage leaves; the stages before it keep in the paper's proportion."""
    from vlm_fix.families import arch_of

    arch = arch_of(BUILD["llava"]())
    for spec, expected in {
        "pyramid_drop:keep=4": (16, 8, 4),
        "pyramid_drop:keep=0.5": (1, 1, 0.5),
        "sparsevlm:keep=110": (300, 200, 110),
    }.items():
        assert vlm_fix.parse_spec(spec).resolve(arch).keep == pytest.approx(expected)
    for value in (4, [9, 4]):
        method = PyramidDrop(keep=value, layers=(1, 2))
        assert method.resolve(arch).keep == pytest.approx((8, 4) if value == 4 else (9, 4))


def test_masks_move_between_whole_and_pruned_columns():
    """A mask made in one layer's columns, read in another's: by the columns themselves."""
    g = torch.Generator().manual_seed(0)
    types = torch.tensor([[0, 1, 2, 2, 2, 2, 1, 1], [1, 2, 2, 2, 2, 2, 2, 1]], dtype=torch.uint8)
    session = Session(Call(None, None, {}), prompt_len=8)
    session.advance(0, types)
    names = torch.arange(8).expand(2, -1)  # column numbers as the mask's values: what arrives tells where it came from
    for layers, keep in ((range(1, 4), [3, 1]), (range(2, 4), [2, 1])):
        now = session.at(layers[0])
        chosen = torch.rand(now.types.shape, generator=g).masked_fill(now.types != 2, -1).argsort(1, descending=True)
        stay = torch.isin(now.types, torch.tensor([1]))
        for row in range(2):
            stay[row, chosen[row, : keep[row]]] = True
        session.drop(layers, *left_pack(stay & (now.types != PAD)))
    session.advance(8, torch.ones(2, 1, dtype=torch.uint8))
    for here in range(4):
        view = session.at(here)
        assert view.types.shape[1] == (9, 8 - 1, 6, 6)[here] or here
        own = view.translate(torch.cat([names + 1, torch.full((2, 1), 9)], 1), session)
        for made in range(4):
            source = session.at(made)
            mask = source.translate(torch.cat([names + 1, torch.full((2, 1), 9)], 1), session)
            got = view.translate(mask, source)
            expected = torch.where(torch.isin(own, mask), own, 0)
            for row in range(2):
                inside = set(mask[row].tolist())
                expected[row] = torch.tensor([v if v in inside else 0 for v in own[row].tolist()])
            assert torch.equal(got, expected), (made, here)


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("fastv:layer=9", "fastv drops tokens before layers 9; name layers between 0 and 3"),
        ("pyramid_drop:keep=0.5|0.3", "must have one positive entry for each of its 3 layers"),
        ("sparsevlm:layers=3,keep=4", "sparsevlm drops tokens before layers 4; name layers between 0 and 3"),
        (["fastv", "divprune"], "both prune tokens; use one of them at a time"),
        ("fastv:keep=-1", "fastv: keep=-1.0 must be a number above 0"),
    ],
)
def test_values_and_stacks_that_do_not_fit_are_refused(models, spec, sentence):
    model = models["llava"]
    with pytest.raises(vlm_fix.VlmFixError) as caught:
        vlm_fix.wrap(model, spec)
    assert sentence in str(caught.value) and "generate" not in model.__dict__


def test_options_of_generate_and_forwards_that_do_not_fit_are_refused(model, family):
    from transformers import DynamicCache, StaticCache

    inputs, kept = single(family, [1], 0), DynamicCache()
    kept.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    with vlm_fix.wrapped(model, "fastv"):
        for option in (
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 11},
            {"prompt_lookup_num_tokens": 2},
            {CACHE: kept},
        ):
            with pytest.raises(vlm_fix.VlmFixError, match="fastv does not work with"):
                model.generate(**inputs, max_new_tokens=3, do_sample=False, **option)
        with pytest.raises(vlm_fix.VlmFixError, match="a StaticLayer of the cache"):
            model(**inputs, **{CACHE: StaticCache(model.config.get_text_config(), max_cache_len=99)})
        with pytest.raises(vlm_fix.VlmFixError, match="labels"):
            model(**inputs, labels=inputs["input_ids"])
        out = model(**inputs)
        with pytest.raises(vlm_fix.VlmFixError, match="whole prompt at once"):
            mask = inputs["attention_mask"].repeat(1, 2)
            model(**{**inputs, "attention_mask": mask}, **{CACHE: cache_of(out)})


def test_models_with_windows_are_refused(family, monkeypatch):
    model = BUILD[family]()
    monkeypatch.setattr(
        model.config.get_text_config(), "layer_types", ["full_attention", "sliding_attention"] * 2, raising=False
    )
    with pytest.raises(vlm_fix.VlmFixError, match="sliding windows"):
        vlm_fix.wrap(model, "fastv")


@pytest.mark.parametrize("seed", range(4))
def test_top_of_random_scores(seed):
    """Whole-number scores: nearly every choice is a tie."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(3, (2, 30), generator=g).sort(dim=1).values
    scores = torch.randint(4, (2, 30), generator=g).float()
    kept = top_per_image(scores, images, images, lambda n: n // 2 + 1)
    for row in range(2):
        expected = []
        for image in (1, 2):
            columns = [j for j in range(30) if images[row, j] == image]
            expected += ranked(scores[row], columns)[: len(columns) // 2 + 1] if columns else []
        assert kept[row].nonzero()[:, 0].tolist() == sorted(expected)


def test_gaps_are_not_packed_sequences(models):
    """A pruner before the language model that keeps positions with gaps, without a cache: the same answer."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(models["llava"], "uniform_grid:keep=7,positions=original"):
        inputs = single("llava", [1, 2], 1)
        cached = models["llava"].generate(**inputs, **options)
        assert torch.equal(models["llava"].generate(**inputs, use_cache=False, **options), cached)


def test_flash_attention_is_refused(family, monkeypatch):
    """FlashAttention-2 reads gapped positions as packed sequences; wrap builds on SDPA alone."""
    model = BUILD[family]()
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation", "flash_attention_2")
    with pytest.raises(vlm_fix.VlmFixError, match="'flash_attention_2' attention.*set_attn_implementation"):
        vlm_fix.wrap(model, "fastv")


def test_observe_follows_the_tokens_that_are_left(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "fastv:keep=5"):
        seen = vlm_fix.observe(model, inputs)
    size = int((inputs["input_ids"] == IMAGE).sum())
    assert seen.kept.sum(dim=1).tolist() == [size, size, 5, 5]
    assert not seen.weights_to_image[2:].masked_select(~seen.kept[2:, None, None]).any()
