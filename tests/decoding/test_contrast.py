"""Contrast methods: token-identical to branches recomputed from scratch, in every decoding mode; sharing; joined steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from transformers import LogitsProcessor

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.contrast import distribution
from tests.support.references.decoding import second_prompt
from tests.support.run import VAR_TINY, Streamed, error, greedy
from tests.support.tensors import OBJECTS
from vlm_fix.families.compat import cache_of
from vlm_fix.registry import get_method, parse_spec

STEPS = 4
CAKE = (
    f"layercake:punctuation={'|'.join(map(str, range(3, 40)))},concepts={'|'.join(map(str, range(40, 60)))},beta=0.01"
)
MARINE = f"marine:objects={OBJECTS}"
CROPS = "crops:decay=0.1,beta=0.01,gate=1"
RITUAL = "ritual:mean=0.5|0.4|0.6,std=0.3|0.3|0.2,beta=0.01"
ASCD = "ascd:head_list=1.0|1.3|2.2|3.1,beta=0.01"
SHIELD = "shield:beta=0.01,bias=0.4,steps=3,samples=3"
SPECS = [
    "vcd:beta=0.01",
    "pai:alpha=0.5,gamma=1.3",
    "icd:tokens=11|12|13,beta=0.01",
    "m3id:decay=0.3,beta=0.01",
    "sid:beta=0.01",
    "decore:head_list=1.0|1.3|2.2|3.1",
    "iava:tokens=21|22|23,beta=0.01",
    "avisc:beta=0.01",
    RITUAL,
    CROPS,
    MARINE,
    "owl:beta=0.01",
    ASCD,
    SHIELD,
    "causalmm:beta=0.01",
    CAKE,
]
MORE = ["owl:base=0.9|2.5|1.4|1.4,layers=0-,beta_text=0.4,beta=0.1", "owl:base=99,layers=2,boost=0.3,lam=2",
        "crops:alpha=0,decay=0.5,text_low=3,text_more=4,text_rate=0.3,beta=0,gate=1", "crops:decay=0,keep=5,gate=0.99",
        "crops:text_low=40,decay=0.2,gate=1","sid:keep=5,layers=3,refresh=false,alpha=2", "sid:keep=5,refresh=false",
        "ascd:boost=0,critical=7,damp=0.4,alpha=2,beta=0", "ascd:head_list=0.0|3.3,boost=2,layers=0|2-3,critical=0.35,beta=0.1",
        "shield:alpha=0.5,bias=0,steps=4,lr=0.02,scale=3,beta=0.1,seed=5", "shield:bias=1,samples=1,steps=1,beta=0",
        "decore:head_list=0.1|3.1,normalised=true,cap=0.5,beta=0.1",
        "avisc:coverage=1,lam=-0.3,alpha=2.5,beta=0",
        "iava:tokens=21|22,coverage=1,high=0.2,drop=-5,beta=0", "causalmm:vision=reversed,language=none",
        "causalmm:vision=uniform,language=uniform,gamma=2", "causalmm:vision=random,language=random,seed=3",
        "causalmm:vision=none,language=reverse,layers=1|3"]  # fmt: skip


def name(spec):
    return spec if len(spec) < 80 else spec.partition(":")[0]


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
        cut, ours = torch.isinf(theirs), scores[0, t].log_softmax(-1)
        assert torch.equal(torch.isinf(ours), cut)
        assert error(ours[~cut], theirs[~cut]) < 1e-5
        assert float((ours - logits[0, t].log_softmax(-1))[~cut].abs().max()) > 1e-3, "the contrast must matter"


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
     ("iava:tokens=21|22", 1, "all"), ("avisc", 1, "all"), ("causalmm", 1, "all"), ("m3id", 1, "tail"), ("vcd", 2, "all"),
     (RITUAL, 2, "all"), (MARINE, 1, "tail"), ("owl", 1, "last"), (ASCD, 1, "last")],
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
        "marine": after - (family != "llava") + 3,
        "icd": after - (family != "llava") + 3,
        "decore": 1,
        "owl": 1,
        "ascd": 1,
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
        assert error(scores[0].log_softmax(-1), z.log_softmax(-1)) < 1e-5
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

    for name in (
        "vcd:alpha=1,beta=0.4",
        "icd:alpha=1,beta=0.4",
        "sid:alpha=1,beta=0.4",
        "iava:alpha=1,beta=0.4",
        "avisc:alpha=1,beta=0.4",
        "ascd:alpha=1,beta=0.4",
        "shield:alpha=1,beta=0.4",
    ):
        z = scores(name)
        assert z[:2].tolist() == pytest.approx([math.log(0.72), math.log(0.9)]) and z[2] == -math.inf  # .36/.5, .09/.1
    z = scores("pai:gamma=2,beta=0.4")
    assert z[:2].tolist() == pytest.approx([math.log(0.72), math.log(0.9)]) and z[2] == -math.inf
    z = scores("ritual:alpha=2,beta=0.4")
    assert z[:2].tolist() == pytest.approx([math.log(0.15), math.log(0.003)]) and z[2] == -math.inf  # .6 * .5^2
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
    from vlm_fix.methods.contrast.copying import copies

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
    difference = (scores[0].log_softmax(-1) - logits[0].log_softmax(-1)).abs().amax(-1)
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
            scores.append(greedy(model, inputs, 1)[2][0, 0].log_softmax(-1))
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
        assert error(scores[0, t].log_softmax(-1)[~cut], expected[~cut]) < 1e-5


def test_ascd_calibration_votes_like_loops(family, model):
    """The heads with the most votes by text over image, from weights that loops materialise; the model as it was."""
    from vlm_fix.sample import Sample

    samples = [Sample(single(family, [1 + s % 2], 0, seed=s), 5, 6) for s in range(5)]
    before, twin = {k: v.clone() for k, v in model.state_dict().items()}, ref.double(model)
    for text in ("all", "after"):
        votes, ranks = {}, {}
        for s in samples:
            ids = s.inputs["input_ids"]
            visual = ref.visual_columns(ids)
            run = Weights(visual, ids.shape[1], [0, 1, 2, 3])
            ref.teacher_forced(twin, run, s.inputs, ids[0, :0])
            first = max(visual) if text == "after" else -1
            ratio = {
                at: sum(float(a[j]) for j in range(len(a)) if j > first and j not in visual)
                / sum(map(float, a[visual]))
                for at, a in run.seen.items()
            }
            order = sorted(ratio, key=lambda at: -ratio[at])
            for rank, at in enumerate(order):
                votes[at] = votes.get(at, 0) + (rank < 3)
                ranks[at] = ranks.get(at, 0) + rank
        best = sorted(sorted(votes, key=lambda at: (-votes[at], ranks[at], at))[:3])
        method = vlm_fix.parse_spec(f"ascd:share=0.2,text={text}")
        shares = []
        found = method.calibrate(model, samples, 0, lambda what, share, shares=shares: shares.append(share))
        assert found == {"head_list": tuple(f"{layer}.{head}" for layer, head in best)} and shares[-1] == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(vlm_fix.VlmFixError, match="vlm-fix calibrate ascd"):
        vlm_fix.wrap(model, "ascd")


@dataclass
class Weights(ref.Reference):
    """The weights of the prompt's last row."""

    seen: dict = field(default_factory=dict)

    def weight(self, a, layer, head, row):
        self.seen[layer, head] = a.clone()
        return a


@pytest.mark.parametrize("spec", ["icd:tokens=11|12|13", "vcd:noise_step=500,beta=0.01"])
def test_few_float32_rows_join_on_a_cpu(family, model, spec, monkeypatch):
    """One prompt's branches share a step, with products the other way round, unless that is switched off or gated."""
    from vlm_fix.decoding import few_rows, joint

    inputs, steps, widen = single(family, [1, 2], 0), [], joint.Joint.widen
    monkeypatch.setattr(joint.Joint, "widen", lambda self, *a: steps.append(1) or widen(self, *a))
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}

    def run(spec):
        steps.clear()
        with vlm_fix.wrapped(model, spec):
            return model.generate(**inputs, **options), len(steps)

    fast, joined = run(spec)
    assert joined == 4 and not run(f"{spec},gate=0.999")[1]
    monkeypatch.setenv("VLM_FIX_JOINED", "0")
    slow, apart = run(spec)
    assert apart == 0 and torch.equal(fast.sequences, slow.sequences)
    x, y = torch.stack(fast.scores), torch.stack(slow.scores)
    assert torch.equal(torch.isinf(x), torch.isinf(y)) and torch.allclose(x, y, atol=1e-4)
    assert few_rows.applies(2, torch.device("cpu"), torch.float32) is False


def test_a_step_of_few_rows_that_fails_leaves_nothing_behind(models, monkeypatch):
    """The products are the usual ones again after an error inside a joined forward."""
    from torch.overrides import _get_current_function_mode_stack

    model, inputs = models["llava"], single("llava", [1], 0)
    layer = model.model.language_model.layers[2]

    def fail(module, args, output):
        assert not _get_current_function_mode_stack(), "stopped inside the joined step"

    with vlm_fix.wrapped(model, "icd:tokens=11|12|13"):
        hook = layer.register_forward_hook(fail)
        with pytest.raises(AssertionError, match="stopped inside"):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        hook.remove()
        assert not _get_current_function_mode_stack()
        model.generate(**inputs, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_products_of_few_rows_are_linear(rows):
    from vlm_fix.decoding.few_rows import FewRows

    layer, x = torch.nn.Linear(48, 80), torch.randn(rows, 1, 48)
    with torch.no_grad():
        plain = layer(x)
        with FewRows():
            few, half = layer(x), layer.bfloat16()(x.bfloat16())
        assert few.shape == plain.shape and few.is_contiguous() and torch.allclose(few, plain, atol=1e-6)
        assert torch.equal(half, layer(x.bfloat16())) and (rows in (2, 3) or torch.equal(few, plain))


@pytest.mark.parametrize("branch", ["main", "negative", "both"])
def test_a_look_at_the_model_is_the_main_branch(model, family, branch, monkeypatch):
    """What is read before the answer is no branch of the contrast: only what acts in the main branch acts there."""
    edit, seen = get_method("vaf"), set()
    change = edit.edit_scores
    monkeypatch.setattr(
        edit, "edit_scores", lambda self, z, rows: seen.add(rows.session.branch) or change(self, z, rows)
    )
    with vlm_fix.wrapped(model, [f"vaf:branch={branch},layers=0-", "avisc"]):
        greedy(model, single(family, [1, 2], 1), 3)
    expected = {"main": {"main", "main instruction"}, "negative": {"negative"}}
    assert seen == expected.get(branch, {"main", "main instruction", "negative"})


def test_who_needs_image_columns_is_named():
    model, inputs = families.build("mllama"), families.prompt("mllama", [1])
    for name in ("avisc", "iava:tokens=11"):
        with (
            vlm_fix.wrapped(model, name),
            pytest.raises(vlm_fix.VlmFixError, match=f"^{name.partition(':')[0]} works on"),
        ):
            model.generate(**inputs, max_new_tokens=2)
