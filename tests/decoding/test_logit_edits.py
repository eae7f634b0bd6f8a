"""Edits of the next token's distribution, and LayerCake, against references that recompute everything at every step."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch

import vlm_fix
from tests.support.families import build, prompt
from tests.support.models import IMAGE, IMAGE_END, make_inputs, single, tiny_llava
from tests.support.paths import PICTO_LLAVA
from tests.support.references import base as ref
from tests.support.references.decoding import Cake, Recorder
from tests.support.run import STEPS, Streamed, error, greedy
from vlm_fix.call import Call
from vlm_fix.decoding.step import fingerprints, images_of_rows


def test_reading_the_weights_leaves_the_output_as_it_is(family, model):
    """`read_weights` gets the weights that edits left, and the output is SDPA's own."""

    @dataclass(frozen=True)
    class Look(vlm_fix.WeightReader):
        name = "look"

        def read_weights(self, weights, rows):
            NOTED.setdefault(rows.layer, []).append(weights.sum(-1))

    NOTED: dict = {}
    inputs = make_inputs(family, [1, 2, 1])
    before = greedy(model, inputs)
    with vlm_fix.wrapped(model, Look()):
        after = greedy(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sorted(NOTED) == [0, 1, 2, 3] and all(len(v) == STEPS for v in NOTED.values())
    assert all(error(a, torch.ones_like(a)) < 1e-5 for v in NOTED.values() for a in v)


EDITS = [
    "dagcd:alpha=6",
    "dagcd:alpha=3,heads_used=3,top_rank=40,context=text,layers=1-3",
    "dagcd:alpha=6,end_tokens=69|32,template=1|2",
    "yes_threshold:yes=3|69|32,no=20|52,mass=0.02,margin=0.9",
    "yes_threshold:yes=5,no=69|32,mass=0.01,margin=0.001",
]


@dataclass
class Everything(Recorder):
    def weight(self, a, layer, head, row):
        self.seen[layer, row, head] = a.clone()
        return a


def edited(twin, spec, inputs, tokens):
    """Scores [T, V] by the formulas, with the whole answer recomputed without a cache."""
    m, ids, start = vlm_fix.parse_spec(spec), inputs["input_ids"][0].tolist(), inputs["input_ids"].shape[1]
    visual = ref.visual_columns(inputs["input_ids"])
    layers = list(vlm_fix.method.parse_layers(getattr(m, "layers", None), 4, ""))
    run = Everything(visual, start, layers)
    z = ref.teacher_forced(twin, run, inputs, tokens[:-1]).log_softmax(-1)
    if m.name == "yes_threshold":
        p = z[0].exp().tolist()
        yes, no = sum(p[i] for i in m.yes), sum(p[i] for i in m.no)
        if yes + no > m.mass and abs(yes - no) < m.margin:
            z[0] = -torch.inf
            z[0, max(m.yes, key=lambda i: p[i])] = 0
        return z
    first = max(visual) + 1
    head, tail = m.template or (int(ids[first] == IMAGE_END), 0)
    question = range(first + head, start - tail)
    context = [j for j in range(start) if j not in visual and (m.context == "text" or j in question)]
    heads = [(layer, h) for layer in layers for h in range(4)]
    heads.sort(key=lambda lh: -sum(float(run.seen[lh[0], start - 1, lh[1]][j]) for j in context))
    words = sorted({ids[j] for j in context})
    for t in range(len(tokens)):
        p, used = z[t].exp().tolist(), dict.fromkeys(words, 0.0)
        if m.end_tokens and p.index(max(p)) in m.end_tokens:
            continue
        for layer, h in heads[: m.heads_used]:
            a = run.seen[layer, start - 1 + t, h]
            mean = {}
            for v in words:
                at = [float(a[j]) for j in context if ids[j] == v]
                mean[v] = sum(at) / len(at)
            for v in words:
                used[v] += mean[v] / sum(mean.values())
        used = {v: u for v, u in used.items() if sum(q > p[v] for q in p) < m.top_rank}
        entropy = -sum(q * torch.tensor(q).double().log().item() for q in p if q > 0)
        weight = m.alpha * entropy / torch.tensor(float(len(p))).double().log().item()
        for v, u in used.items():
            z[t, v] = torch.tensor(p[v] + weight * u / sum(used.values())).double().log()
    return z.log_softmax(-1)


@pytest.mark.parametrize("spec", EDITS)
def test_logit_edit_equals_reference(family, model, spec):
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs, suppress_tokens=None)
    theirs = edited(twin, spec, inputs, tokens[0])
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1]).log_softmax(-1)
    cut = torch.isinf(theirs)
    assert torch.equal(torch.isinf(scores[0]), cut)
    assert error(scores[0].log_softmax(-1)[~cut], theirs[~cut]) < 1e-5
    assert torch.equal(tokens[0], theirs.argmax(-1))
    changed = (theirs.exp() - plain.exp()).abs().amax(-1) > 1e-2
    assert changed.any() == ("margin=0.001" not in spec)
    assert "end_tokens" not in spec or not changed.all()


@pytest.mark.parametrize("spec", [EDITS[0], EDITS[3]])
def test_beams_of_a_logit_edit_add_up_the_reference(family, model, spec):
    twin, inputs = ref.double(model), single(family, [1, 2, 1], 2)
    with vlm_fix.wrapped(model, spec):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=3, length_penalty=0.0,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
    theirs = edited(twin, spec, inputs, out.sequences[0, -5:])
    total = float(theirs.gather(1, out.sequences[0, -5:, None]).sum())
    assert abs(total - float(out.sequences_scores[0])) < 1e-4


@pytest.mark.parametrize("spec", [EDITS[0], EDITS[3]])
def test_logit_edit_beside_pruner_edit_and_contrast_answers_batch_as_single(family, model, spec):
    images, stack = [1, 2, 1], ["hiprune:keep=4", "pai:alpha=0.3", "vcd:beta=0.01", spec]
    with vlm_fix.wrapped(model, stack):
        together = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], together[row])


@pytest.mark.parametrize("spec", ["apc_only:beta=0.3", "gaussian_logits", "deco:layers=1-3", "dola:layers=0|1|2|3",
                                  EDITS[0], EDITS[3]])  # fmt: skip
def test_logit_edit_with_an_assistant(models, spec):
    """Tokens drafted by a text model change nothing, and a streamer is told of each token once."""
    from transformers import LlamaForCausalLM

    model, inputs = models["llava"], single("llava", [1, 2], 0)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers hands the images to the text model, which refuses them")
    assistant = LlamaForCausalLM(model.config.text_config).eval()  # its own decoder: most drafts are right
    assistant.model.load_state_dict(model.model.language_model.state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    assistant.generation_config.eos_token_id = None
    streamer = Streamed()
    with vlm_fix.wrapped(model, spec):
        plain = model.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer)
        assert torch.equal(
            plain, model.generate(**inputs, max_new_tokens=9, do_sample=False, assistant_model=assistant)
        )
    assert streamer.ended and streamer.tokens == plain[0].tolist()


def test_yes_threshold_reads_the_tokenizer(family, model, monkeypatch):

    inputs = single(family, [1, 2], 0)
    monkeypatch.setattr(model.config, "_name_or_path", "/nowhere")
    with vlm_fix.wrapped(model, "yes_threshold"), pytest.raises(vlm_fix.VlmFixError, match="yes_threshold:yes="):
        model.generate(**inputs, max_new_tokens=2)
    monkeypatch.setattr(model.config, "_name_or_path", str(PICTO_LLAVA))
    from vlm_fix.methods.logits.yes_threshold import spellings

    assert spellings(model, "Yes") == (247,) and spellings(model, "No") == (142,)
    with pytest.raises(vlm_fix.VlmFixError, match="no token for 'Zyzzyva'"):
        spellings(model, "Zyzzyva")


@pytest.mark.parametrize("spec", ["vista", "only"])
def test_an_edit_that_needs_an_image_leaves_the_logits_of_text_prompts_as_they_are(family, model, spec):
    """As they are, not as log-probabilities: a repetition penalty, which comes after, sees their level."""
    inputs, how = make_inputs(family, [1, 0, 2]), {"repetition_penalty": 1.5}
    plain = greedy(model, inputs, 3, **how)
    with vlm_fix.wrapped(model, spec):
        ours = greedy(model, inputs, 3, **how)
    for a, b in zip(plain, ours, strict=True):
        assert torch.equal(a[1], b[1])
    assert not torch.equal(plain[2][0], ours[2][0])


def test_dagcd_chooses_the_same_heads_of_a_text_prompt_beside_others():
    """All of it is context, so that every head has its whole weight there: rounding, which padding changes, must not choose."""
    model = tiny_llava(dtype=torch.float64, seed=17)
    inputs = make_inputs("llava", [1, 0, 2], seed=71, dtype=torch.float64)
    alone = single("llava", [1, 0, 2], 1, seed=71, dtype=torch.float64)
    with vlm_fix.wrapped(model, "dagcd"):
        assert error(greedy(model, inputs, 4)[2][1], greedy(model, alone, 4)[2][0]) < 1e-5


@pytest.mark.parametrize(
    "name, images",
    [
        ("idefics2", [1, 4, 0, 1]),
        ("smolvlm", [1, 2, 1]),
        ("llava_next", [1, 3, 1]),
        ("mistral3", [1, 3, 1]),
    ],
)
def test_the_images_of_a_row_are_its_own_without_the_padding_of_their_batch(name, images):
    """What random draws are seeded with, and a row's images themselves."""
    model, batch = build(name), prompt(name, images)
    family = vlm_fix.families.arch_of(model).family
    together, seeds = images_of_rows(Call(model, family, batch)), fingerprints(Call(model, family, batch))
    assert [len(found) for found in together] == images
    for row in (i for i, n in enumerate(images) if n):
        call = Call(model, family, prompt(name, images, rows=[row]))
        assert fingerprints(call) == [seeds[row]]
        assert all(torch.equal(a, b) for a, b in zip(images_of_rows(call)[0], together[row], strict=True))


def test_padding_inside_the_images_of_a_batch_seeds_nothing():
    """Idefics pads an image to the largest of its batch, and LFM2-VL its patches to the most."""
    model, name = build("idefics2"), "idefics2"
    family, batch = vlm_fix.families.arch_of(model).family, prompt(name, [1, 1])
    mask = torch.ones_like(batch["pixel_values"][:, :, 0])
    mask[:, :, 20:], mask[0, :, :, 16:] = 0, 0
    wide = {**batch, "pixel_attention_mask": mask}
    changed = {**wide, "pixel_values": torch.where(mask[:, :, None] == 0, 7.0, batch["pixel_values"])}
    assert fingerprints(Call(model, family, wide)) == fingerprints(Call(model, family, changed))
    assert [x.shape[1:] for (x,) in images_of_rows(Call(model, family, wide))] == [(20, 16), (20, 24)]
    model, batch = build("lfm2_vl"), prompt("lfm2_vl", [1, 2])
    call = Call(model, vlm_fix.families.arch_of(model).family, batch)
    masked = torch.where(batch["pixel_attention_mask"][..., None] == 0, 7.0, batch["pixel_values"])
    assert fingerprints(call) == fingerprints(Call(model, call.family, {**batch, "pixel_values": masked}))


def test_dagcd_does_not_ask_for_more_heads_than_there_are(models):
    with pytest.raises(vlm_fix.VlmFixError, match="heads_used=99 is more than the 16 heads of its layers"):
        vlm_fix.wrap(models["llava"], "dagcd:heads_used=99")


def test_worked_examples_by_hand():
    """p = (.4, .3, .2, .1): numbers that can be checked on paper."""
    l = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    rule = vlm_fix.parse_spec("yes_threshold")
    assert rule.forced(l, (1,), (0,)).exp().tolist() == [[0, 1, 0, 0]]  # .7 > .2 and .1 < .5
    assert torch.equal(vlm_fix.parse_spec("yes_threshold:mass=0.8").forced(l, (1,), (0,)), l)
    assert torch.equal(vlm_fix.parse_spec("yes_threshold:margin=0.05").forced(l, (1,), (0,)), l)
    # context 1 1 3 2 of which 2 is too unlikely; means .2 .1 .1 -> 2/4 1/4 1/4 -> 2/3 and 1/3 for tokens 1 and 2
    weights = torch.tensor([[[0.3, 0.1, 0.1, 0.1]]])
    ids, inside = torch.tensor([[1, 1, 3, 2]]), torch.ones(1, 4, dtype=torch.bool)
    entropy = -float((l.exp() * l).sum() / torch.log(torch.tensor(4.0)))
    p = vlm_fix.parse_spec("dagcd:alpha=1,top_rank=3").guided(l, weights, ids, inside).exp()[0].tolist()
    assert p == pytest.approx([0.4, 0.3 + entropy * 2 / 3, 0.2 + entropy / 3, 0.1], rel=1e-5)


CAKES = [
    {"punctuation": (3, 10), "concepts": (40, 60), "beta": 0.01},
    {"punctuation": (3, 40), "concepts": (41, 79), "punctuation_layers": "0-1", "concept_layers": "1-3",
     "punctuation_above": 0.01, "concept_above": 0.02, "alpha": 0.5, "beta": 0.05},
    {"punctuation": (3, 40), "concepts": (41, 79), "prompt_rows": "last", "concept_layers": "1|3", "beta": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CAKES)))
def test_layercake_equals_reference(family, model, number):
    inputs, twin = single(family, [1, 2, 1], 0, seed=3), ref.double(model)
    values = {k: tuple(range(*v)) if isinstance(v, tuple) else v for k, v in CAKES[number].items()}
    spec = vlm_fix.registry.get_method("layercake")(**values)
    m = spec.resolve(vlm_fix.families.arch_of(model))

    def theirs(tokens):
        ids = [*inputs["input_ids"][0].tolist(), *tokens.tolist()]
        start = inputs["input_ids"].shape[1]
        cake = Cake(ref.visual_columns(inputs["input_ids"]), start, list(m.layers), m.prompt_rows, ids=ids, method=m)
        main = ref.teacher_forced(twin, None, inputs, tokens[:-1])
        main = main.log_softmax(-1)
        other = ref.teacher_forced(twin, cake, inputs, tokens[:-1]).log_softmax(-1)
        z = (1 + m.alpha) * main - m.alpha * other
        assert float((main - other)[:, :IMAGE].abs().max()) > 1e-2
        z = z.masked_fill(main.exp() < m.beta * main.exp().amax(-1, keepdim=True), -torch.inf).log_softmax(-1)
        z[:, IMAGE] = -torch.inf  # it would need an image
        return z

    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs, suppress_tokens=[IMAGE])
        how = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True,
               "suppress_tokens": [IMAGE]}  # fmt: skip
        beams = model.generate(**inputs, max_new_tokens=6, do_sample=False, **how)
        batch = greedy(model, make_inputs(family, [1, 2, 1], seed=3), suppress_tokens=[IMAGE])[0]
    expected = theirs(tokens[0])
    cut = torch.isinf(expected)
    assert torch.equal(torch.isinf(scores[0]), cut)
    assert error(scores[0].log_softmax(-1)[~cut], expected.log_softmax(-1)[~cut]) < 1e-5
    assert torch.equal(batch[0], tokens[0])
    best = beams.sequences[0, -6:]
    assert abs(float(theirs(best).gather(1, best[:, None]).sum()) - float(beams.sequences_scores[0])) < 1e-4


def test_layercake_finds_its_words_with_the_models_tokenizer(family, model, monkeypatch):

    from transformers import AutoTokenizer

    inputs = single(family, [1, 2], 0)
    monkeypatch.setattr(model.config, "_name_or_path", "/nowhere")
    with vlm_fix.wrapped(model, "layercake"), pytest.raises(vlm_fix.VlmFixError, match="layercake:punctuation="):
        model.generate(**inputs, max_new_tokens=2)
    path = str(PICTO_LLAVA)
    monkeypatch.setattr(model.config, "_name_or_path", path)
    tokenizer, cake = AutoTokenizer.from_pretrained(path), vlm_fix.parse_spec("layercake")
    ids = tokenizer("is there a dog with the cat ? .", add_special_tokens=False)["input_ids"]
    words = [tokenizer.decode([i]) for i in ids]
    assert [w for w, i in zip(words, ids, strict=True) if i in cake.tokens(model, 0)] == ["?", "."]
    assert [w for w, i in zip(words, ids, strict=True) if i in cake.tokens(model, 1)] == ["dog", "cat"]
