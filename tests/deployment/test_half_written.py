"""Checkpoints of which a download or a copy was interrupted: one sentence and exit code 2, never a model of random weights."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vlm_fix import cli
from vlm_fix.eval import picto


def cut(file, size):
    def damage(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return damage


def without(file):
    return lambda folder: (folder / file).unlink()


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def lose_one(tensors):
    del tensors[next(name for name in tensors if name.endswith("layers.3.mlp.up_proj.weight"))]
    return tensors


def shrink_one(tensors):
    name = next(name for name in tensors if name.endswith("layers.3.mlp.up_proj.weight"))
    return {**tensors, name: tensors[name][:-1].contiguous()}


DAMAGE = {
    "weights cut off": (cut("model.safetensors", 2_000_000), "its weights are cut off, fetch them again"),
    "weights cut off in the header": (cut("model.safetensors", 5), "its weights are cut off, fetch them again"),
    "weights empty": (cut("model.safetensors", 0), "its weights are cut off, fetch them again"),
    "weights missing": (without("model.safetensors"), "no file named model.safetensors"),
    "a tensor missing": (weights(lose_one), "lacks weights that would be random (1, such as "),
    "a tensor of another size": (weights(shrink_one), "weights of other sizes than its config.json says"),
    "config cut off": (cut("config.json", 100), "could not be loaded"),
    "config missing": (without("config.json"), "could not be loaded"),
    "tokenizer cut off": (cut("tokenizer.json", 1000), "could not be loaded"),
    "tokenizer missing": (without("tokenizer.json"), "could not be loaded"),
    "processor cut off": (cut("processor_config.json", 50), "could not be loaded"),
    "processor missing": (without("processor_config.json"), "could not be loaded"),
    "template missing": (without("chat_template.jinja"), "add chat_template.jinja"),
    "generation config cut off": (cut("generation_config.json", 20), "fetch the checkpoint again"),
    "calibration cut off": (cut("calibration/iri.json", 20), "is not a calibration file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_checkpoint_that_is_not_whole(what, tmp_path, capsys):
    damage, words = DAMAGE[what]
    folder = tmp_path / "model"
    shutil.copytree(picto.model_path("picto-llava"), folder)
    damage(folder)
    command = f"eval pope --model {folder} --data picto:shift --limit 1 --method iri --output {tmp_path}/out"
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and words in said and "Traceback" not in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_whole_one_is_loaded(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(picto.model_path("picto-llava"), folder)
    command = f"eval pope --model {folder} --data picto:shift --limit 1 --split random --output {tmp_path}/out"
    assert cli.main(command.split()) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
