"""What a script calls: settings by name, replace, active, register, a file's method, pipelines, evaluate, calibrate."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoProcessor, ImageTextToTextPipeline

import vlm_fix
from tests.support.models import make_inputs
from vlm_fix import LogitEdit, ScoreEdit, index, param, registry
from vlm_fix.eval.picto import model_path, scene
from vlm_fix.eval.run import loading
from vlm_fix.methods import PAI
from vlm_fix.wing import installed

BOOST = '''
from dataclasses import dataclass
from typing import ClassVar
from vlm_fix import ScoreEdit, param
@dataclass(frozen=True)
class Boost(ScoreEdit):
    """Adds a constant to image columns."""
    name: ClassVar[str] = "boost"
    bonus: float = param(2.0, "added", low=0)
    def edit_scores(self, scores, rows):
        return scores + self.bonus * rows.visual
'''


@dataclass(frozen=True)
class Halved(ScoreEdit):
    """Halves all scores."""

    name: ClassVar[str] = "halved"
    share: float = param(0.5, "of the scores", low=0)

    def edit_scores(self, scores, rows):
        return scores * self.share


@pytest.fixture
def own(monkeypatch):
    """Whatever a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_given", {})
    before = {*sys.modules}
    yield
    for name in [*sys.modules]:
        if name.startswith("vlm_fix_file_") and name not in before:
            del sys.modules[name]


def specs(model):
    return [method.spec() for method in vlm_fix.active(model)]


def test_settings_by_name_and_what_is_on_a_model(model):
    assert vlm_fix.active(model) == []
    vlm_fix.wrap(model, "pai", alpha=0.3)
    assert vlm_fix.active(model) == [PAI(alpha=0.3)] and specs(model) == ["pai:alpha=0.3"]
    vlm_fix.unwrap(model)
    for spec in (PAI, "pai", PAI()):
        with vlm_fix.wrapped(model, spec, alpha=0.3, layers="1-"):
            assert specs(model) == ["pai:layers=1-,alpha=0.3"]
    vlm_fix.wrap(model, "pai+vcd")
    assert specs(model) == ["pai", "vcd"]


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        ("pai", {"alhpa": 1}, "pai has no parameter 'alhpa'; did you mean 'alpha'?"),
        ("pai:alpha=1", {"alpha": 1}, "alpha is given twice, in the spec and by name"),
        (
            "pai+vcd",
            {"alpha": 1},
            "alpha may be meant for any of pai\\+vcd: write it in the spec, such as pai:alpha=...\\+vcd",
        ),
        ("pai", {"alpha": "much"}, "alpha='much'"),
        ("vcd+vcd", {}, "both contrast"),
        (None, {}, "None is no method"),
    ],
)
def test_what_cannot_be_put_on_leaves_what_was_there(family, model, spec, settings, says):
    vlm_fix.wrap(model, "vhr:alpha=3")
    inputs = make_inputs(family, [1])
    before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with pytest.raises(vlm_fix.VlmFixError, match=says):
        vlm_fix.wrap(model, spec, replace=True, **settings)
    assert specs(model) == ["vhr:alpha=3.0"]
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), before)


def test_replace(model):
    vlm_fix.wrap(model, "pai")
    with pytest.raises(vlm_fix.VlmFixError, match="already wrapped with pai; pass replace=True"):
        vlm_fix.wrap(model, "vcd")
    vlm_fix.wrap(model, "vcd", replace=True)
    with vlm_fix.wrapped(model, "pai", replace=True, alpha=1):
        assert specs(model) == ["pai:alpha=1"]
    assert specs(model) == ["vcd"]


def test_register(model, own):
    assert vlm_fix.register(Halved) is Halved and Halved in vlm_fix.list_methods()
    with vlm_fix.wrapped(model, "halved:share=0.9"):
        assert vlm_fix.active(model) == [Halved(share=0.9)]
    vlm_fix.register(
        type("Halved", (Halved,), {"__module__": __name__, "__qualname__": "Halved"})
    )  # the cell run again
    with pytest.raises(vlm_fix.VlmFixError, match="register takes the class of a method, not 3"):
        vlm_fix.register(3)

    @dataclass(frozen=True)
    class Needy(LogitEdit):
        name: ClassVar[str] = "needy"
        share: float

        def edit(self, scores, *rest):
            return scores

    with pytest.raises(vlm_fix.VlmFixError, match="Needy needs a default for every parameter"):
        vlm_fix.register(Needy)
    taken = dataclass(frozen=True)(type("Other", (Halved,), {"__module__": __name__, "name": "pai", "__doc__": None}))
    with pytest.raises(vlm_fix.VlmFixError, match="Other is called 'pai', as PAI of"):
        vlm_fix.register(taken)


def test_a_method_in_a_file(model, own, tmp_path):
    file = tmp_path / "boost.py"
    file.write_text(BOOST)
    for spec in (f"{file}:Boost:bonus=3", f"{file}:bonus=3", f"pai+{file}:Boost:bonus=3"):
        with vlm_fix.wrapped(model, spec):
            assert specs(model)[-1] == "boost:bonus=3.0"
    assert registry.split_methods(f"pai,{file}:Boost:bonus=3,layers=1-") == [
        ["pai"],
        [f"{file}:Boost:bonus=3,layers=1-"],
    ]
    assert registry.get_method(f"{file}:Boost") is registry.get_method("boost")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    (tmp_path / "empty.py").write_text("")
    for spec, says in (
        (f"{file}:Bost", "no method Bost; write .*boost.py:Boost"),
        (f"{tmp_path}/none.py:Boost", "there is no file"),
        (f"{tmp_path}/broken.py", "cannot be run: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        (f"{tmp_path}/empty.py", "has no methods; derive a class"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=says):
            vlm_fix.wrap(model, spec)


def test_classes_by_name():
    from vlm_fix import methods
    from vlm_fix.methods import VCD

    assert VCD.name == "vcd" and {"PAI", "VCD", "HiPrune"} <= {*dir(methods)}
    with pytest.raises(ImportError, match="PIA"):
        from vlm_fix.methods import PIA  # noqa: F401


def test_the_index_says_what_the_classes_say():
    told = [
        (m.name, m.kind, m.__doc__.strip().splitlines()[0], m.__module__, m.__name__) for m in vlm_fix.list_methods()
    ]
    assert told == [tuple(entry) for entry in index.entries()]


def test_the_index_reads_methods_of_others_or_leaves_it_to_the_registry(monkeypatch, tmp_path):
    (tmp_path / "their_boost.py").write_text(BOOST)
    (tmp_path / "their_riddle.py").write_text(BOOST.replace('"boost"', '"bo" + "ost"'))
    monkeypatch.syspath_prepend(tmp_path)
    for module, found in (("their_boost", True), ("their_riddle", False), ("their_none", False)):
        point = type("Point", (), {"value": module})
        monkeypatch.setattr(index, "entry_points", lambda group, point=point: [point])
        known = index.entries()
        assert (known is not None) == found
        if known:
            assert ("boost", "attention", "Adds a constant to image columns.", module, "Boost") in known


@pytest.fixture(scope="module")
def picto():
    path = model_path("picto-llava")
    return loading.load_model(str(path))[0], AutoProcessor.from_pretrained(path)


def test_a_pipeline_is_wrapped_in_its_model(picto):
    model, processor = picto
    pipe = ImageTextToTextPipeline(model=model, processor=processor)
    words = [{"type": "image", "image": scene("test", 0, 0).image}, {"type": "text", "text": "Describe the image."}]

    def answer():
        made = pipe(text=[{"role": "user", "content": words}], max_new_tokens=30, return_full_text=False)
        return made[0]["generated_text"]

    plain = answer()
    assert vlm_fix.wrap(pipe, "pai", alpha=2) is pipe and vlm_fix.active(model) == vlm_fix.active(pipe) == [
        PAI(alpha=2)
    ]
    assert answer() != plain
    assert vlm_fix.unwrap(pipe) is pipe and installed(model) is None and answer() == plain


def test_evaluate_a_model_in_memory(picto, own, tmp_path):
    model, processor = picto
    with pytest.raises(vlm_fix.VlmFixError, match="a loaded model needs processor"):
        vlm_fix.evaluate(model)
    with pytest.raises(vlm_fix.VlmFixError, match="evaluate takes no limits; its settings are .*limit"):
        vlm_fix.evaluate("picto-llava", limits=3)
    with pytest.raises(vlm_fix.VlmFixError, match=r"write \[method\]"):
        vlm_fix.evaluate("picto-llava", PAI)
    with vlm_fix.wrapped(model, "pai"), pytest.raises(vlm_fix.VlmFixError, match="the model is wrapped with pai"):
        vlm_fix.evaluate(model, "vcd", processor=processor)
    results = vlm_fix.evaluate(
        model,
        ["pai:alpha=2", [Halved, "hiprune"]],
        "pope",
        processor=processor,
        limit=1,
        splits=("random",),
        quiet=True,
        output=tmp_path / "run",
    )
    assert list(results["runs"]) == ["baseline", "pai:alpha=2.0", "halved+hiprune"]
    assert results["settings"]["model"]["parameters"] > 6e6 and (tmp_path / "run/table.md").is_file()


def test_calibrate_a_model_in_memory(picto, tmp_path):
    model, processor = picto
    found = vlm_fix.calibrate(model, "zerotuning", processor=processor, limit=2, out=tmp_path / "zero.json")
    assert {"rate", "head_indices"} == {*found.found} and found.score["questions"] == 2
    assert (tmp_path / "zero.json").is_file()
    with vlm_fix.wrapped(model, "zerotuning", calibration=found):
        assert vlm_fix.active(model)[0].rate == found.found["rate"]
