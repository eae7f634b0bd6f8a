"""The models of a page."""

import shutil

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

import vlm_fix
from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError
from vlm_fix.demo import compare, models
from vlm_fix.eval import picto


def test_a_twin_shares_weights_and_nothing_else(loaded, scene):
    before, twin = last(compare.compare(loaded, scene, PROMPT, []))[0].text, loaded.twin()
    ours, theirs = dict(loaded.model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[key] is theirs[key] for key in ours)
    with vlm_fix.wrapped(twin, "vhr:alpha=3"):
        assert last(compare.compare(loaded, scene, PROMPT, []))[0].text == before
        assert not hasattr(loaded.model, "_vlm_fix_engine")


def test_models_by_name(tmp_path):
    closed = models.Models(["picto-llava"])
    assert closed.get("picto-llava") is closed.get(" picto-llava ")
    for name in ("", str(tmp_path), "someone/else"):
        with pytest.raises(VlmFixError, match="This page offers picto-llava"):
            closed.get(name)
    shutil.copytree(picto.model_path("picto-llava"), tmp_path / "copy")
    opened = models.Models(["picto-llava"], any_name=True)
    assert opened.get(str(tmp_path / "copy")).identity["weights"] == closed.get("picto-llava").identity["weights"]
    with pytest.raises(VlmFixError, match="could not be loaded"):
        opened.get(str(tmp_path / "nothing"))
    assert "picto-llava" in models.bundled()
