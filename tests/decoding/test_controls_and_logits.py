"""Decoding methods and controls against float64 references written from the formulas, in every decoding mode."""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, make_inputs, single
from tests.support.paths import PICTO_LLAVA
from tests.support.references import base as ref
from tests.support.references.decoding import deco, dola, second_prompt
from tests.support.run import STEPS, error, greedy

SPECS = [
    "apc_only:beta=0.3",
    "m3id:decay=0.3,beta=0.01",
    "m3id:decay=0.3,beta=0.01,first=0",
    "icd:tokens=11|12|13,beta=0.01",
    "random_heads:seed=1,layers=1-3",
    "random_heads:prompt_rows=all,alpha=1.5,layers=2-3",
    "gaussian_logits:sigma=2,seed=3",
    "gaussian_logits:sigma=0.5,beta=0.1,seed=5",
    "deco:layers=1-3",
    "deco:alpha=2,top_k=5,top_p=0.5,layers=2",
    "dola:layers=0|1|2|3",
    "dola:alpha=0.5,beta=0.02",
    "yes_bias:tokens=11|12|13",
    "yes_bias:tokens=11|12|13,alpha=0.5",
]
MATRIX = [SPECS[i] for i in (0, 1, 3, 4, 6, 8, 10, 12)]


@dataclass
class RandomHeadsReference(ref.Reference):
    alpha: float = 2.0
    seed: int = 0

    def scale(self, out, layer):
        out = out.clone()
        picked = random.Random(f"{self.seed},{layer}").sample(range(len(out)), len(out) // 2)
        assert len(picked) == 2
        for head in picked:
            for row in range(self.prompt_len - 1 if self.rows == "last" else 0, out.shape[1]):
                out[head, row] = out[head, row] * self.alpha
        return out


def expected(twin, spec, inputs, tokens):
    """Scores [T, V] by the formula at every step, from passes over prompt and answer without a cache."""
    method, n, ids = vlm_fix.parse_spec(spec), inputs["input_ids"].shape[1], inputs["input_ids"]
    visual, answer = ref.visual_columns(ids), tokens[:-1]
    if method.name == "random_heads":
        layers = list(vlm_fix.method.parse_layers(method.layers, 4, ""))
        run = RandomHeadsReference(visual, n, layers, rows=method.row_scope.value, alpha=method.alpha, seed=method.seed)
        return ref.teacher_forced(twin, run, inputs, answer)
    run = ref.Reference(visual, n, [])
    logits = ref.teacher_forced(twin, run, inputs, answer)
    main, z = logits.log_softmax(-1), []
    if method.name in ("m3id", "icd", "yes_bias"):
        other = ref.teacher_forced(twin, None, second_prompt(method.name, inputs), answer).log_softmax(-1)
    for t in range(len(tokens)):
        x, p = main[t], main[t].exp()
        keep = [float(p[v]) >= getattr(method, "beta", 0) * float(p.max()) for v in range(len(p))]
        if method.name == "m3id":
            g = math.exp(-method.decay * (t + method.first))
            x = x + (1 - g) / g * (x - other[t])
        elif method.name == "icd":
            x = (1 + method.alpha) * x - method.alpha * other[t]
        elif method.name == "yes_bias":
            x = (1 - method.alpha) * x + method.alpha * other[t]
        elif method.name == "gaussian_logits":
            x = x + method.sigma * noise(method.seed, inputs, tokens[:t], len(x))
        elif method.name in ("deco", "dola"):
            states = {i: run.inputs[i][n - 1 + t] for i in method.resolve(vlm_fix.families.arch_of(twin)).layers}
            x, keep = (deco if method.name == "deco" else dola)(twin, method, x, states, keep)
        z.append(x.masked_fill(~torch.tensor(keep), -torch.inf))
    return torch.stack(z).log_softmax(-1)


def noise(seed, inputs, answer, size):
    grid = inputs.get("image_grid_thw")
    sizes = [1, 1] if grid is None else [int(g.prod()) for g in grid]
    crc = zlib.crc32(inputs["input_ids"][0].numpy().tobytes())
    for image in inputs["pixel_values"].split(sizes):
        crc = zlib.crc32(image.contiguous().numpy().tobytes(), crc)
    crc = zlib.crc32(f"{seed},{crc}".encode() + answer.numpy().tobytes())
    return torch.randn(size, generator=torch.Generator().manual_seed(crc)).double()


@pytest.mark.parametrize("spec", SPECS)
def test_equals_reference(family, model, spec):
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    with vlm_fix.wrapped(model, spec):
        tokens, logits, scores = greedy(model, inputs)
    theirs = expected(twin, spec, inputs, tokens[0])
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    if "random_heads" in spec:
        assert float((theirs - plain).abs().max()) > 1e-2
        assert error(logits[0], theirs) < 1e-5
        return
    cut, ours = torch.isinf(theirs), scores[0].log_softmax(-1)
    assert torch.equal(torch.isinf(ours), cut)
    assert error(ours[~cut], theirs[~cut]) < 1e-5
    assert cut.any() or float((theirs - plain.log_softmax(-1)).abs().max()) > 1e-2, "the method must matter here"
    assert torch.equal(tokens[0], theirs.argmax(-1))


@pytest.mark.parametrize("spec", MATRIX)
def test_beams_add_up_the_reference(family, model, spec):
    """The score of each returned beam is the sum of the formula's log-probabilities along it."""
    inputs, twin = single(family, [1, 2], 1), ref.double(model)
    with vlm_fix.wrapped(model, spec):
        out = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=2, do_sample=False,
                             length_penalty=0.0, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    for sequence, total in zip(out.sequences[:, -5:], out.sequences_scores, strict=True):
        theirs = expected(twin, spec, inputs, sequence).log_softmax(-1)
        assert abs(float(theirs.gather(1, sequence[:, None]).sum()) - float(total)) < 1e-4


@pytest.mark.parametrize("spec", MATRIX)
def test_no_hook_stays_on_the_layers_after_a_call(family, model, spec):
    with vlm_fix.wrapped(model, spec):
        model.generate(**single(family, [1, 2], 0), max_new_tokens=2, do_sample=False)
        assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


@pytest.mark.parametrize("spec", [*MATRIX, "m3id:first=0", "yes_bias:tokens=11|12|13,alpha=2"])
def test_tokens_that_generate_forbids_stay_forbidden(family, model, spec):
    inputs, none = single(family, [1, 2], 0), list(range(0, 96, 2))
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs, suppress_tokens=none, eos_token_id=2, min_new_tokens=STEPS)
    assert (tokens % 2 == 1).all() and not torch.isnan(scores).any()
    assert torch.isinf(scores[..., none]).all() and torch.isfinite(scores.amax(-1)).all()


@pytest.mark.parametrize("spec", ["apc_only", "gaussian_logits", "deco", "dola"])
def test_methods_that_need_no_image_work_on_text(family, model, spec):
    """Methods that need no image work on text."""
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, single(family, [0, 1], 0))
        assert tokens.shape[1] == STEPS and torch.isfinite(scores.amax(-1)).all()


@pytest.mark.parametrize("spec", ["gaussian_logits", "deco:layers=1-3", "dola:layers=0|1|2|3"])
def test_logit_method_beside_contrast_and_pruner_answers_batch_as_single(family, model, spec):
    images, stack = [1, 2, 1], ["hiprune:keep=4", "pai:alpha=0.3", "vcd:beta=0.01", spec]
    with vlm_fix.wrapped(model, stack[:3]):
        without = greedy(model, make_inputs(family, images))[2]
    with vlm_fix.wrapped(model, stack):
        tokens, _, scores = greedy(model, make_inputs(family, images), min_new_tokens=STEPS)
        assert not torch.equal(without, scores) and not torch.isnan(scores).any()
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row), min_new_tokens=STEPS)[0][0], tokens[row])


def test_gaussian_noise_has_its_size_and_is_new_for_each_image_seed_and_row(family, model):
    """Of the given size, new at every step, other for another image, seed or row."""
    inputs, other = single(family, [1, 2], 1), single(family, [1, 2], 1)
    other["pixel_values"] = other["pixel_values"].clone()
    other["pixel_values"][-1] += 1e-3
    drawn = {}
    for key, spec, these in (("a", "gaussian_logits:sigma=3", inputs), ("b", "gaussian_logits:sigma=3,seed=1", inputs),
                             ("c", "gaussian_logits:sigma=3", other)):  # fmt: skip
        with vlm_fix.wrapped(model, spec):
            _, logits, scores = greedy(model, these)
        drawn[key] = scores[0] - logits[0].log_softmax(-1)
        drawn[key] = drawn[key] - drawn[key].mean(-1, keepdim=True)
    assert 2.7 < float(drawn["a"].std()) < 3.3
    for x, y in ((drawn["a"][0], drawn["b"][0]), (drawn["a"][0], drawn["c"][0]), (drawn["a"][0], drawn["a"][1])):
        assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.4


def test_icd_reads_the_tokenizer_of_the_models_directory(family, model, monkeypatch):

    from transformers import AutoTokenizer

    inputs = single(family, [1, 2], 0)
    monkeypatch.setattr(model.config, "_name_or_path", "/nowhere")
    with vlm_fix.wrapped(model, "icd"), pytest.raises(vlm_fix.VlmFixError, match="icd:tokens="):
        model.generate(**inputs, max_new_tokens=2)
    path = str(PICTO_LLAVA)
    ids = AutoTokenizer.from_pretrained(path)("\nis the cat red\n", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model.config, "_name_or_path", path)
    call = vlm_fix.session.Call(model, vlm_fix.families.family_of(model), make_inputs(family, [1, 0, 2]))
    second, first = vlm_fix.parse_spec("icd:prompt=is the cat red").negative(call), call.inputs
    assert len(ids) > 3
    for row, images in enumerate((1, 0, 2)):
        old, new = (x["input_ids"][row][x["attention_mask"][row].bool()].tolist() for x in (first, second))
        at = max((i for i, t in enumerate(old) if t == IMAGE), default=-1) + 1
        at += family == "qwen2_5_vl"
        assert new == (old[:at] + ids + old[at:] if images else old)


def test_worked_examples_equal_sums_by_hand():
    """Three tokens, p = (.6, .3, .1): DeCo and DoLa on numbers that can be checked on paper."""
    p = torch.tensor([[0.6, 0.3, 0.1]])
    early = torch.tensor([[[0.2, 0.7, 0.1]], [[0.5, 0.1, 0.4]]]).log()
    z = vlm_fix.parse_spec("deco:alpha=1,top_p=0.8").corrected(p.log(), early)
    by_hand = [math.log(0.6) + 0.7 * math.log(0.2), math.log(0.3) + 0.7 * math.log(0.7)]
    assert z[0, :2].tolist() == pytest.approx(by_hand)
    assert z[0, 2] == -torch.inf
    z = vlm_fix.parse_spec("dola:beta=0.4").contrasted(p.log(), early)  # the first layer differs more
    assert z[0, :2].tolist() == pytest.approx([math.log(3), math.log(0.3 / 0.7)]) and z[0, 2] == -torch.inf
    m3id = vlm_fix.parse_spec("m3id:decay=0.5,beta=0")
    z = m3id.combine_at(1, p.log(), early[0])
    assert z[0, 0] == pytest.approx(math.log(0.6) + (math.e - 1) * math.log(3), rel=1e-5)
