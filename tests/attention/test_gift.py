"""GIFT: which rows and words its map reads."""

from __future__ import annotations

import tarfile

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, make_inputs, single
from tests.support.paths import DATA
from tests.support.references import attention as edits
from tests.support.references import base as ref
from tests.support.run import error, greedy, works_unwrapped
from vlm_fix.families.compat import CACHE, cache_of


@pytest.mark.parametrize("spec", ["gift:alpha=3,source_layer=1,layers=1-3", "gift:alpha=3,source_layer=2,layers=1-3"])
def test_gift_in_chunks(models, spec):
    """What was read between two images does not count, though it was the question until the second one came."""
    model, inputs = models["llava"], single("llava", [1, 2], 1)
    chunks = {"prefill_chunk_size": 43}  # the second image begins the second chunk
    if not works_unwrapped(model, inputs, chunks):
        pytest.skip("this version of transformers cannot chunk a prompt with images")
    with vlm_fix.wrapped(model, spec):
        whole, parts = greedy(model, inputs), greedy(model, inputs, **chunks)
    assert torch.equal(whole[0], parts[0]) and torch.allclose(whole[1], parts[1], atol=2e-4)


def test_gift_reads_the_question_of_each_turn(models, monkeypatch):
    """On a kept cache the second turn makes a map of its own text rows: the first one's shifts are gone."""
    from vlm_fix.methods.attention import saliency

    model, seen, inputs = models["llava"], [], single("llava", [1], 0)
    original = saliency.saliency_map

    def spy(shift, visual):
        seen.append((shift, original(shift, visual)))
        return seen[-1][1]

    monkeypatch.setattr(saliency, "saliency_map", spy)
    with vlm_fix.wrapped(model, "gift:alpha=3,source_layer=1,layers=2-3"):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        mask = torch.ones_like(ids)
        model.generate(input_ids=ids, attention_mask=mask, **{CACHE: cache_of(out)}, max_new_tokens=3, do_sample=False)
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1][:, : seen[0][1].shape[1]])
    first, second = (float(shift.sum()) for shift, _ in seen)
    assert 0 < second < first, "four new rows shift less than the whole question"


VICUNA = [319, 1799, 9047, 13566, 29901]  # " ASSISTANT:" in Llama's vocabulary
CHATML = [151645, 198, 151644, 77091, 198]  # <|im_end|> \n <|im_start|> assistant \n, Qwen's
WHAT = [5618, 338, 4318, 297, 445, 1967, 29973]  # "What is shown in this image?"


@pytest.mark.parametrize(
    "text, ends, marks, expected",
    [
        ([29871, 13, *WHAT, *VICUNA], {2}, set(), (2, 5)),  # LLaVA-1.5: the official code's numbers
        ([151653, *WHAT, *CHATML], {151645, 151643}, {151653}, (1, 5)),  # Qwen2-VL: again
        ([151653, *WHAT, *CHATML, 151667, 198], {151645}, {151653}, (1, 7)),  # one that thinks first
        ([151653, 7, *CHATML, 8, 9, 151645, 198, 151644, 872, 198, *WHAT, *CHATML], {151645}, {151653}, (1, 5)),
        ([29871, 13, 7, *VICUNA, 8, 2, 3148, 1001, 29901, 9, 10, *VICUNA], {2}, set(), (2, 5)),  # a second turn
        (WHAT, {2}, set(), (0, 0)),  # no template that is known
    ],
)
def test_the_template_around_a_question(text, ends, marks, expected):
    from vlm_fix.words import around_question

    assert around_question(text, ends, marks) == expected


def test_template_columns_of_a_padded_batch(models, monkeypatch):
    """Each prompt loses its own template, but none that would be all of its text; `template` says otherwise."""
    from vlm_fix import words
    from vlm_fix.methods.attention import gift

    seen, inner = [], words.template_columns
    monkeypatch.setattr(gift, "template_columns", lambda *a: (seen.append(inner(*a)), seen[-1])[1])
    model, inputs = models["llava"], make_inputs("llava", [1, 1, 1])
    ids, n = inputs["input_ids"], inputs["input_ids"].shape[1]
    first = [int((row == IMAGE).nonzero()[-1]) + 1 for row in ids]
    assert n - first[2] < 8
    ids[0, -3] = ids[1, -2] = ids[2, first[2]] = 2  # the end of a turn
    with monkeypatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", [2, 95])
        with vlm_fix.wrapped(model, "gift:alpha=3,source_layer=1,layers=2-3"):
            model(**inputs)
    for spec in ("0|0", "1|2"):
        with vlm_fix.wrapped(model, f"gift:alpha=3,source_layer=1,layers=2-3,template={spec}"):
            model(**inputs)
    found = [[m.nonzero()[:, 0].tolist() for m in mask] for mask in seen]
    assert found[0] == [[n - 3, n - 2, n - 1], [n - 2, n - 1], []]
    assert found[1] == [[], [], []]
    assert found[2] == [[f, n - 2, n - 1] for f in first]


def test_template_takes_two_counts(models):
    for spec in ("gift:template=5", "gift:template=-1|5", "dagcd:template=1|2|3"):
        with pytest.raises(vlm_fix.VlmFixError, match="template takes two counts"):
            vlm_fix.wrap(models["llava"], spec)


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
