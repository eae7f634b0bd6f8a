"""Files that others made, models among them: they run nothing, lead nowhere, and broken ones are a sentence."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

import vlm_fix
from tests.support.paths import PICTO_LLAVA
from vlm_fix import VlmFixError, cli
from vlm_fix.calibrated import Calibration
from vlm_fix.eval.run.loading import load_model
from vlm_fix.eval.tasks.sample import place


class Program:
    """What a pickle can hold: a call that is made when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def checkpoint(tmp_path):
    """picto-llava in a folder of its own, where files can be changed."""
    folder = tmp_path / "model"
    shutil.copytree(PICTO_LLAVA, folder, ignore=shutil.ignore_patterns("calibration", "*.md"))
    return folder


def test_weights_that_hold_a_program_run_nothing(checkpoint, tmp_path, capsys):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": Program(tmp_path / "ran")}, checkpoint / "pytorch_model.bin")
    assert (
        cli.main(["eval", "pope", "--model", str(checkpoint), "--limit", "1", "--output", str(tmp_path / "run")]) == 2
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds more than tensors, which could run code" in said and not (tmp_path / "ran").exists()
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap does not work"


def test_plain_bin_weights_are_read(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    theirs, ours = load_model(str(checkpoint))[0].state_dict(), load_model("picto-llava")[0].state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


HARMFUL = {"empty": lambda old: b"", "half": lambda old: old[: len(old) // 2], "list": lambda old: b"[]"}
FILES = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("file", FILES)
def test_a_broken_checkpoint_is_one_sentence(checkpoint, file, harm):
    """As a download leaves it that was interrupted, or a disk that is full."""
    (checkpoint / file).write_bytes(HARMFUL[harm]((checkpoint / file).read_bytes()))
    with pytest.raises(VlmFixError, match="could not be loaded") as caught:
        load_model(str(checkpoint))
    said = str(caught.value)
    assert "again" in said and "\n" not in said


@pytest.mark.parametrize("harm", ["half", "text"])
def test_broken_bin_weights_are_one_sentence(checkpoint, harm):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    file = checkpoint / "pytorch_model.bin"
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:1_000_000] if harm == "half" else b"hello" * 100)
    with pytest.raises(VlmFixError, match="could not be loaded"):
        load_model(str(checkpoint))


def test_code_of_a_checkpoint_runs_only_where_that_is_asked_for(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (checkpoint / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(VlmFixError, match="code of its own.*--trust-remote-code"):
        load_model(str(checkpoint))
    assert not mark.exists()
    with pytest.raises(VlmFixError):  # it holds no Config
        load_model(str(checkpoint), trust_remote_code=True)
    assert mark.exists(), "the trap does not work"


@pytest.mark.parametrize("name", ["../weights.safetensors", "{}/weights.safetensors", "sub/weights.safetensors"])
def test_a_calibration_reads_tensors_beside_itself_alone(tmp_path, name):
    content = {"method": "steer", "found": {"file": {"tensors": name.format(tmp_path)}}, "model": {}}
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(VlmFixError, match="not a file beside it"):
        Calibration.read(tmp_path / "c.json")


def test_a_file_of_methods_runs_no_program(models, tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (tmp_path / "fix.yaml").write_text(f"stack: [{{method: '{tmp_path}/evil.py:Boost'}}]\nmodel: {{}}\n")
    with pytest.raises(VlmFixError, match="names a program"), warnings.catch_warnings(action="ignore"):
        vlm_fix.wrap(models["llava"], str(tmp_path / "fix.yaml"))
    assert not mark.exists()
    with pytest.raises(VlmFixError, match="0 methods|no method"):
        vlm_fix.wrap(models["llava"], f"{tmp_path}/evil.py:Boost")
    assert mark.exists(), "the trap does not work"


@pytest.mark.parametrize("name", ["../private.png", "images/../../private.png", "{}/private.png"])
def test_questions_name_no_image_outside_of_their_folder(tmp_path, name):
    """They may come from others, and with --server images are sent away."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "private.png").write_bytes(b"")
    with pytest.raises(VlmFixError, match="outside of it"):
        place(folder, name.format(tmp_path), ("images",))


def test_an_evaluation_stops_at_such_a_name(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    row = {"id": 1, "image": "../private.jpg", "question": "Is there a dog?", "gt": "yes", "orig_img": True}
    (tmp_path / "data" / "beaf_qna.json").write_text(json.dumps([{**row, "removed_q": False}]))
    code = cli.main(["eval", "beaf", "--data", f"beaf:{tmp_path / 'data'}", "--output", str(tmp_path / "run")])
    assert code == 2 and "outside of it, '../private.jpg'" in capsys.readouterr().err
