"""Calibration: the file, what wrap takes from it, and what `calibrate` finds."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_inputs, single

import vlm_fix
from vlm_fix.calibration import Calibration, Sample, answer_scores, sizes
from vlm_fix.families import arch_of


def labelled(family, images=(1, 2, 1), seed=0, **kw):
    """One Sample a row of make_inputs."""
    return [Sample(single(family, list(images), row, seed, **kw), 5 + row, 9 + row) for row in range(len(images))]


def written(path, model, method="zerotuning", **found):
    Calibration(method, found, {"name": "tiny", **sizes(arch_of(model))}).write(path)
    return path


def test_answer_scores_are_those_of_single_prompts(family, model):
    samples = labelled(family)
    together = answer_scores(model, samples)
    for i, s in enumerate(samples):
        with torch.no_grad():
            alone = model(**s.inputs).logits[0, -1]
        assert torch.allclose(together[i], alone[[s.target, s.other]], atol=1e-5)
    with vlm_fix.wrapped(model, "vcd:beta=0.5"):  # a contrast acts in generate, so its scores must show here
        assert not torch.allclose(answer_scores(model, samples), together, atol=1e-3)


def test_calibrated_values_fill_what_is_left_at_default(family, model, tmp_path):
    file = written(tmp_path / "z.json", model, rate=0.3, head_indices=[0, 2])
    vlm_fix.wrap(model, ["zerotuning", "vhr"], calibration=file)
    (method,) = (m for m in model.__dict__["_vlm_fix_engine"].active if m.name == "zerotuning")
    assert (method.rate, method.head_indices) == (0.3, (0, 2))
    vlm_fix.unwrap(model)
    with vlm_fix.wrapped(model, "zerotuning:rate=0.8", calibration=[file]):
        assert model.__dict__["_vlm_fix_engine"].active[0].rate == 0.8
        assert model.__dict__["_vlm_fix_engine"].active[0].head_indices == (0, 2)
        calibrated = model.generate(**make_inputs(family, [1]), max_new_tokens=4, output_logits=True, **PLAIN).logits
    with vlm_fix.wrapped(model, "zerotuning:rate=0.8,head_indices=0|2"):
        spelled = model.generate(**make_inputs(family, [1]), max_new_tokens=4, output_logits=True, **PLAIN).logits
    assert all(torch.equal(a, b) for a, b in zip(calibrated, spelled, strict=True))


PLAIN = {"do_sample": False, "return_dict_in_generate": True}


def test_file_comes_back_as_it_was(models, tmp_path):
    c = Calibration("pai", {"alpha": 0.5}, {"name": "m"}, "command", 3, {"a": 1}, {"after": 0.5}, {"torch": "2"}, "now")
    c.write(tmp_path / "new" / "c.json")
    assert Calibration.read(tmp_path / "new" / "c.json") == c
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "cannot be read; make it with `vlm-fix calibrate"),
        ("{", "no JSON"),
        ("[]", "needs method, found and model"),
        ('{"method": "pai", "found": {}}', "needs method, found and model"),
        ('{"method": "pai", "found": 3, "model": {}}', "needs method, found and model"),
        ('{"method": "pai", "found": {}, "model": {}, "alpha": 3}', "needs method, found and model"),
    ],
)
def test_bad_files(models, tmp_path, content, sentence):
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(vlm_fix.VlmFixError, match=sentence):
        vlm_fix.wrap(models["llava"], "pai", calibration=file)
    assert "_vlm_fix_engine" not in models["llava"].__dict__


def test_files_that_do_not_fit(models, tmp_path):
    model, file = models["llava"], written(tmp_path / "z.json", models["llava"], rate=0.3)

    def refused(spec, calibration, sentence):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(model, spec, calibration=calibration)

    refused("pai", file, "calibration of zerotuning fits none of pai; leave the file out or add zerotuning")
    refused("zerotuning", [file, file], "two calibration files of zerotuning")
    refused("zerotuning", written(tmp_path / "a.json", model, speed=1), "holds speed, which zerotuning does not take")
    refused("zerotuning", written(tmp_path / "b.json", model, rate=-1), "must be a number at least")
    refused(
        "zerotuning", written(tmp_path / "c.json", models["qwen2_5_vl"], rate=0.3), "type qwen2_5_vl, but this model"
    )
    content = json.loads(file.read_text())
    content["model"]["depth"] = 32
    file.write_text(json.dumps(content))
    refused("zerotuning", file, "with depth 32, but this model has depth 4; run `vlm-fix calibrate zerotuning`")


def test_a_method_without_anything_to_find_says_so(models):
    with pytest.raises(vlm_fix.VlmFixError, match="vcd has nothing to find; search a strength with --search"):
        vlm_fix.parse_spec("vcd").calibrate(models["llava"], labelled("llava"), 0, lambda *_: None)
