"""A model sees one start token, whether its chat template writes it or its tokenizer adds it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.paths import ROOT
from vlm_fix.cli import main
from vlm_fix.eval import prompts
from vlm_fix.eval.bench import drafting
from vlm_fix.eval.picto import model_path, scene
from vlm_fix.eval.picto.referring import Asker
from vlm_fix.eval.run import loading


@pytest.fixture
def twice():
    """The bundled model with a processor like Gemma 3's: the template writes the start token, and the tokenizer adds it."""
    processor = AutoProcessor.from_pretrained(model_path("picto-llava"))
    processor.tokenizer.padding_side = "left"
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    text = prompts.chat(processor, "What?")
    start = processor.tokenizer.bos_token_id
    assert processor(images=scene("test", 0, 0).image, text=text)["input_ids"][0].count(start) == 2
    model = AutoModelForImageTextToText.from_pretrained(model_path("picto-llava")).eval()
    return model, processor, start


@pytest.fixture
def starts(twice, monkeypatch, tmp_path):
    """The number of start tokens in the rows of each prompt that a command gives the model."""
    model, processor, start = twice
    found, generate = set(), model.generate

    def seen(*args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]  # a method hands on the first alone
        found.update((ids == start).sum(dim=1).tolist())
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", seen)
    for module in (loading, drafting):
        monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: (model, processor, {}))
    scene("test", 0, 0).image.save(tmp_path / "scene.png")
    return found


def test_a_batch_starts_once(twice):
    model, processor, start = twice
    inputs = prompts.encode(model, processor, [scene("test", 0, 0).image] * 2, ["What?", "Describe the whole image."])
    assert (inputs["input_ids"] == start).sum(dim=1).tolist() == [1, 1]
    assert not prompts.without_start(processor, "What?").startswith(processor.tokenizer.bos_token)
    plain = AutoProcessor.from_pretrained(model_path("picto-llava"))
    assert torch.equal(
        prompts.encode(model, plain, [scene("test", 0, 0).image], ["What?"])["input_ids"],
        prompts.encode(model, processor, [scene("test", 0, 0).image], ["What?"])["input_ids"],
    )


def test_point_and_inspect_start_once(starts, tmp_path):
    place = str(tmp_path / "scene.png")
    assert main(["point", place, "What?", "--box", "10,10,60,60", "--new-tokens", "1"]) == 0
    assert starts == {1}
    starts.clear()
    out = ["--out", str(tmp_path / "page.html"), "--no-saliency"]
    assert main(["inspect", place, "What?", "--new-tokens", "1", *out]) == 0
    assert starts == {1}


def test_the_referring_task_and_bench_draft_start_once(starts, twice):
    Asker(*twice[:2]).odds(scene("test", 0, 0).image, ["dog", "sports ball"])
    assert starts == {1}
    starts.clear()
    drafting.run(["draft"], "picto-llava", 2, 1)
    assert starts == {1}


def test_nothing_else_writes_prompts_of_its_own():
    for folder in ("vlm_fix", "eval", "methods", "demo"):
        for file in (ROOT / folder).rglob("*.py"):
            if file != ROOT / "eval" / "prompts.py":
                assert "apply_chat_template" not in file.read_text(encoding="utf-8"), file


def test_examples_let_the_template_make_the_tokens():
    places = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    places += [*(ROOT / "docs").glob("*.md"), ROOT / "docs" / "quickstart.ipynb"]
    lines = [line for place in places for line in place.read_text(encoding="utf-8").splitlines()]
    called = [line for line in lines if "apply_chat_template(" in line]
    assert called and all("**how" in line for line in called)
    assert all("tokenize" in line for line in lines if "how = {" in line and "add_generation_prompt" in line)
