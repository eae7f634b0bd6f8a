"""PAINT, ACT, TAME, CCA, secondary sinks and GIFT's content words; `test_matrix` has their references."""

from __future__ import annotations

import tarfile
from dataclasses import replace

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, make_inputs, single
from tests.support.paths import DATA
from tests.support.references import attention as edits
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix.families.compat import CACHE, cache_of

# ---- secondary sinks -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_cca_in_further_mrope_families(name):
    """The model itself, given position ids made by hand: two images of unlike grids, prompt and three words more."""
    model, inputs = families.build(name), families.prompt(name, [1, 2], rows=[1])
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    where = edits.concentric(ids[0].tolist(), grids, mrope=True)[0][:, None]
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
    from vlm_fix.families.table import arch_of, family_of
    from vlm_fix.methods.attention import cca
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
    content = tuple(i for i, token in enumerate(ids) if token % 2 == 0)
    run = edits.GIFT(
        ref.visual_columns(inputs["input_ids"]),
        len(ids),
        [1, 2, 3],
        alpha=3,
        source=1,
        edited_layers=(2, 3),
        content=content,
    )
    assert 0 < len(set(content) & set(range(max(run.visual) + 2, len(ids)))) < len(ids) - max(run.visual) - 2
    assert error(seen[0], run.forward(twin, inputs, t[0, :-1])) < 1e-5


@pytest.fixture
def tagger(tmp_path):
    """NLTK's tagger, with its data from the pack if they are not on this machine."""
    nltk = pytest.importorskip("nltk")
    before = list(nltk.data.path)
    pack = DATA / "nltk_pack.tar.gz"
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
    from vlm_fix.methods.attention.var import VAR, VARMemory

    spec = "var:tau=2.2,min_visual_mass=0.1,rho=0.2,layers=1-3"
    first, second = single(family, [2], 0, seed=1), single(family, [1], 0, seed=2)
    with vlm_fix.wrapped(model, spec):
        alone, sinks = greedy(model, second)[1], {}

        def note(self, x, layer, session, original=VAR.read_layer_input):
            original(self, x, layer, session)
            own = sinks.setdefault(id(session), (session, {}))[1]  # held: the next session may take a freed one's id
            own[layer] = session.memory(self, VARMemory).sinks[layer].clone()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VAR, "read_layer_input", note)
            greedy(model, first)
            after = greedy(model, second)[1]
        (_, old), (_, new) = sinks.values()
        width = second["input_ids"].shape[1]
        assert any(not torch.equal(old[i][:, :width], new[i][:, :width]) for i in new), (
            "the samples must differ in sinks"
        )

        def leak(self, a, rows, original=VAR.edit_weights):
            rows.memory(VARMemory).sinks[rows.layer] = old[rows.layer][:, :width]
            return original(self, a, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VAR, "edit_weights", leak)
            assert not torch.equal(greedy(model, second)[1], alone), "a leak must be visible here"
    assert torch.equal(after, alone)


def test_act_calibrates_heads(model, family):
    """The sweep keeps the heads that, alone, answer more samples right: here against the sweep by hand."""
    from vlm_fix.calibration.search import answer_scores
    from vlm_fix.sample import Sample

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


def test_stack_with_pruning_and_contrast(family, model):
    """Encoder scores for PAINT beside a pruner's own; the scores follow the tokens that are kept."""
    images, stack = [1, 2, 1], ["hiprune:keep=6", "paint", "tame", "act:threshold=0.06", "vcd:beta=0.01"]
    with vlm_fix.wrapped(model, stack):
        tokens = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


SECOND = ["cca", "tame", "act:threshold=0.06", "paint", "paint:alpha=1.5,head_scale=sensitive,layers=0-"]


@pytest.mark.parametrize("spec", SECOND)
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
        again = model.generate(**turn, **{CACHE: cache_of(first)}, **options)
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
    from vlm_fix.methods.attention.paint import PAINT as Method
    from vlm_fix.methods.attention.paint import PAINTMemory

    def spy(self, session, kwargs, original=Method.prepare):
        kwargs = original(self, session, kwargs)
        if session.start == 0:
            seen[session.kept is not None] = (session.memory(self, PAINTMemory).strength[0], session.kept)
        return kwargs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "prepare", spy)
        for stack in (["paint"], ["paint", "random_tokens:keep=5"]):
            with vlm_fix.wrapped(model, stack):
                greedy(model, inputs, steps=1)
    (whole, _), (pruned, kept) = seen[False], seen[True]
    assert torch.equal(pruned, whole[kept.index[0]]) and pruned.any() and len(pruned) < len(whole)
