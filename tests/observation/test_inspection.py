"""inspect against float64 passes over materialised attention; the causal map against patches put in by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references.base import PaiReference, decoder, double, teacher_forced, visual_columns
from vlm_fix.errors import VlmFixError
from vlm_fix.observation import page

ANSWER = [5, 33, 71, 12]


def close(ours, theirs, limit=1e-4):
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()) < limit


@dataclass
class Kept(PaiReference):
    weights: dict = field(default_factory=dict)  # layer -> A [H, K, K]

    def mixed(self, a, layer):
        super().mixed(a, layer)
        self.weights[layer] = a.clone()


def passed(model, inputs, alpha):
    """(run, logits [n, V]) of prompt and answer but its last token."""
    run = Kept(visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1], [0, 1, 2, 3], alpha=alpha)
    return run, teacher_forced(double(model), run, inputs, torch.tensor(ANSWER[:-1]))


@pytest.mark.parametrize("spec", ["zerotuning:rate=0.3", "vaf:enhance=2", "hgai"])
def test_what_is_shown_does_not_depend_on_what_else_is_asked(model, family, spec):
    """A recorder of one layer meets plans that the stack's other layers made without it."""
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, spec):
        alone, both = (vlm_fix.inspect(model, inputs, ANSWER, saliency=more) for more in (False, True))
    assert close(alone.rollout.sum(dim=-1), torch.ones(len(ANSWER))) and close(alone.rollout, both.rollout)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("alpha", [0, 0.7])
def test_lens_rollout_and_heads(model, family, alpha):
    """alpha: under pai, whose weights then are the ones that are seen."""
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, f"pai:alpha={alpha},layers=0-" if alpha else "baseline"):
        found = vlm_fix.inspect(model, inputs, ANSWER, saliency=False)
    run, logits = passed(model, inputs, alpha)
    twin, n, length = double(model), len(ANSWER), inputs["input_ids"].shape[1]
    assert found.ids.tolist() == [*inputs["input_ids"][0].tolist(), *ANSWER] and found.prompt_len == length
    for layer in range(5):
        x = run.inputs[layer][-n:] if layer < 4 else None
        z = logits if x is None else twin.lm_head(decoder(twin).norm(x))
        p = z.softmax(dim=-1)
        assert close(found.lens_own[layer], p[range(n), ANSWER].detach(), 1e-3)
        assert found.lens_tokens[layer, :, 0].tolist() == p.argmax(dim=-1).tolist()
    v = torch.eye(length + n - 1, dtype=torch.float64)
    for layer in range(4):
        a = run.weights[layer].mean(dim=0)
        v = (0.5 * torch.eye(len(a), dtype=torch.float64) + 0.5 * a) @ v
    assert close(found.rollout, v[-n:])
    assert torch.allclose(found.rollout.sum(dim=1), torch.ones(n), atol=1e-4)
    ids = found.ids.tolist()
    for layer in range(4):
        for head in range(4):
            rows = run.weights[layer][head, length - 1 :]
            best = rows.argmax(dim=-1).tolist()
            looks = sum(ids[j] == IMAGE for j in best) / n
            copies = sum(ids[j] == ANSWER[t] for t, j in enumerate(best)) / n
            assert found.looking[layer, head] == pytest.approx(looks)
            assert found.copying[layer, head] == pytest.approx(copies)
            mass = rows[:, visual_columns(inputs["input_ids"])].sum() / n
            assert float(found.image_mass[layer, head]) == pytest.approx(float(mass), rel=1e-4)


def test_where_a_token_appears():
    """Token 7: on top of the inputs of layers 0 and 2, not 1, and of the logits: it appears at 2."""
    tops = torch.tensor([7, 8, 7, 7]).view(4, 1, 1)
    empty = torch.zeros(1)
    made = vlm_fix.Inspection(
        torch.tensor([1, 7]), empty, 1, tops, empty, empty, None, None, empty, empty, empty, empty, empty, empty, None
    )
    assert made.appears(0) == 2
    made.lens_tokens[2] = 8
    assert made.appears(0) is None


def test_saliency_is_weight_times_gradient(model, family):
    inputs = single(family, [1, 2], 1)
    found = vlm_fix.inspect(model, inputs, ANSWER, rollout=False).saliency
    twin, length = double(model), inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([ANSWER[:-1]])], dim=1)
    given = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": inputs["pixel_values"].double(),
    }
    if "mm_token_type_ids" in inputs:
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    out = twin(**given, output_attentions=True, use_cache=False)
    for t, token in enumerate(ANSWER):
        loss = -out.logits[0, length - 1 + t].log_softmax(dim=-1)[token]
        grads = torch.autograd.grad(loss, out.attentions, retain_graph=True)
        for layer, (a, grad) in enumerate(zip(out.attentions, grads, strict=True)):
            row = (a[0, :, length - 1 + t] * grad[0, :, length - 1 + t]).abs().mean(dim=0)
            assert close(found[layer, t], row.detach(), 1e-3), (layer, t)


def noised(inputs):
    """The pixels, and the same under six deviations of noise."""
    pixels = inputs["pixel_values"]
    return pixels, pixels + 6.0 * pixels.std() * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def test_causal_map_by_hand(model, family):
    """One layer of every part and group: the noise drawn again, the clean output put into the noised run."""
    inputs, token = single(family, [1], 0), 1
    pixels, noised_pixels = noised(inputs)
    with torch.no_grad():
        p_clean, p_dirty = (
            model(**{**inputs, "pixel_values": x}).logits[0, -1].softmax(dim=-1) for x in (pixels, noised_pixels)
        )
    answer = [int((p_clean - p_dirty).argmax()), *ANSWER[1:]]  # one that the image carries
    found = vlm_fix.inspect(model, inputs, answer, saliency=False, rollout=False, causal=0, noise=6.0).effects
    twin = double(model)
    twin.set_attn_implementation("eager")
    clean = {**inputs, "pixel_values": pixels.double()}
    dirty = {**inputs, "pixel_values": noised_pixels.double()}

    def p(given, hooks=()):
        with torch.no_grad():
            value = twin(**given, use_cache=False).logits[0, -1].softmax(dim=-1)[answer[0]]
        for hook in hooks:
            hook.remove()
        return float(value)

    for name, at in (("self_attn", 0), ("mlp", 1), (None, 2)):
        module, kept = decoder(twin).layers[token], []
        module = module if name is None else getattr(module, name)
        whole = p(clean, [module.register_forward_hook(lambda m, a, o, kept=kept: kept.append(first(o).clone()))])
        for g, (start, end) in enumerate(found.places):

            def put(m, a, o, kept=kept, start=start, end=end):
                x = first(o).clone()
                x[:, start:end] = kept[0][:, start:end]
                return (x, *o[1:]) if isinstance(o, tuple) else x

            rate = (p(dirty, [module.register_forward_hook(put)]) - p(dirty)) / (whole - p(dirty))
            assert float(found.rates[at, token, g]) == pytest.approx(rate, abs=2e-3), (name, g)
    assert found.clean == pytest.approx(whole, rel=1e-4)
    ids = inputs["input_ids"][0].tolist()
    assert [ids[a:b] for a, b in found.places][1].count(IMAGE) == ids[: found.places[1][1]].count(IMAGE)
    assert all(b - a == 1 for a, b in found.places[2:] if ids[a] != IMAGE) and found.places[-1][1] == len(ids)


def test_the_model_is_left_as_it_was(model, family):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "pai:alpha=0.5"):
        before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        vlm_fix.inspect(model, inputs, ANSWER)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_it_cannot_do_is_one_sentence(model, family):
    with pytest.raises(VlmFixError, match="not a batch"):
        vlm_fix.inspect(model, make_inputs(family, [1, 2]), ANSWER)
    with pytest.raises(VlmFixError, match="got none"):
        vlm_fix.inspect(model, single(family, [1], 0), [])
    with pytest.raises(VlmFixError, match="no answer token 9"):
        vlm_fix.inspect(model, single(family, [1], 0), ANSWER, saliency=False, rollout=False, causal=9)
    with vlm_fix.wrapped(model, "hiprune:keep=4"), pytest.raises(VlmFixError, match="unwrap the pruner"):
        vlm_fix.inspect(model, single(family, [1], 0), ANSWER)


def test_an_answer_is_taken_as_observe_takes_it(model, family):
    """What generate returned: the prompt comes off."""
    inputs = single(family, [1, 2], 1)
    output = torch.cat([inputs["input_ids"], torch.tensor([ANSWER])], dim=1)
    found, plain = (vlm_fix.inspect(model, inputs, a, saliency=False, rollout=False) for a in (output, ANSWER))
    assert found.tokens.tolist() == ANSWER and torch.equal(found.lens_own, plain.lens_own)


def test_causal_map_of_a_model_inside_a_model():
    """Llama 4's language head lies deeper than others'."""
    model, inputs = families.build("llama4"), families.prompt("llama4", [1])
    with torch.no_grad():
        p = [model(**{**inputs, "pixel_values": x}).logits[0, -1].softmax(dim=-1) for x in noised(inputs)]
    answer = [int((p[0] - p[1]).argmax())]
    found = vlm_fix.inspect(model, inputs, answer, saliency=False, rollout=False, causal=0, noise=6.0).effects
    assert found.clean == pytest.approx(float(p[0][answer[0]]), rel=1e-3)
    assert found.noised == pytest.approx(float(p[1][answer[0]]), rel=1e-3)


def test_the_page_shows_words_as_they_are(model, family):
    found = vlm_fix.inspect(model, single(family, [1], 0), ANSWER[:1], saliency=False, rollout=False)
    names = {i: "'s <b" for i in range(96)}
    text = "".join(page.lens(found, names, [page.shown("'s <b")]))
    assert text.count("&#x27;s &lt;b") > 2 and "&amp;" not in text
