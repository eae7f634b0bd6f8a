"""Settings that cannot be meant: numbers that are none, and layers where a method has no choice of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vlm_fix
from tests.support.models import single
from vlm_fix import cli

NUMBERS = [(cls, f.name) for cls in vlm_fix.list_methods() for f in dataclasses.fields(cls) if "float" in str(f.type)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=[f"{cls.name}-{name}" for cls, name in NUMBERS])
def test_no_number_is_nan_or_infinite(cls, name, value):
    with pytest.raises(vlm_fix.VlmFixError, match=f"{name}=.*must be a"):
        vlm_fix.parse_spec(f"{cls.name}:{name}={value}")


@pytest.mark.parametrize("spec", ["vcd:gate=0", "hulluedit:vcr_floor=0"])
def test_an_open_bound_is_told_as_one(spec):
    with pytest.raises(vlm_fix.VlmFixError, match="must be a number above 0 and at most 1"):
        vlm_fix.parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        *((f"hulluedit:layers={layers}", "layers has no meaning for it") for layers in ("0", "1", "0-3", "0-")),
        *((f"only:layers={layers}", "only reads the heads of one layer, not of") for layers in ("0-3", "1|2", "0-")),
    ],
)
def test_layers_that_would_do_nothing_are_refused(models, spec, sentence):
    with pytest.raises(vlm_fix.VlmFixError, match=sentence):
        vlm_fix.wrap(models["llava"], spec)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("calibrate vti:alpha_text=0,alpha_vision=0", "changes nothing, so there is nothing to find for it"),
        ("calibrate nullu:rank=0", "changes nothing, so there is nothing to find for it"),
        ("calibrate ascd:share=0", "share=0.0 must be a number above 0 and at most 1"),
        ("calibrate steer", "nothing to find; search a strength with --search, as in --search strength=0.05|0.1."),
        ("calibrate nullu --pairs nothere.jsonl", "--pairs nothere.jsonl is no file"),
        ("calibrate nullu --pairs {file}", "names images of a folder: say which with --data coco:DIR"),
        ("calibrate nullu --limit 2", "pairs of captions are too few, it takes 2; raise --limit to 12 or more"),
        ("export nullu+pai {out}", "nullu+pai is a stack; export writes one method"),
    ],
)
def test_commands_that_cannot_be_meant_are_one_sentence(command, sentence, capsys, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    assert cli.main(command.format(file=tmp_path / "pairs.jsonl", out=tmp_path / "out").split()) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "cls", [c for c in vlm_fix.list_methods() if "seed" in {f.name for f in dataclasses.fields(c)}]
)
def test_a_seed_is_one_that_torch_takes(cls):
    with pytest.raises(
        vlm_fix.VlmFixError, match=f"{cls.name}: seed=4294967296 must be a number between 0 and 4294967295"
    ):
        cls(seed=2**32)
    assert cls(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize("spec", ["random_direction", "random_subspace", "zoo_prune:keep=9"])
def test_the_largest_seed_is_taken(models, spec):
    with vlm_fix.wrapped(models["llava"], [vlm_fix.parse_spec(spec).but(seed=2**32 - 1)]) as model:
        model.generate(**single("llava", [1], 0), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    "spec",
    ["decore:alpha=0", "ad_hh:threshold=2", "razor:keep=1", "head_pursuit:factor=1", "iri:lambda_a=0,lambda_m=0"],
)
@pytest.mark.filterwarnings("ignore:.*change nothing")
def test_what_changes_nothing_needs_no_list(models, spec):
    """What a model's calibration would find is not asked for."""
    inputs = single("llava", [1], 0)
    plain = models["llava"].generate(**inputs, max_new_tokens=3, do_sample=False)
    with vlm_fix.wrapped(models["llava"], spec) as model:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("vscan:llm_keep=2.5", "llm_keep=2.5 is neither a share up to 1 nor a count"),
        ("attention_buckets:bases=0", "a rotary base is above 0, in units of the model's own, and 0 is not"),
        ("attention_buckets:bases=1.5|-1", "a rotary base is above 0, in units of the model's own, and -1 is not"),
    ],
)
def test_a_value_without_a_meaning_is_one_sentence(models, spec, sentence):
    with pytest.raises(vlm_fix.VlmFixError, match=sentence):
        vlm_fix.wrap(models["llava"], spec)
