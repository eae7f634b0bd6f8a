"""What `vlm-fix describe` is told about a picture, and calibrations of methods that it does not ask."""

from __future__ import annotations

import json

import pytest

from vlm_fix.cli import main
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picture
from vlm_fix.eval.picto import model_path
from vlm_fix.eval.run import loading

FILE = str(model_path("picto-llava") / "calibration" / "iri.json")


@pytest.mark.parametrize("name", ["scene:0", "coco:0"])
def test_no_objects_are_none(name, capsys, monkeypatch):
    monkeypatch.setattr(picture, "ask", lambda *args: iter(()))
    if name == "scene:0":
        assert picture.find(name).truth and picture.find(name, "").truth == frozenset()
        assert main(["describe", name, "--objects", "", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["truth"] == []
    assert picture.objects_of("") == frozenset()


@pytest.mark.parametrize("ask", [["describe", "scene:0"], ["eval", "pope", "--limit", "1"]])
@pytest.mark.parametrize(
    ("method", "says"),
    [
        ([], "the calibration of iri has no effect: no method is named; leave the file out or add iri."),
        (["--method", "pai,vcd"], "the calibration of iri fits none of pai, vcd; leave the file out or add iri."),
    ],
)
def test_a_calibration_of_a_method_that_is_not_asked_is_refused(ask, method, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if ask[0] == "describe":
        monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    assert main([*ask, *method, "--calibration", FILE]) == 2
    assert says in capsys.readouterr().err


def test_a_calibration_of_one_of_the_methods_is_taken():
    with pytest.raises(VlmFixError, match="fits none of pai;"):
        next(picture.ask(picture.find("scene:0").image, None, [["baseline"], ["pai"]], calibration=[FILE]))
    answers = picture.ask(picture.find("scene:0").image, None, [["pai"], ["iri"]], max_new_tokens=2, calibration=[FILE])
    assert [answer.method for answer in answers] == ["pai", "iri"]
