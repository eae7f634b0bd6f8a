"""Attention methods: values that are refused, and defaults that fit every depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import vlm_fix
from tests.support.models import BUILD, single
from tests.support.run import greedy


def test_heads_layers_and_factors_that_do_not_fit_are_refused(model):
    for spec, message in {
        "zerotuning:head_indices=0|9": "heads 0 to 3",
        "gift:source_layer=7": "layers 0 to 3",
        "vaf:enhance=-1": "at least 0",
        "ad_hh": "head_list",
        "ad_hh:head_list=1.4": "layer.head",
        "ad_hh:head_list=3": "layer.head",
    }.items():
        with pytest.raises(vlm_fix.VlmFixError, match=message):
            vlm_fix.wrap(model, spec)


@pytest.mark.parametrize("depth", [1, 2, 3, 28, 32, 40])
def test_defaults_of_column_and_score_edits_fit_every_depth(depth):
    for build in BUILD.values():
        arch = replace(vlm_fix.families.arch_of(build()), depth=depth, attention=tuple(range(depth)))
        for name in ("zerotuning", "vaf", "avar", "locore", "hgai", "gift", "spin"):
            resolved: Any = vlm_fix.parse_spec(name).resolve(arch)
            assert resolved.layers and set(resolved.layers) <= set(range(depth))
            assert not resolved.neutral
            assert vlm_fix.parse_spec(resolved.spec()) == replace(resolved, layers="|".join(map(str, resolved.layers)))


def test_values_of_act_and_paint_that_do_not_fit_are_refused(models):
    for spec, message in {
        "act:head_list=9.0": "layer.head",
        "act:head_list=1": "layer.head",
        "paint:local_layer=9": "full-attention layer",
        "paint:alpha=-1": "at least 0",
        "act:sinks=none": "mass, secondary",
    }.items():
        with pytest.raises(vlm_fix.VlmFixError, match=message):
            vlm_fix.wrap(models["llava"], spec)
    with (
        vlm_fix.wrapped(models["llava"], "act:sinks=secondary,life=3"),
        pytest.raises(vlm_fix.VlmFixError, match="two numbers"),
    ):
        greedy(models["llava"], single("llava", [1], 0))


@pytest.mark.parametrize("depth", [1, 2, 3, 28, 32, 40])
def test_defaults_of_tame_act_and_paint_fit_every_depth(models, depth):
    for model in models.values():
        arch = replace(vlm_fix.families.arch_of(model), depth=depth, attention=tuple(range(depth)))
        for name in ("tame", "act", "paint"):
            resolved = vlm_fix.parse_spec(name).resolve(arch)
            assert resolved.layers and set(resolved.layers) <= set(range(depth)) and not resolved.neutral
            assert vlm_fix.parse_spec(resolved.spec()) == replace(resolved, layers="|".join(map(str, resolved.layers)))
