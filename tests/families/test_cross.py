"""Mllama reads images in layers of their own: what has a meaning there works, the rest is refused by name.

And Llama 4, which transformers 5.24.0 cannot run: the tests lend it what it lacks (`families.build`).
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import transformers

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix.families import arch_of
from vlm_fix.families.compat import cannot_run

RATES = "iri:rr_attention=0.9|0.2|0.7|0.6,rr_mlp=0.8|0.9|0.3|0.6,sources=2,targets=2"
WORK = [
    "vcd:beta=0.01,noise_step=900",
    "m3id",
    "icd:tokens=11|12|13,beta=0.01",
    "dola:layers=0|1|2",
    "deco",
    RATES,
    "vista:lam=0.4",
    "zerotuning:rate=0.2",
    "decore:head_list=0.0|2.1",
]
REFUSED = ["pai", "vhr", "vaf", "hgai", "sid", "fastv", "knorm", "hiprune", "random_heads", "hulluedit", "memvr"]
IMAGES = [1, 2, 1]


@pytest.fixture
def model():
    built = mllama()
    yield built
    vlm_fix.unwrap(built)


@functools.cache
def mllama():
    return families.build("mllama")


@pytest.mark.parametrize("spec", WORK)
def test_methods_that_need_no_image_columns(model, spec):
    """They change the answer; each row of a batch answers as it does alone; nothing stays behind."""
    batch = families.prompt("mllama", IMAGES)
    plain = greedy(model, batch, 4, suppress_tokens=[IMAGE])
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, batch, 4, suppress_tokens=[IMAGE])
        change = (scores - plain[2])[torch.isfinite(scores) & torch.isfinite(plain[2])].abs().max()
        assert float(change) > 1e-3
        for row in range(3):
            t, _, s = greedy(model, families.prompt("mllama", IMAGES, rows=[row]), 4, suppress_tokens=[IMAGE])
            finite = torch.isfinite(s[0])
            assert torch.equal(t[0], tokens[row]) and torch.equal(finite, torch.isfinite(scores[row]))
            assert float((s[0] - scores[row])[finite].abs().max()) < 2e-4
    assert torch.equal(greedy(model, batch, 4, suppress_tokens=[IMAGE])[1], plain[1])


@pytest.mark.parametrize("spec", REFUSED)
def test_methods_on_image_columns_are_refused_by_name(model, spec):
    with pytest.raises(
        vlm_fix.VlmFixError, match=f"^{spec} works on the columns of the language model that show the image"
    ):
        vlm_fix.wrap(model, spec)
    with pytest.raises(vlm_fix.VlmFixError, match="observe works on the columns"):
        vlm_fix.observe(model, families.prompt("mllama", [1]))
    assert "generate" not in vars(model)


@torch.no_grad()
def test_m3id_equals_two_plain_forwards(model):
    """log p + (e^(decay t) - 1) (log p - log p_text), the text a prompt without its image: two whole passes in float64."""
    inputs, steps, decay = families.prompt("mllama", [1, 2], rows=[1]), 3, 0.5
    with vlm_fix.wrapped(model, f"m3id:decay={decay},beta=0"):
        tokens, _, scores = greedy(model, inputs, steps)
        assert model.generate(**inputs, max_new_tokens=3, num_beams=3, do_sample=False).shape[0] == 1
    twin, keep, mask = ref.float64(model), inputs["input_ids"][0] != IMAGE, inputs["cross_attention_mask"]
    for t in range(steps):
        ids = torch.cat([inputs["input_ids"], tokens[:, :t]], 1)
        text = torch.cat([inputs["input_ids"][:, keep], tokens[:, :t]], 1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole["pixel_values"] = inputs["pixel_values"].double()
        whole["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, t, -1, -1)], 1)
        l, other = (twin(**x, use_cache=False).logits[:, -1].log_softmax(-1) for x in (whole, {"input_ids": text}))
        expected = l + (math.exp(decay * (t + 1)) - 1) * (l - other)
        assert error(scores[:, t].log_softmax(-1), expected.log_softmax(-1)) < 1e-5


def test_text_alone(model):
    """Its image layers are left out then; an edit that reads their input gets what the layer before has made."""
    inputs = families.prompt("mllama", [0])
    plain = greedy(model, inputs, 3)[2]
    with vlm_fix.wrapped(model, "dola:layers=1|3"):
        seen = greedy(model, inputs, 3)[2]
    assert bool((seen != plain).any())


def test_an_older_or_mended_transformers_runs_llama4(monkeypatch):
    model, output = families.build("llama4"), transformers.modeling_outputs.MoeCausalLMOutputWithPast
    assert not cannot_run(model) and arch_of(model).attention == (0, 1, 2, 3)
    if "image_outputs" in getattr(output, "__dataclass_fields__", {}):
        pytest.skip("this transformers runs it")
    monkeypatch.delattr(output, "image_outputs")
    with pytest.raises(
        vlm_fix.VlmFixError, match="this transformers cannot run Llama4ForConditionalGeneration, wrapped or not"
    ):
        vlm_fix.wrap(model, "pai")
