"""Methods that choose heads: VHR's pass, known heads, calibrated heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import vlm_fix
from tests.support.models import BUILD, IMAGE, make_inputs, single


def test_vhr_runs_one_text_only_pass_a_call(family, model, monkeypatch):
    """Once per generate, however many tokens and beams, and with the image tokens gone."""
    from vlm_fix.engine import Engine

    seen, observe = [], Engine.run_prompt
    monkeypatch.setattr(
        Engine,
        "run_prompt",
        lambda self, inputs, *rest, **more: (seen.append(inputs), observe(self, inputs, *rest, **more)),
    )
    with vlm_fix.wrapped(model, "vhr"):
        for options in ({}, {"num_beams": 3}):
            model.generate(**make_inputs(family, [1, 2]), max_new_tokens=4, do_sample=False, **options)
    assert len(seen) == 2 and not any((i["input_ids"] == IMAGE).any() for i in seen)


def test_known_heads_are_those_of_llava():
    arch = replace(
        vlm_fix.families.arch_of(BUILD["llava"]()), depth=32, heads=32, vocab=32064, attention=tuple(range(32))
    )
    method: Any = vlm_fix.parse_spec("ad_hh").resolve(arch)
    assert len(set(method.head_list)) == 20 and method.layers[0] == 13 and method.layers[-1] == 31
    other: Any = vlm_fix.parse_spec("ad_hh").resolve(replace(arch, depth=40, heads=40, attention=tuple(range(40))))
    assert len(set(other.head_list)) == 35 and other.layers[0] == 0


def test_act_calibrates_heads(model, family):
    """The sweep keeps the heads that, alone, answer more samples right: here against the sweep by hand."""
    from vlm_fix.calibration.search import answer_scores
    from vlm_fix.sample import Sample

    samples = [
        Sample(single(family, [1, 1], row, seed=seed), 5 + seed, 40 + seed) for seed in range(4) for row in (0, 1)
    ]
    seen, spec = [], "act:threshold=0.03,beta=0,layers=1-2"
    found = vlm_fix.parse_spec(spec).calibrate(model, samples, 0, lambda what, share: seen.append(what))["head_list"]
    before, better = int((answer_scores(model, samples).diff(dim=1) < 0).sum()), []
    for name in [f"{layer}.{head}" for layer in (1, 2) for head in range(4)]:
        with vlm_fix.wrapped(model, f"{spec},head_list={name}"):
            better += [name] if int((answer_scores(model, samples).diff(dim=1) < 0).sum()) > before else []
    assert found == tuple(better) and len(seen) == 8
