"""Softly capped scores (PaliGemma 2): the row kernel and flex_attention against float64 with whole matrices."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from transformers.models.gemma2 import modeling_gemma2

import vlm_fix
from tests.support import families
from tests.support.families import prompt
from tests.support.models import IMAGE
from tests.support.run import error, greedy
from vlm_fix.attention import AttentionPath, AttentionWing, flex
from vlm_fix.attention.edits import ColumnFactors
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.kernel import Scores, edited_rows


@pytest.fixture(scope="module")
def model():
    model = families.build("paligemma2")
    model.set_attn_implementation(
        {"text_config": "eager"}
    )  # transformers before 5.18 starts it on SDPA, without the cap
    return model


def pai(z, visual, last):
    return torch.where(visual & last, z + 0.5 * z.abs(), z)


def zerotuning(z, visual, last):
    z = z.clone()
    z[..., 0] += math.log(0.2)
    return z


EDITS = {"pai:alpha=0.5,layers=0-": pai, "zerotuning:rate=0.2,layers=0-": zerotuning}


def expected(model, inputs, tokens, edit, monkeypatch):
    """Logits of every step from one float64 forward over whole matrices, the cap written out."""
    full = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
    length, visual = inputs["input_ids"].shape[1], full == IMAGE
    last = (torch.arange(full.shape[1]) >= length - 1)[:, None]

    def attention(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        z = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scaling
        z = softcap * torch.tanh(z / softcap)
        z = z if edit is None else edit(z, visual[:, None, None], last)
        a = (z + mask).softmax(dim=-1)
        return (a @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)).transpose(1, 2), None

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", attention)
    twin = copy.deepcopy(model).double()
    suffix = (torch.arange(full.shape[1]) >= length).long()[None]  # causal, after a prompt that sees itself whole
    more = {**inputs, "input_ids": full, "attention_mask": torch.ones_like(full), "token_type_ids": suffix}
    more["pixel_values"] = more["pixel_values"].double()
    with torch.no_grad():
        return twin(**more, use_cache=False).logits[0, length - 1 :]


@pytest.mark.parametrize("path", ["auto", "flex"])
@pytest.mark.parametrize("spec", EDITS)
def test_capped_scores_equal_reference(model, spec, path, monkeypatch):
    """Prefill and 8 steps, with windows shorter than the prompt; a batch equals its rows; afterwards it is eager again."""
    monkeypatch.setattr(AttentionWing, "path", AttentionPath(path))
    before, inputs = model.config.text_config._attn_implementation, prompt("paligemma2", [1, 2], rows=[1])
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, suppress_tokens=[IMAGE])
        both, scores, _ = greedy(model, prompt("paligemma2", [1, 2]), suppress_tokens=[IMAGE])
    assert before == model.config.text_config._attn_implementation == "eager"
    assert torch.equal(both[1], tokens[0]) and float((scores[1] - logits[0]).abs().max()) < 1e-4
    plain = expected(model, inputs, tokens, None, monkeypatch)
    wanted = expected(model, inputs, tokens, EDITS[spec], monkeypatch)
    assert error(plain, wanted) > 1e-3 and error(logits[0], wanted) < 1e-5


@pytest.mark.parametrize("spec", ["tame", "act:threshold=0.02", "vhr:layers=0-", ["zerotuning:rate=0.2", "tame"]])
def test_paths_agree(model, spec, monkeypatch):
    inputs, seen = prompt("paligemma2", [1, 2]), []
    for path in ("kernel", "flex"):
        monkeypatch.setattr(AttentionWing, "path", AttentionPath(path))
        with vlm_fix.wrapped(model, spec):
            seen.append(greedy(model, inputs, 4, suppress_tokens=[IMAGE])[1])
    assert float((seen[0] - seen[1]).abs().max()) < 1e-4


def test_observe_sees_capped_weights(model):
    """Attention on the image and the question's, from the model's own eager weights."""
    inputs = prompt("paligemma2", [1])
    seen = vlm_fix.observe(model, inputs)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True, use_cache=False).attentions
    mass = torch.stack([a[0, :, -1][:, inputs["input_ids"][0] == IMAGE].sum(dim=-1) for a in weights])
    assert torch.allclose(seen.visual_mass[:, :, 0], mass, atol=1e-6)


def test_sdpa_is_refused(model):
    """Where transformers lets such a model run on SDPA, it drops the cap."""
    model.config.text_config._attn_implementation = "sdpa"
    try:
        with pytest.raises(vlm_fix.VlmFixError, match=r'call model.set_attn_implementation\("eager"\) first'):
            vlm_fix.wrap(model, "pai")
    finally:
        model.config.text_config._attn_implementation = "eager"
    assert "generate" not in model.__dict__


def arguments(cap):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 40, 16, generator=g) for n in (4, 2, 2))
    allowed = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40).clone()
    allowed[0, :, :, :5] = False  # padding: its rows see nothing
    column, row = torch.rand(2, 2, 40, generator=g)
    forms = [
        ColumnFactors(scale=column[:, None, None], row_factor=row[:, None, :, None]),
        ColumnFactors(bias=torch.randn(2, 1, 1, 40, generator=g), heads=torch.tensor([1.0, 0, 0, 1])),
    ]
    return q, k, v, allowed, Scores(0.3, cap), forms


@functools.cache
def compiled_flex_error():
    """How far torch's own compiled flex_attention is from the uncompiled one on plain causal attention.

    Without AVX-512, torch 2.13 is off by 0 to 2 for the same input, so that one right answer proves nothing.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return 2.0
    q, k, v, *_ = arguments(None)
    causal = flex.block_mask(q, k, torch.ones(1, 1, 40, 40, dtype=torch.bool).tril())
    runs = (flex.flex_attention, torch.compile(flex.flex_attention, fullgraph=True))
    with torch.no_grad():
        one, two = (run(q, k, v, None, causal, enable_gqa=True) for run in runs)
    return float((one - two).abs().max())


def test_cpu_never_compiles_flex(monkeypatch):
    """torch 2.13 compiles it wrongly for processors without AVX-512."""
    monkeypatch.setattr(flex, "_compiled", lambda: pytest.fail("flex_attention was compiled on a CPU"))
    q, k, v, allowed, scores, forms = arguments(1.5)
    flex.flex_rows(QueryRows(q, k, v, allowed, scores), flex.block_mask(q, k, allowed), forms)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flex_equals_the_formula(cap, compiled, monkeypatch):
    """All that a form holds, padding included; compiled, flex_attention forms no matrix."""
    if compiled:
        if (wrong := compiled_flex_error()) > 1e-4:
            pytest.skip(
                f"torch {torch.__version__} compiles plain causal flex_attention wrongly here: off by up to {wrong:.2g}"
            )
        monkeypatch.setattr(flex, "flex_attention", torch.compile(flex.flex_attention, fullgraph=True))
    q, k, v, allowed, scores, forms = arguments(cap)
    z = q.double() @ k.double().repeat_interleave(2, dim=1).mT * 0.3
    z = z if cap is None else cap * torch.tanh(z / cap)
    z = z * forms[0].scale * forms[0].row_factor + forms[1].bias * forms[1].heads[:, None, None]
    a = z.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    with torch.no_grad():
        ours = flex.flex_rows(QueryRows(q, k, v, allowed, scores), flex.block_mask(q, k, allowed), forms)
        plain = flex.flex_rows(QueryRows(q, k, v, allowed, scores), flex.block_mask(q, k, allowed), [])
    torch.compiler.reset()
    assert torch.allclose(ours.double(), a @ v.double().repeat_interleave(2, dim=1), atol=1e-5)
    assert torch.allclose(plain, edited_rows(QueryRows(q, k, v, allowed, scores)), atol=1e-5)
