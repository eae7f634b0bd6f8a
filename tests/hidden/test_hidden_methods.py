"""Hidden-state edits against float64 loops: patched forwards by hand, formulas over the layers' own outputs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.labelled import labelled
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import attention as edits
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix import LayerOutputEdit, MLPOutputEdit

RATES = "rr_attention=0.4|0.1|0.3|0.2,rr_mlp=0.1|0.5|0.2|0.3,sources=2,targets=3"
IRI = f"iri:{RATES},lambda_a=0.9,lambda_m=0.7"


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@dataclass(frozen=True)
class Shift(MLPOutputEdit, LayerOutputEdit):
    """Doubles the stream after layer 1 and halves what the MLP of layer 2 adds."""

    name: ClassVar[str] = "shift"
    where: str = "last"

    @property
    def row_scope(self):
        return vlm_fix.RowScope(self.where)

    def mlp_output(self, x, rows):
        return x / 2 if rows.layer == 2 else x

    def layer_output(self, x, rows):
        assert x.shape[1] == len(rows.positions) and rows.visual.shape[-1] == rows.session.types.shape[1]
        return x * 2 if rows.layer == 1 else x


@pytest.mark.parametrize("where", ["last", "after_image", "all"])
def test_edit_at_each_place_equals_a_forward_patched_by_hand(family, model, where):
    inputs = single(family, [1, 2], 0)
    with vlm_fix.wrapped(model, Shift(where=where)):
        tokens, logits, _ = greedy(model, inputs)
    visual = ref.visual_columns(inputs["input_ids"])
    first = {"last": inputs["input_ids"].shape[1] - 1, "after_image": visual[-1] + 1, "all": 0}[where]
    twin = ref.double(model)

    def scale(factor):
        def hook(module, args, output):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[:, first:] *= factor
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    layers = twin.model.language_model.layers
    layers[1].register_forward_hook(scale(2))
    layers[2].mlp.register_forward_hook(scale(0.5))
    assert error(logits[0], ref.teacher_forced(twin, None, inputs, tokens[0, :-1])) < 1e-5


@pytest.mark.parametrize("spec", [IRI, Shift(), [IRI, "pai:alpha=0.4", "vcd:beta=0.01"]], ids=["iri", "shift", "stack"])
def test_batch_and_beams_equal_single_and_rows_without_image_stay(family, model, spec):
    images = [1, 2, 1, 0]
    inputs = make_inputs(family, images)
    plain, plain_logits, _ = greedy(model, inputs)
    before = hooks(model)
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs)
        beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)[:, -5:]
        again = greedy(model, inputs)
        for row in range(3):
            alone = single(family, images, row)
            t, l, _ = greedy(model, alone)
            assert torch.equal(t[0], tokens[row]) and float((l[0] - logits[row]).abs().max()) < 2e-4
            assert torch.equal(
                model.generate(**alone, max_new_tokens=5, num_beams=3, do_sample=False)[0, -5:], beams[row]
            )
    assert torch.equal(again[1], logits)
    assert torch.equal(plain[3], tokens[3]) and torch.equal(plain_logits[3], logits[3])
    assert not torch.equal(plain_logits[:3], logits[:3])
    assert torch.equal(greedy(model, inputs)[1], plain_logits)
    assert hooks(model) == before


def test_rows_behind_a_pruner_are_those_that_are_left(family, model):
    images, stack = [1, 2, 1], ["hiprune:keep=4", Shift(where="after_image"), IRI]
    with vlm_fix.wrapped(model, stack):
        tokens, _, _ = greedy(model, make_inputs(family, images))
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


def test_passes_of_the_methods_own_are_not_edited(family, model, monkeypatch):
    """VHR's text-only pass gives the unedited outputs, whatever stands beside VHR."""
    from vlm_fix.methods.heads.vhr import VHR

    seen, choose = [], VHR.choose
    monkeypatch.setattr(VHR, "choose", lambda self, image, text: (seen.append(text), choose(self, image, text))[1])
    for stack in (["vhr"], ["vhr", Shift(where="all")]):
        with vlm_fix.wrapped(model, stack):
            greedy(model, single(family, [1], 0), steps=1)
    half = len(seen) // 2  # beside Shift the pass runs apart, whose products of other sizes round otherwise
    assert half and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_rows_before_the_last_are_bit_identical(family, model):
    inputs = single(family, [1, 2], 0)
    with torch.no_grad():
        plain = model(**inputs).logits
        with vlm_fix.wrapped(model, IRI):
            edited = model(**inputs).logits
    assert torch.equal(plain[:, :-1], edited[:, :-1]) and not torch.equal(plain[:, -1], edited[:, -1])


def test_iri_without_a_target_after_a_source_says_so_and_changes_nothing(family, model):
    inputs = make_inputs(family, [1, 2])
    _, logits, _ = greedy(model, inputs)
    with vlm_fix.wrapped(model, f"{IRI},layers=3"):
        assert not torch.equal(greedy(model, inputs)[1], logits)
    last_layer_only = "iri:rr_attention=0|0|0|1,rr_mlp=0|0|0|1,sources=1,targets=1"
    with (
        vlm_fix.wrapped(model, last_layer_only),
        pytest.warns(UserWarning, match="no target layer comes after a source"),
    ):
        assert torch.equal(greedy(model, inputs)[1], logits)


@pytest.mark.parametrize("layers", [(3,), (1, 2), (0, 3)])
def test_layers_leave_out_targets_but_no_source(family, model, layers):
    inputs, spec = single(family, [1], 0), f"{IRI},layers={'|'.join(map(str, layers))}"
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs)
    run = edits.IRI(
        ref.visual_columns(inputs["input_ids"]),
        inputs["input_ids"].shape[1],
        layers,
        rates={"attention": (0.4, 0.1, 0.3, 0.2), "mlp": (0.1, 0.5, 0.2, 0.3)},
        strength={"attention": 0.9, "mlp": 0.7},
        sources=2,
        targets=3,
    )
    expected = run.forward(ref.double(model), inputs, tokens[0, :-1])
    assert error(logits[0], expected) < 1e-5


def test_strengths_of_each_family(models):
    for name, strengths in (("llava", (0.26, 0.16)), ("qwen2_5_vl", (0.2, 0.1)), ("llava_next", (0.15, 0.08))):
        model = models[name] if name in models else families.build(name)
        method = vlm_fix.parse_spec(f"iri:{RATES}").resolve(vlm_fix.families.arch_of(model))
        assert (method.lambda_a, method.lambda_m) == strengths


def test_rates_do_not_depend_on_batches(monkeypatch):
    """One image far brighter than the others: its noise is its own, whatever it is traced with."""
    import vlm_fix.methods.hidden.tracing as iri

    model = families.build("idefics3")  # blank images beside real ones stay blank
    prompts = [families.prompt("idefics3", [n], seed) for n, seed in ((1, 0), (2, 1), (1, 2))]
    prompts[2]["pixel_values"] *= 20
    with torch.no_grad():
        logits = [model(**x).logits[0, -1] for x in prompts]
    samples = [vlm_fix.Sample(x, int(p.argmax()), int(p.argmin())) for x, p in zip(prompts, logits, strict=True)]
    together = vlm_fix.parse_spec("iri:noise=1").calibrate(model, samples, 3, lambda *_: None)
    batches = iri.batches
    monkeypatch.setattr(iri, "batches", lambda samples, size, pad: batches(samples, 1, pad))
    alone = vlm_fix.parse_spec("iri:noise=1").calibrate(model, samples, 3, lambda *_: None)
    for name in together:
        assert together[name] == pytest.approx(alone[name], abs=1e-4)


def test_iri_needs_its_rates(models):
    for spec, sentence in (
        ("iri", "run `vlm-fix calibrate iri"),
        ("iri:rr_attention=0.1|0.2,rr_mlp=0.1|0.2", "rr_attention holds 2 rates; this model has 4 layers"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(models["llava"], spec)


def answer_by_hand(twin, inputs, patch=None):
    """Answer probabilities [V] and the last rows [C] of every part, with one of them replaced: whole float64 forwards."""
    handles, seen = [], {}
    for i, layer in enumerate(twin.model.language_model.layers):
        for part in ("self_attn", "mlp"):

            def note(module, args, output, key=(part, i)):
                x = output[0] if isinstance(output, tuple) else output
                seen[key] = x[0, -1].clone()
                if patch and patch[0] == key:
                    x = x.clone()
                    x[0, -1] = patch[1]
                    return (x, *output[1:]) if isinstance(output, tuple) else x
                return None

            handles.append(getattr(layer, part).register_forward_hook(note))
    logits = ref.teacher_forced(twin, None, inputs, inputs["input_ids"][0, :0])[0]
    for handle in handles:
        handle.remove()
    return logits.softmax(-1), seen


def test_fcct_equals_reference(family, model):
    samples = labelled(family, (1, 2, 1))
    greedy(model, samples[0].inputs, 1)  # transformers adds hooks of its own at the first call
    twin = ref.double(model)
    clean = [answer_by_hand(twin, s.inputs) for s in samples]
    samples = [  # answered right by construction: the likeliest word against the least likely
        vlm_fix.Sample(s.inputs, int(p.argmax()), int(p.argmin())) for s, (p, _) in zip(samples, clean, strict=True)
    ]
    before = hooks(model)
    found = vlm_fix.parse_spec("iri:noise=2").calibrate(model, samples, 3, lambda *_: None)
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(3)).tolist()
    gain, lost = {}, 0.0
    for s, (p, outputs), seed in zip(samples, clean, seeds, strict=True):
        x = s.inputs["pixel_values"]
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        inputs = {**s.inputs, "pixel_values": x + 2 * x.std() * drawn}
        corrupt = float(answer_by_hand(twin, inputs)[0][s.target])
        if float(p[s.target]) <= corrupt:
            continue
        lost += float(p[s.target]) - corrupt
        for key, value in outputs.items():
            gain[key] = gain.get(key, 0) + float(answer_by_hand(twin, inputs, (key, value))[0][s.target]) - corrupt
    assert lost > 1e-3
    for name, part in (("rr_attention", "self_attn"), ("rr_mlp", "mlp")):
        for i, rate in enumerate(found[name]):
            assert rate == pytest.approx(gain[part, i] / lost, abs=2e-4), (name, i)
    assert hooks(model) == before
    with vlm_fix.wrapped(model, vlm_fix.registry.get_method("iri")(**found)):
        greedy(model, samples[0].inputs)


def test_fcct_without_usable_questions(models):
    samples = labelled("llava")
    with pytest.raises(vlm_fix.VlmFixError, match="no question was answered right and then unsettled"):
        vlm_fix.parse_spec("iri:noise=0").calibrate(models["llava"], samples, 0, lambda *_: None)


# ---- every family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.TINY)
def test_last_row_run_again_equals_whole_forwards_in_every_family(name):
    """LastRow under a hook gives what whole forwards of single prompts give; IRI's batch gives what its rows give."""
    from vlm_fix.calibration.search import LastRow, batches
    from vlm_fix.hidden.wing import writers
    from vlm_fix.sample import Sample

    model, images = families.build(name), [1, 2, 1]
    singles = [families.prompt(name, images, rows=[row]) for row in range(3)]
    layer = model.get_submodule(vlm_fix.families.family_of(model).language).layers[1]

    def half(module, args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, -1] /= 2
        return (x, *output[1:]) if isinstance(output, tuple) else x

    seen = []
    for part, inputs in batches([Sample(s, 5, 6) for s in singles], 2, 91):
        run, seen = LastRow(model, inputs), seen + part
        plain = run.logits()
        handle = writers(layer)["attention_output"].register_forward_hook(half)
        halved = run.logits()
        with torch.no_grad():
            expected = [model(**singles[i]).logits[0, -1] for i in part]
        handle.remove()
        assert float((plain - halved).abs().max()) > 1e-3
        assert all(float((a - b).abs().max()) < 2e-4 for a, b in zip(halved, expected, strict=True))
    assert sorted(seen) == [0, 1, 2]
    with vlm_fix.wrapped(model, IRI):
        tokens, logits, _ = greedy(model, families.prompt(name, images), 4)
        for row in range(3):
            t, l, _ = greedy(model, singles[row], 4)
            assert torch.equal(t[0], tokens[row]) and float((l[0] - logits[row]).abs().max()) < 2e-4
    assert float((greedy(model, families.prompt(name, images), 4)[1] - logits).abs().max()) > 1e-3


# ---- head pursuit -------------------------------------------------------------------------------------------------------


def somp_by_hand(y, dictionary, atoms):
    """Explained share by the paper's loop: argmax of the L1 correlation, then a whole least-squares fit."""
    chosen, residual = [], y
    for _ in range(atoms):
        scores = [
            -1.0 if j in chosen else sum(abs(float(r @ dictionary[j])) for r in residual)
            for j in range(len(dictionary))
        ]
        chosen.append(max(range(len(scores)), key=scores.__getitem__))
        d = dictionary[chosen]
        weights = torch.linalg.lstsq(d.T, y.T).solution
        residual = y - (d.T @ weights).T
    return 1 - float(residual.pow(2).sum() / y.pow(2).sum())


@pytest.mark.parametrize("atoms", [1, 3, 6])
def test_matching_pursuit_equals_least_squares(atoms):
    from vlm_fix.methods.heads.pursuit import explained

    g = torch.Generator().manual_seed(atoms)
    dictionary = torch.nn.functional.normalize(torch.randn(9, 16, generator=g, dtype=torch.float64), dim=-1)
    y = (
        torch.randn(20, 16, generator=g, dtype=torch.float64)
        + torch.randn(20, 3, generator=g).double() @ dictionary[:3]
    )
    expected = somp_by_hand(y, dictionary, atoms)
    assert 0 < expected < 1 and explained(y, dictionary, atoms) == pytest.approx(expected, abs=1e-10)
    twice = torch.cat([dictionary, dictionary])  # words that share a first token must not break the projection
    assert explained(y, twice, 18) == pytest.approx(somp_by_hand(y, dictionary, 9), abs=1e-9)
    assert explained(torch.zeros(4, 16), dictionary.float(), 3) == 0


def test_head_pursuit_finds_the_heads_of_a_reference(family, model, monkeypatch):
    """Greedy rows, contributions head by head and the ranking, recomputed in float64 without the engine."""
    samples = labelled(family, (1, 2, 1))
    words = {w: 10 + 3 * i for i, w in enumerate("abcdefgh")}
    samples = [vlm_fix.Sample(s.inputs, 5, 6, words) for s in samples]
    monkeypatch.setattr(model.generation_config, "eos_token_id", 40)
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [IMAGE])  # no second image for the reference
    found = vlm_fix.parse_spec("head_pursuit:top=16,atoms=3").calibrate(model, samples, 0, lambda *_: None)
    twin, rows = ref.double(model), {}
    for s in samples:
        tokens = model.generate(**s.inputs, max_new_tokens=16, do_sample=False)[0, s.inputs["input_ids"].shape[1] :]
        ends = (tokens == 40).nonzero()[:, 0].tolist()
        tokens = tokens[: ends[0] + 1] if ends else tokens
        run = ref.Reference([], s.inputs["input_ids"].shape[1], range(4))
        ref.teacher_forced(twin, run, s.inputs, tokens[:-1])
        for i, layer in enumerate(twin.model.language_model.layers):
            weight = layer.self_attn.o_proj.weight
            size = weight.shape[1] // 4
            for h in range(4):
                part = run.outputs[i][h, run.prompt_len - 1 :] @ weight[:, h * size : (h + 1) * size].T
                rows.setdefault((i, h), []).append(part.detach())
    dictionary = twin.lm_head.weight[list(words.values())].detach()
    dictionary = dictionary / dictionary.norm(dim=-1, keepdim=True)
    shares = {}
    for key, parts in rows.items():
        y = torch.cat(parts)
        shares[key] = somp_by_hand(y - y.mean(dim=0), dictionary, 3)
    ranked = sorted(shares, key=lambda k: -shares[k])
    gaps = [shares[a] - shares[b] for a, b in pairwise(ranked)]
    assert min(gaps) > 1e-5, "pick another seed: two heads are tied"
    assert found["head_list"] == tuple(f"{i}.{h}" for i, h in ranked)


def test_head_pursuit_without_heads_or_words_says_what_is_missing(models):
    model = models["llava"]
    for spec, sentence in (
        ("head_pursuit", "run `vlm-fix calibrate head_pursuit"),
        ("head_pursuit:head_list=1.9", "'1.9' is not layer.head; layers end at 3, heads at 3"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(model, spec)
    with pytest.raises(vlm_fix.VlmFixError, match="knows none of the concept's words"):
        vlm_fix.parse_spec("head_pursuit").calibrate(model, labelled("llava"), 0, lambda *_: None)
