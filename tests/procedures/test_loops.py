"""OPERA and SGRS, decoding loops of their own, against references that recompute everything at every step."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import vlm_fix
from tests.support.models import IMAGE, VOCAB, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.decoding import Recorder
from tests.support.run import Streamed

OPERAS = [
    "opera:threshold=1,warmup=2,beams=3,candidates=3",
    "opera:threshold=1,warmup=1,beams=2,candidates=2,scale=20,weight=0.5",
    "opera:threshold=2,warmup=1,beams=1,candidates=2,layers=2,scale=80",
    "opera:threshold=99,warmup=2,beams=3,candidates=2,weight=3",
]


SGRSES = [
    "sgrs:layers=1-3",
    "sgrs:layers=2|3,alpha=1.1,tries=2,top_k=4,seed=3",
    "sgrs:layers=1,alpha=2,tries=1,window=2",
]


EOS = [7, 42]


class Opera:
    """Beam search after the published text, on whole sequences without a cache; one prompt."""

    def __init__(self, model, inputs, spec):
        self.twin, self.inputs, self.m = ref.double(model), inputs, vlm_fix.parse_spec(spec)
        self.visual, self.start = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
        self.layer, self.known = int(self.m.layers or 3), {}
        self.returned = Counter()

    def look(self, tokens):
        """Logits after `tokens`, and the normalised rows [t][columns] of the tokens themselves."""
        if IMAGE in tokens:
            raise LookupError("an image token without an image: take another seed")
        if tokens not in self.known:
            run = Recorder(self.visual, self.start, [self.layer])
            logits = ref.teacher_forced(self.twin, run, self.inputs, torch.tensor(tokens, dtype=torch.long))
            rows = []
            for row in range(self.start, self.start + len(tokens)):
                peak = [max(float(run.seen[row, h][j]) for h in range(4)) for j in range(self.start + len(tokens))]
                rows.append([p / sum(peak) for p in peak])
            self.known[tokens] = logits[-1], rows
        return self.known[tokens]

    def penalty(self, tokens):
        rows, m = self.look(tokens)[1], self.m
        scores = []
        for j in range(len(tokens)):
            product = 1e-7
            for i in range(j, len(tokens)):
                product *= m.scale * rows[i][self.start + j]
            scores.append(product)
        place = max(range(len(scores)), key=lambda j: scores[j])
        return -sum(rows[-1][j] for j in self.visual) if len(tokens) <= m.warmup else scores[place], place

    def run(self, steps, eos=(), length_penalty=1.0):
        m, mode = self.m, lambda v: min(set(v), key=lambda x: (-v.count(x), x))
        beams, done = [((), 0.0)] + [((), -1e9)] * (m.beams - 1), []
        states, places, picks, rejected = [], [], [], defaultdict(set)
        while True:
            t = len(beams[0][0])
            states.append((beams, list(done)))
            scored, best_places = [], []
            for tokens, _ in beams:
                logits, where = self.look(tokens)[0], []
                row = torch.full_like(logits, -999)
                for c in logits.topk(m.candidates).indices.tolist():
                    phi, place = self.penalty((*tokens, c))
                    row[c] = logits[c] - m.weight * min(phi, 65504)
                    where.append(place)
                scored.append(row)
                best_places.append(mode(where))
            places.append(best_places)
            place = mode(best_places)
            counts = [sum(past[i] == place for past in places) for i in range(m.beams)]
            if all(c > m.threshold for c in counts) and place >= m.warmup:
                to = next((p for p in (place + 1, place) if p < t and self.returned[p] < m.candidates), None)
                if to is not None:
                    self.returned[to] += 1
                    beams, done = states[to]
                    wrong = picks[to]
                    states, places, picks = states[: to + 1], places[: to + 1], picks[:to]
                    rejected = defaultdict(set, {p: r for p, r in rejected.items() if p <= to})
                    rejected[to] |= wrong
                    scored = [self.look(tokens)[0].clone() for tokens, _ in beams]
                    for row in scored:
                        row[:] = row - row.min()
                    for parent, token in rejected[to]:
                        scored[parent][token] = 0
                    done = list(done)
            totals = [(s + float(p), i, v) for i, (_, s) in enumerate(beams)
                      for v, p in enumerate(scored[i].log_softmax(-1))]  # fmt: skip
            totals.sort(key=lambda x: -x[0])
            following, length = [], len(beams[0][0]) + 1
            for rank, (total, parent, token) in enumerate(totals[: 2 * m.beams]):
                tokens = (*beams[parent][0], token)
                if token in eos or length == steps:
                    if rank < m.beams:
                        done = sorted([*done, (total / length**length_penalty, tokens)], reverse=True)[: m.beams]
                elif len(following) < m.beams:
                    following.append((tokens, total, parent))
            over = len(done) == m.beams and done[-1][0] >= totals[0][0] / length**length_penalty
            if over or not following:
                return done[0]
            picks.append({(parent, tokens[-1]) for tokens, _, parent in following})
            beams = [(tokens, total) for tokens, total, _ in following]


SEEDS = {"llava": (5, 1, 0, 0), "qwen2_5_vl": (14, 1, 1, 1)}  # no generated image token; the first three go back


@pytest.mark.parametrize("number", range(len(OPERAS)))
def test_opera_equals_reference(family, model, number):
    """Same answer and score, with forced returns and with answers that end early."""
    spec, eos = OPERAS[number], EOS if number < 2 else ()
    inputs = single(family, [1, 2], 0, seed=SEEDS[family][number])
    search = Opera(model, inputs, spec)
    score, tokens = search.run(8, eos)
    with vlm_fix.wrapped(model, spec):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                             eos_token_id=list(eos) or None)  # fmt: skip
    assert tuple(out.sequences[0, search.start :].tolist()) == tokens
    assert abs(float(out.sequences_scores[0]) - score) < 1e-4
    assert bool(search.returned) == (number < 3)


@pytest.mark.parametrize("number", range(len(OPERAS)))
def test_opera_beside_another_method_tries_its_candidates_one_by_one(family, model, number, monkeypatch):
    """Side by side or one after the other, the answers and scores are the same; small chunks of rows change nothing."""
    from vlm_fix.attention import kernel
    from vlm_fix.decoding.search import Sequences

    steps, side_by_side = [], Sequences.side_by_side
    monkeypatch.setattr(Sequences, "side_by_side", lambda self, t: steps.append(1) or side_by_side(self, t))
    inputs = single(family, [1, 2], 0, seed=SEEDS[family][number])
    how = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}

    def run(*more):
        steps.clear()
        with vlm_fix.wrapped(model, [OPERAS[number], *more]):
            return model.generate(**inputs, **how), len(steps)

    (once, together), (each, apart) = run(), run("pai:alpha=1e-9,gamma=1,layers=0")
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4)
    chunked, _ = run()
    assert together and not apart
    for other in (each, chunked):
        assert torch.equal(once.sequences, other.sequences)
        assert torch.allclose(once.sequences_scores, other.sequences_scores, atol=1e-4)


def test_opera_is_beam_search_without_penalty_and_returns(family, model):
    """With every token a candidate and no weight to speak of, it is what generate's own beam search finds."""
    inputs = single(family, [1, 2], 0)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": list(EOS), "return_dict_in_generate": True}
    own = model.generate(**inputs, num_beams=3, output_scores=True, **how)
    with vlm_fix.wrapped(model, "opera:weight=1e-9,beams=3,candidates=96,threshold=999"):
        out = model.generate(**inputs, **how)
    assert torch.equal(out.sequences, own.sequences)
    assert torch.allclose(out.sequences_scores, own.sequences_scores, atol=1e-5)


@pytest.mark.parametrize("images", [[1, 0, 2], [0, 1]])
def test_opera_answers_text_prompts_beside_others_as_the_model_does(family, model, images):
    inputs = make_inputs(family, images)
    how = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **how)
    with vlm_fix.wrapped(model, "opera:beams=2,candidates=2"):
        out = model.generate(**inputs, **how, return_dict_in_generate=True)
        for row, count in enumerate(images):
            own = single(family, images, row)
            alone = model.generate(**own, **how)[0, own["input_ids"].shape[1] :]
            assert torch.equal(out.sequences[row, inputs["input_ids"].shape[1] :], alone)
            assert count or torch.equal(out.sequences[row], plain[row])
    assert bool((out.sequences_scores < 0).all()) and bool(out.sequences_scores.isfinite().all())


WEIGHTS: dict = {}  # layer -> A [1, H, L, L] of the last forward, in the graph


LOCORE = None  # (beta, window, prompt length)


def differentiable_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    z = query @ key.transpose(2, 3) * scaling
    if LOCORE:
        beta, window, start = LOCORE
        extra = torch.zeros_like(z[0, 0])
        for i in range(start, len(extra)):
            for j in range(max(start, i - window + 1), i + 1):
                extra[i, j] = torch.log(torch.tensor(1 + beta, dtype=torch.float64))
        z = z + extra
    a = (z + attention_mask).softmax(-1)
    WEIGHTS[module.layer_idx] = a
    return (a @ value).transpose(1, 2), a


AttentionInterface.register("reference_gradients", differentiable_attention)


AttentionMaskInterface.register("reference_gradients", eager_mask)


def whole(twin, inputs, tokens):
    """Logits [L + t, V] of prompt and tokens, with gradients."""
    new = torch.tensor([tokens], dtype=torch.long).view(1, -1)
    full = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    full["pixel_values"] = inputs["pixel_values"].double()
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = (full["input_ids"] == IMAGE).int()
    twin.model.rope_deltas = None
    with torch.enable_grad():
        return twin(**full, use_cache=False).logits[0]


def saliency(logits, row, candidate, layers, start):
    """S of `candidate`, predicted by the last row, read at attention row `row`."""
    with torch.enable_grad():
        loss = -logits[-1].log_softmax(-1)[candidate]
    total = 0.0
    for layer in layers:
        a = WEIGHTS[layer]
        g = torch.autograd.grad(loss, a, retain_graph=True)[0]
        x = (a * g).detach()[0, :, row]
        mean = [sum(abs(float(x[h, j])) for h in range(4)) / 4 for j in range(a.shape[-1])]
        norm = sum(v * v for v in mean) ** 0.5
        total += sum(mean[start:]) / len(mean[start:]) / norm if norm else 0.0
    return total / len(layers)


def sgrs_reference(model, inputs, spec, steps):
    """-> tokens, what happened, and the S of every candidate that was looked at."""
    twin, m = ref.double(model), vlm_fix.parse_spec(spec)
    twin.set_attn_implementation({"text_config": "reference_gradients"})
    layers = vlm_fix.method.parse_layers(m.layers, 4, "")
    grid, start = inputs.get("image_grid_thw"), inputs["input_ids"].shape[1]
    crc = zlib.crc32(inputs["input_ids"][0].numpy().tobytes())
    for image in inputs["pixel_values"].split([1, 1] if grid is None else [int(g.prod()) for g in grid]):
        crc = zlib.crc32(image.contiguous().numpy().tobytes(), crc)
    draw = torch.Generator().manual_seed(zlib.crc32(f"{m.seed},{crc}".encode()))
    tokens, taken, events, every = [], [], Counter(), []
    for t in range(steps):
        logits = whole(twin, inputs, tokens)
        scores = logits[-1].detach().clone()
        scores[IMAGE] = -torch.inf
        top, candidates = scores.topk(m.top_k)
        order = torch.multinomial(top.softmax(-1).float(), m.top_k, generator=draw).tolist()
        chosen, seen = candidates[order[0]], {}
        if t:
            recent = taken[-m.window :]
            bar, chosen = m.alpha * sum(recent) / len(recent) if recent else 0.0, None
            for i in order[: m.tries]:
                seen[i] = saliency(logits, start + t - 1, int(candidates[i]), layers, start)
                if seen[i] >= bar:
                    chosen = candidates[i]
                    taken.append(seen[i])
                    break
                events["rejected"] += 1
            if chosen is None:
                events["fell back"] += 1
                for i in range(m.top_k):
                    seen.setdefault(i, saliency(logits, start + t - 1, int(candidates[i]), layers, start))
                best = max(seen, key=lambda i: seen[i])
                chosen = candidates[best]
                taken.append(seen[best])
            every.append({int(candidates[i]): s for i, s in seen.items()})
        tokens.append(int(chosen))
    return tokens, events, every


@pytest.mark.parametrize("locore", [False, True], ids=["alone", "locore"])
@pytest.mark.parametrize("spec", SGRSES)
def test_sgrs_equals_reference(family, model, spec, locore):
    global LOCORE
    inputs = single(family, [1, 2], 1)
    stack = [spec, "locore:beta=0.6,window=3"] if locore else spec
    ours = []
    original = type(vlm_fix.parse_spec(spec)).saliency

    def noted(self, logits, candidates, seqs):
        s = original(self, logits, candidates, seqs)
        ours.append((seqs.length, int(candidates[0, 0]), float(s[0])))
        return s

    try:
        type(vlm_fix.parse_spec(spec)).saliency = noted
        with vlm_fix.wrapped(model, stack):
            out = model.generate(**inputs, max_new_tokens=10, suppress_tokens=[IMAGE])
    finally:
        type(vlm_fix.parse_spec(spec)).saliency = original
    LOCORE = (0.6, 3, inputs["input_ids"].shape[1]) if locore else None
    try:
        tokens, events, every = sgrs_reference(model, inputs, spec, 10)
    finally:
        LOCORE = None
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    assert len(ours) == sum(map(len, every))
    for t, candidate, s in ours:
        theirs = every[t - 1][candidate]
        assert theirs > 1e-4 and abs(s - theirs) < 1e-5
    assert events["rejected"] and (events["fell back"] or "alpha" not in spec)
    several = [s for s in every if len(s) > 1]
    assert several and all(max(s.values()) - min(s.values()) > 1e-4 for s in several)


def test_sgrs_reads_a_row_that_the_loss_reaches(family, model):
    """The row of the candidate itself, which the official code reads, has no gradient: S = 0 for every candidate."""
    inputs, tokens = single(family, [1, 2], 1), [5, 9, 30]
    twin, start = ref.double(model), inputs["input_ids"].shape[1]
    twin.set_attn_implementation({"text_config": "reference_gradients"})
    for candidate in (11, 12):
        logits = whole(twin, inputs, [*tokens, candidate])[:-1]
        assert saliency(logits, start + 3, candidate, [1, 2], start) == 0
        assert saliency(logits, start + 2, candidate, [1, 2], start) > 1e-3


LOOPS = [OPERAS[0], "sgrs:layers=1-3,alpha=1"]


@pytest.mark.parametrize("spec", LOOPS)
def test_loop_with_early_ends_beside_a_pruner_answers_batch_as_single(family, model, spec):
    """Left-padded, with and without returns, with answers of different lengths, beside an attention edit and a pruner."""
    images, how = [1, 2, 1], {"max_new_tokens": 9, "do_sample": False, "eos_token_id": [42]}
    for stack in ([spec], ["hiprune:keep=4", "pai:alpha=0.3", spec]):
        with vlm_fix.wrapped(model, stack):
            together = model.generate(**make_inputs(family, images), **how)
            assert torch.equal(together, model.generate(**make_inputs(family, images), **how))
            for row in range(3):
                inputs = single(family, images, row)
                alone = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
                rest = together[row, make_inputs(family, images)["input_ids"].shape[1] :]
                assert torch.equal(alone, rest[: len(alone)]) and (rest[len(alone) :] == 91).all()


@pytest.mark.parametrize("spec", ["opera", "sgrs"])
def test_loops_refuse_before_the_first_token(family, model, spec):
    inputs = single(family, [1, 2], 0)
    modes = {"prompt_lookup_num_tokens": 2, "cache_implementation": "static", "num_return_sequences": 2, "num_beams": 2,
             "prefill_chunk_size": 8, "assistant_model": model, "use_cache": False, "output_scores": True,
             "guidance_scale": 1.5}  # fmt: skip
    modes |= {"do_sample": True, "streamer": object()} if spec == "opera" else {}
    seen = []
    handle = model.model.register_forward_pre_hook(lambda *a: seen.append(1))
    with vlm_fix.wrapped(model, spec):
        for name, value in modes.items():
            with pytest.raises(vlm_fix.VlmFixError, match=name):
                model.generate(**inputs, max_new_tokens=3, **{name: value})
    handle.remove()
    assert not seen
    for other in ("vcd", "deco", "sgrs" if spec == "opera" else "opera"):
        with pytest.raises(vlm_fix.VlmFixError, match=other):
            vlm_fix.wrap(model, [spec, other])


def test_loops_on_text_refuse_or_answer(family, model):
    inputs = single(family, [0, 1], 0)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with (
        vlm_fix.wrapped(model, "opera"),
        pytest.warns(UserWarning, match="opera changed nothing.*no prompt contains an image"),
    ):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)
    with vlm_fix.wrapped(model, "sgrs:layers=1"):
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_sgrs_streams_and_obeys_its_seed(family, model):
    inputs, streamer = single(family, [1, 2], 0), Streamed()
    with vlm_fix.wrapped(model, "sgrs:layers=1-3"):
        out = model.generate(**inputs, max_new_tokens=6, streamer=streamer)
        torch.manual_seed(99)
        assert torch.equal(out, model.generate(**inputs, max_new_tokens=6))
    assert streamer.ended and streamer.tokens == out[0].tolist()
    with vlm_fix.wrapped(model, "sgrs:layers=1-3,seed=1"):
        assert not torch.equal(out, model.generate(**inputs, max_new_tokens=6))


def test_sgrs_needs_no_parameter_gradients(family, model):
    """A model whose weights are frozen gives the same answer, and no gradient is left anywhere."""
    inputs = single(family, [1, 2], 0)
    with vlm_fix.wrapped(model, "sgrs:layers=1-3"):
        out = model.generate(**inputs, max_new_tokens=6)
        try:
            model.requires_grad_(False)
            assert torch.equal(out, model.generate(**inputs, max_new_tokens=6))
        finally:
            model.requires_grad_(True)
    assert all(p.grad is None for p in model.parameters())


def test_opera_tries_at_most_all_tokens(models):
    inputs = single("llava", [1], 0)
    answers = []
    for candidates in (VOCAB, 1000):
        with vlm_fix.wrapped(models["llava"], f"opera:beams=2,candidates={candidates}") as model:
            answers.append(model.generate(**inputs, max_new_tokens=4))
    assert torch.equal(*answers)
