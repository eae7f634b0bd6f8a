"""ONLY: both distributions of every step against float64, from the whole attention matrix of its layer."""

from __future__ import annotations

import math

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references import hidden
from tests.support.run import greedy
from vlm_fix.methods.logits.only import ONLY, ONLYMemory


def second(twin, run, ids, r, layer):
    """Logits l' [V] of row r without their share of the first distribution, and the heads that write."""
    a, value = run.kept["weights"][:, r, : r + 1].clone(), run.kept["value"][: r + 1]
    heads, size = len(a), twin.config.get_text_config().hidden_size // len(a)
    value = value.view(r + 1, -1, size)
    parts = [[j for j in range(1, r + 1) if j not in run.visual], [j for j in run.visual if j <= r]]
    ratios = []
    for h in range(heads):
        entropies = []
        for part in parts:
            mean = sum(float(a[h, j]) for j in part) / len(part)
            std = math.sqrt(sum((float(a[h, j]) - mean) ** 2 for j in part) / (len(part) - 1))
            for j in part:
                if float(a[h, j]) > mean + std:
                    a[h, j] = 0
            whole = sum(float(a[h, j]) for j in part)
            entropies.append(-sum(p * math.log(p + 1e-6) for j in part for p in [float(a[h, j]) / whole]))
        ratios.append(entropies[0] / entropies[1])
    mean = sum(ratios) / heads
    assert min(abs(x - mean) for x in ratios) > 1e-6, "pick another seed: a head lies on the mean"
    writing = [h for h in range(heads) if ratios[h] >= mean]
    out = torch.zeros(heads, size, dtype=torch.float64)
    for h in writing:
        out[h] = sum(float(a[h, j]) * value[j, h * value.shape[1] // heads] for j in range(r + 1))
    language = ref.decoder(twin)
    c, last = language.layers[layer].self_attn.o_proj(out.flatten()), language.layers[-1]
    y = last.input_layernorm(c) + 0.2 * run.inputs[len(language.layers) - 1][r]
    if hasattr(last, "pre_feedforward_layernorm"):
        y = y + last.post_feedforward_layernorm(last.mlp(last.pre_feedforward_layernorm(y)))
    else:
        y = y + last.mlp(last.post_attention_layernorm(y))
    return twin.lm_head(language.norm(y)), writing


@pytest.mark.parametrize(("name", "layer", "gamma"), [("llava", 0, 0.9), ("qwen2_5_vl", 1, 0.9), ("gemma3", 1, 0.9)])
@torch.no_grad()
def test_scores_equal_the_formula(name, layer, gamma, models):
    model = models.get(name) or families.build(name)
    inputs = single(name, [1, 2], 1) if name in models else families.prompt(name, [1, 2], rows=[1])
    with vlm_fix.wrapped(model, f"only:gamma={gamma},beta=0.05,layers={layer}"):
        tokens, _, scores = greedy(model, inputs, 8, suppress_tokens=[IMAGE])
        scores = scores.log_softmax(-1)
    twin, n = ref.double(model), inputs["input_ids"].shape[1]
    run = hidden.Only(ref.visual_columns(inputs["input_ids"]), n, [layer])
    plain = run.forward(twin, inputs, tokens[0, :-1])
    sides = set()
    for t, l in enumerate(plain.log_softmax(-1)):
        text, writing = second(twin, run, inputs["input_ids"], n - 1 + t, layer)
        assert 0 < len(writing) < 4
        text = text + 0.5 * l
        distance = float((l.exp() - text.softmax(-1)).abs().sum())
        assert abs(distance - gamma) > 1e-4, "pick another gamma"
        sides.add(distance < gamma)
        z = l + 3 * text if distance < gamma else 2 * l - text
        z = z.masked_fill((l < l.max() + math.log(0.05)) | torch.isinf(l), -torch.inf)
        z[IMAGE] = -torch.inf  # the caller's own processors come last
        z = z.log_softmax(-1)
        kept = ~torch.isinf(z)
        assert torch.equal(kept, ~torch.isinf(scores[0, t]))
        assert float((scores[0, t][kept] - z[kept]).abs().max()) < 2e-4 * max(1.0, float(z[kept].abs().max()))
    assert len(sides) == 2 or name == "gemma3", "both the sum and the contrast must be seen"


def test_rows_without_an_image_keep_their_distribution(family, model):
    with vlm_fix.wrapped(model, "only:gamma=0.9"):
        _, logits, scores = greedy(model, make_inputs(family, [1, 0]), 3)
    assert torch.equal(scores[1], logits[1])
    assert not torch.allclose(scores[0].log_softmax(-1), logits[0].log_softmax(-1), atol=1e-2)


def test_values_are_let_go_when_the_layer_has_run(model, family, monkeypatch):
    left, read = [], ONLY.read_weights

    def note(self, weights, rows):
        read(self, weights, rows)
        left.append(rows.memory(ONLYMemory).value)

    monkeypatch.setattr(ONLY, "read_weights", note)
    with vlm_fix.wrapped(model, "only"):
        greedy(model, single(family, [1, 2], 1), 3)
    assert len(left) == 3 and left == [None] * 3
