"""Rows of a prompt that a method looks at in advance are run again only where it changes them: rows counted, not timed."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references.base import decoder
from tests.support.run import error, greedy
from vlm_fix.attention import along, preview
from vlm_fix.families.compat import CACHE
from vlm_fix.methods.attention import sinks

GIFT = "gift:alpha=3,source_layer=2,layers=1"
VAR = "var:detector=secondary,life=0|5,min_visual_mass=0,rho=0,p=0.9,layers=1-"
ACT = "act:sinks=secondary,life={},beta=0.1,layers=1-"


@pytest.fixture(autouse=True)
def lower_cosine(monkeypatch):
    monkeypatch.setattr(sinks, "COSINE", 0.2)  # random weights have no sinks


def rows_run(model, spec, inputs, **options):
    """Rows that each layer's queries were made of until the first token, and what `greedy` gives."""
    layers, rows = decoder(model).layers, []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o, i=i: rows.append((i, o.shape[1])))
        for i, layer in enumerate(layers)
    ]
    try:
        with vlm_fix.wrapped(model, spec):
            model.generate(**inputs, max_new_tokens=1, do_sample=False, **options)
            counted = [sum(n for at, n in rows if at == i) for i in range(len(layers))]
            return counted, greedy(model, inputs, 4, suppress_tokens=[IMAGE])
    finally:
        for hook in hooks:
            hook.remove()


def sizes(inputs):
    """The prompt's length and its rows after the image."""
    ids = inputs["input_ids"][0]
    return len(ids), len(ids) - 1 - int((ids == IMAGE).nonzero().max())


def agree(model, spec, inputs, monkeypatch):
    """-> rows of each layer, and these without the way that is tested, which must give the same answer."""
    rows, ours = rows_run(model, spec, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(preview, "goes_on", lambda *a: False)
        twice, theirs = rows_run(model, spec, inputs)
    assert torch.equal(ours[0], theirs[0]) and error(ours[1], theirs[1]) < 1e-5
    return rows, twice


@pytest.mark.parametrize("more", ["", "+pai"])
def test_gift_runs_the_last_row_twice(family, model, more, monkeypatch):
    inputs = single(family, [1], 0)
    n, _ = sizes(inputs)
    rows, twice = agree(model, GIFT + more, inputs, monkeypatch)
    assert rows == [n + 1] * 4 and twice == [2 * n] * 3 + [n]


def test_var_runs_the_rows_after_the_image_twice(family, model, monkeypatch):
    inputs = single(family, [1], 0)
    n, after = sizes(inputs)
    rows, twice = agree(model, VAR, inputs, monkeypatch)
    assert rows == [n + after] * 4 and twice == [2 * n] * 4


@pytest.mark.parametrize("life", ["1|4", "90|91"])
def test_act_runs_the_rows_from_the_first_sink_on_twice(family, model, life, monkeypatch):
    inputs, found = single(family, [1], 0), []
    n, _ = sizes(inputs)
    secondary = sinks.secondary
    monkeypatch.setattr(sinks, "secondary", lambda *a: found.append(secondary(*a)) or found[-1])
    rows, twice = agree(model, ACT.format(life), inputs, monkeypatch)
    seen = found[0][1:-1].flatten(0, 1).any(dim=0).nonzero()
    first = int(seen[0]) if len(seen) else n - 1  # without any, the last row alone
    assert (len(seen) > 0) == (life == "1|4") and first > 0
    assert rows == [n + n - first] * 4 and twice == [2 * n] * 4


def test_a_sink_in_the_first_column_leaves_nothing_to_go_on_from(family, model, monkeypatch):
    inputs = single(family, [1], 0)
    monkeypatch.setattr(sinks, "secondary", lambda alive, limits: torch.ones_like(alive))
    rows, twice = agree(model, ACT.format("1|4"), inputs, monkeypatch)
    assert rows == twice == [2 * sizes(inputs)[0]] * 4


@pytest.mark.parametrize("more", ["vhr:prompt_rows=all", "deco", "static"])
def test_rows_that_something_else_needs_are_run_again(family, model, more):
    """Another method changes them, reads all layers' states, or the cache cannot be cut: the pass stays apart."""
    inputs = single(family, [1], 0)
    n, _ = sizes(inputs)
    options = {"cache_implementation": "static"} if more == "static" else {}
    spec = {"static": GIFT, "deco": f"{GIFT}+deco", "vhr:prompt_rows=all": f"{GIFT}+{more}"}[more]
    assert rows_run(model, spec, inputs, **options)[0][1] >= 2 * n


def test_batches_and_all_rows_of_the_output(family, model, monkeypatch):
    """Padded rows with an image each; a row without one keeps the plain model's answer to the bit, so nothing is shared."""
    padded, mixed = make_inputs(family, [1, 2]), make_inputs(family, [0, 1])
    rows, twice = agree(model, GIFT, padded, monkeypatch)
    assert rows[0] == padded["input_ids"].shape[1] + 1 < twice[0]
    assert rows_run(model, GIFT, mixed)[0][0] == 2 * mixed["input_ids"].shape[1]
    with vlm_fix.wrapped(model, GIFT):
        out = model.generate(
            **padded, max_new_tokens=1, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        assert all(x.shape[1] == padded["input_ids"].shape[1] for x in out.hidden_states[0])


@pytest.mark.parametrize("more", ["", "+pai"])
def test_vhrs_text_only_rows_run_along_with_the_prompt(family, model, more, monkeypatch):
    """The prompt and, in the same forward, what follows the image once more; the cache keeps nothing of it."""
    inputs = single(family, [1], 0)
    n, after = sizes(inputs)
    spec = f"vhr:layers=0-{more}"
    rows, ours = rows_run(model, spec, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(along, "goes_on", lambda *a: False)
        apart, theirs = rows_run(model, spec, inputs)
    assert torch.equal(ours[0], theirs[0]) and error(ours[1], theirs[1]) < 1e-5
    text = n - int((inputs["input_ids"] == IMAGE).sum())
    assert rows == [n + after] * 4 and apart == [n + text] * 4 and 0 < after < text
    with vlm_fix.wrapped(model, spec):
        for options, beams in (({}, 1), ({"num_beams": 3, "do_sample": False}, 3)):
            out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, **options)
            assert out[CACHE].get_seq_length() == n + 1 and len(out[CACHE].layers[0].keys) == beams


def test_vhr_runs_apart_where_rows_cannot_run_along(family, model):
    """A padded batch; a static cache; rows before the image that are changed; a bare forward."""
    inputs = single(family, [1], 0)
    n, after = sizes(inputs)
    text = n - int((inputs["input_ids"] == IMAGE).sum())
    padded = make_inputs(family, [1, 2])
    assert rows_run(model, "vhr", padded)[0][0] > padded["input_ids"].shape[1] + after
    assert rows_run(model, "vhr:prompt_rows=all", inputs)[0][0] == n + text
    assert rows_run(model, "vhr", inputs, cache_implementation="static")[0][0] == n + text
    with vlm_fix.wrapped(model, "vhr"), torch.no_grad():
        assert model(**inputs).logits.shape[1] == n


def test_a_prompt_that_begins_with_its_image_shares_nothing(family, model, monkeypatch):
    whole = single(family, [1], 0)
    first = int((whole["input_ids"][0] == IMAGE).nonzero()[0])
    inputs = {k: x[:, first:] if x.shape[:2] == whole["input_ids"].shape else x for k, x in whole.items()}
    rows, ours = rows_run(model, "vhr", inputs)
    monkeypatch.setattr(along, "goes_on", lambda *a: False)
    apart, theirs = rows_run(model, "vhr", inputs)
    assert rows == apart and error(ours[1], theirs[1]) < 1e-5


def test_vhr_runs_beams_and_equal_prompts_along(family, model, monkeypatch):
    one, other = single(family, [1], 0), single(family, [1], 0, seed=5)
    n, after = sizes(one)
    pair = {k: torch.cat([one[k], other[k]]) for k in one}
    rows, ours = rows_run(model, "vhr", pair)
    assert rows[0] == n + after
    for i, inputs in enumerate((one, other)):
        assert error(ours[1][i], rows_run(model, "vhr", inputs)[1][1][0]) < 1e-5
    beams = []
    for works in (along.goes_on, lambda *a: False):
        monkeypatch.setattr(along, "goes_on", works)
        with vlm_fix.wrapped(model, "vhr"):
            beams.append(model.generate(**pair, max_new_tokens=5, num_beams=3, do_sample=False))
    assert torch.equal(*beams)
