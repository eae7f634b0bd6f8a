"""The matrix: every attention and hidden-state method x family x precision against its float64 reference in `edits`.

A cell is one greedy run of a left-padded batch, prompt and 8 steps, each row of it against the reference on that prompt
alone. The rows are those of `CASES` in tests/support/cases.py.
"""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.cases import ALL, CASES, ROWS, SPECS
from tests.support.matrix import COSINE, FAMILIES, LIMIT, REFUSED, check, pair, prompts
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import attention as edits
from tests.support.run import OPTIONS, greedy, works
from vlm_fix.attention import kernel
from vlm_fix.methods.attention import sinks


def test_every_method_has_a_row():
    kinds, elsewhere = ("attention", "heads", "hidden"), {"pine"}  # orders several images: test_pine.py
    controls = {m.name for m in vlm_fix.list_methods() if m.kind == "control"}
    there = {spec.partition(":")[0] for spec in ROWS} - controls
    assert {m.name for m in vlm_fix.list_methods() if m.kind in kinds} - elsewhere == there


CELLS = [(family, dtype) for family in FAMILIES for dtype in LIMIT] + [("video", torch.float32)]


@pytest.mark.parametrize(
    ("family", "dtype"), CELLS, ids=[f"{f}-{'bf16' if '16' in str(d) else 'fp32'}" for f, d in CELLS]
)
@pytest.mark.parametrize("spec", ROWS)
def test_equals_reference(spec, family, dtype, monkeypatch, record_property):
    monkeypatch.setattr(sinks, "COSINE", COSINE[family])
    model, _ = pair(family, dtype)
    message = REFUSED.get((family, spec.partition(":")[0]))
    if message and (spec != "cca:mask=false" or family == "video"):
        with pytest.raises(vlm_fix.VlmFixError, match=message), vlm_fix.wrapped(model, spec):
            greedy(model, prompts(family, dtype)[0], 1)
        return
    check(spec, ROWS[spec], family, dtype, monkeypatch, record_property)


# ---- stacks: scores are edited in the order listed, then columns get their log-weights, then weights and heads --------

AD_HH = next(spec for spec in ROWS if spec.startswith("ad_hh"))
STACKS = [
    ["zerotuning:rate=0.1", "tame:gamma=0.4"],
    ["zerotuning:rate=9,head_indices=0|3,layers=1-2", "vaf:enhance=2,suppress=0.5,layers=0-"],
    ["locore:beta=2,window=3", "tame:gamma=0.4", "avar:visual=1.8,system=0.4"],
    ["pai:alpha=0.7,layers=1-", "hgai:alpha=1,layers=0-"],
    ["hgai:alpha=1,layers=0-", "pai:alpha=0.7,layers=1-"],
    [AD_HH, "zerotuning:rate=0.1", "spin:keep=0.8,epsilon=0.1,layers=0-"],
    ["gift:alpha=3,source_layer=1,layers=2-3", "zerotuning:rate=0.1"],
    ["vhr:layers=0-", "var:tau=2,min_visual_mass=0.1,rho=0.2,p=0.9,layers=0-", "pai:alpha=0.7,layers=1-"],
]


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_stack_equals_reference(stack, family, dtype, monkeypatch, record_property):
    def make(p):
        return edits.Chain(**p.at, layers=[*ALL], runs=[ROWS[spec](p) for spec in stack])

    check(stack, make, family, dtype, monkeypatch, record_property)


def test_the_order_of_score_edits_matters():
    """Else the two stacks of PAI and HGAI above prove nothing."""
    model, _ = pair("llava", torch.float32)
    logits = []
    for stack in (STACKS[3], STACKS[4]):
        with vlm_fix.wrapped(model, stack):
            logits.append(greedy(model, prompts("llava", torch.float32)[0], 1)[1])
    assert float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()) > 1e-2


def test_sinks_without_given_lives_take_the_limits_of_the_depth(monkeypatch):
    """Without `life`, a tiny model of 4 layers takes 4 and 9 of 24 layers in proportion."""
    monkeypatch.setattr(sinks, "COSINE", COSINE["llava"])
    model, (batch, _), logits = pair("llava", torch.float32)[0], prompts("llava", torch.float32), []
    for life in ("", f",life={4 / 24 * 4}|{9 / 24 * 4}", ",life=1|4"):
        with vlm_fix.wrapped(model, f"act:sinks=secondary,beta=0.1,layers=0-{life}"):
            logits.append(greedy(model, batch, 1)[1])
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_layers_that_choose_must_be_edited(models):
    with pytest.raises(vlm_fix.VlmFixError, match="choosers='1' must be among its layers"):
        vlm_fix.wrap(models["llava"], "visual_topk:choosers=1,layers=2-3")


# ---- every decoding mode -----------------------------------------------------------------------------------------------

WHOLE = (
    "tame",
    "act",
    "cca",
    "var:detector=secondary",
    "vhr:prompt_rows=all",
    "memvr:ratio=0.9,threshold=0.75,layers=0-2",
)  # they need the whole prompt in one forward


@pytest.mark.parametrize("spec", [spec for spec in ROWS if spec not in SPECS])  # those are in the contracts
def test_beams_static_caches_chunks_and_drafts_agree_or_are_refused(family, model, spec, monkeypatch):
    monkeypatch.setattr(sinks, "COSINE", COSINE[family])
    one, batch = single(family, [1, 2], 1), make_inputs(family, [1, 2])
    with vlm_fix.wrapped(model, spec):
        plain = model.generate(**one, max_new_tokens=6, do_sample=False)
        for i, option in enumerate(OPTIONS):
            if not works(family, i):
                continue
            if "prefill_chunk_size" in option and spec.startswith(WHOLE):
                with pytest.raises(vlm_fix.VlmFixError, match="whole prompt in one forward"):
                    model.generate(**one, max_new_tokens=6, do_sample=False, **option)
                continue
            assert torch.equal(model.generate(**one, max_new_tokens=6, do_sample=False, **option), plain), option
        sentence = CASES[spec.partition(":")[0]].refuses.get("num_beams")
        if sentence:
            with pytest.raises(vlm_fix.VlmFixError, match=sentence):
                model.generate(**one, max_new_tokens=5, num_beams=3, do_sample=False)
        else:
            beams = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)[1, -5:]
            alone = model.generate(**one, max_new_tokens=5, num_beams=3, do_sample=False)[0, -5:]
            assert torch.equal(alone, beams)
        # a prompt that was run before, beside others, gives the same again
        assert torch.equal(model.generate(**one, max_new_tokens=6, do_sample=False), plain)


@pytest.mark.parametrize("spec", ROWS)
def test_rows_scored_one_at_a_time_give_the_logits_of_one_chunk(family, model, spec, monkeypatch):
    """Score memory for one row at a time gives the logits of one chunk, for prompts and for drafts of several rows."""
    monkeypatch.setattr(sinks, "COSINE", COSINE[family])
    batch, one = make_inputs(family, [1, 2]), single(family, [1], 0)
    one["input_ids"] = torch.cat([one["input_ids"], one["input_ids"][:, -3:]], dim=1)  # repeats itself: drafts at once
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    if "mm_token_type_ids" in one:
        one["mm_token_type_ids"] = (one["input_ids"] == IMAGE).int()

    def drafted():
        return model.generate(**one, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=4)

    with vlm_fix.wrapped(model, spec):
        whole, drafts = greedy(model, batch, 3), drafted()
        monkeypatch.setattr(kernel, "CHUNK_BYTES", 1)
        rows = greedy(model, batch, 3)
        assert torch.equal(whole[0], rows[0]) and torch.allclose(whole[1], rows[1], atol=2e-5)
        assert torch.equal(drafted(), drafts)


@pytest.mark.parametrize("spec", ROWS)
def test_row_without_image_is_left_alone_by_edits_of_the_image(family, model, spec, monkeypatch):
    """Edits of the image leave a row without one alone; edits that need no image work on it."""
    monkeypatch.setattr(sinks, "COSINE", COSINE[family])
    inputs = make_inputs(family, [1, 0])
    plain = greedy(model, inputs, 3)[1]
    with vlm_fix.wrapped(model, spec):
        got = greedy(model, inputs, 3)[1]
    assert not torch.equal(got[0], plain[0])
    if not spec.startswith("cca"):  # its mask is made by hand, which moves rounding
        assert torch.equal(got[1], plain[1]) == vlm_fix.parse_spec(spec).needs_image
