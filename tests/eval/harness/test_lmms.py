"""Other harnesses: the plugin for lmms-eval, run by lmms-eval itself on Picto, and the launcher of VLMEvalKit.

`make test-lmms` installs lmms-eval; without it the tests that need it are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vlm_fix
from tests.support.models import make_inputs
from tests.support.paths import ROOT
from vlm_fix.cli import main
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.harness import inside as harness
from vlm_fix.eval.harness import lmms, vlmevalkit
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.scorers.registry import BENCHMARKS

needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-lmms"
)
METHOD = "pai:alpha=1.5,layers=0-"  # far above the paper's strength: half of the answers change


# -------------------------------------------------------------------------------------------------------- the stack


def test_semicolons_stand_for_commas_and_plus_stacks():
    assert harness.specs("pai:alpha=0.2;gamma=1.1+vcd") == ["pai:alpha=0.2,gamma=1.1", "vcd"]
    assert harness.specs("baseline") == ["baseline"]


@pytest.mark.parametrize(
    "text, says", [("pay", "did you mean 'pai'"), ("pai;vcd", "stack methods with"), ("", "0 runs")]
)
def test_a_wrong_method_is_one_sentence(text, says):
    with pytest.raises(VlmFixError, match=says):
        harness.specs(text)


def test_apply_wraps_and_ends_on_failure(models):
    model, inputs = models["llava"], make_inputs("llava", [1])
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    harness.apply(model, METHOD.replace(",", ";"))
    try:
        assert not torch.equal(plain, model.generate(**inputs, max_new_tokens=4, do_sample=False))
        with pytest.raises(SystemExit, match="error: .*drop output_attentions=True"):
            model.generate(**inputs, max_new_tokens=2, output_attentions=True)
        with pytest.raises(SystemExit, match="error: .*size"):
            model.generate(**inputs | {"pixel_values": inputs["pixel_values"][..., :4]}, max_new_tokens=2)
    finally:
        vlm_fix.unwrap(model)
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_warnings_are_printed_whatever_filters_the_harness_set(models, capsys):
    model = models["llava"]
    harness.apply(model, "var:tau=8.1")  # above sqrt(64): no column can be a sink
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                model.generate(**make_inputs("llava", [1]), max_new_tokens=2, do_sample=False)
    finally:
        vlm_fix.unwrap(model)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: var changed nothing in this call: no image token was a sink")


# --------------------------------------------------------------------------------------------------------- the tasks


def test_the_figures_are_those_of_the_official_scorer():
    answers = ["Yes, there is.", "no", "No", "it is not there", "yes.", "", "a dog"]
    labels = ["yes", "no", "yes", "no", "no", "no", "yes"]
    docs = [{"question_id": i, "question": "?", "answer": label} for i, label in enumerate(labels)]
    results = [lmms.pope_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    questions = [pope.Question(i, "", "?", label) for i, label in enumerate(labels)]
    expected = pope.score(questions, [pope.Answer(i, a) for i, a in enumerate(answers)], "official")
    for name, field in lmms.METRICS.items():
        rows = [result[f"pope_{name}"] for result in results]
        assert getattr(lmms, f"pope_{name}")(rows) == getattr(expected, field)
    right = [result["pope_accuracy"]["score"] for result in results]
    assert right == [1, 1, 0, 1, 0, 0, 1] == [float(c) for c in expected.correct]


def test_written_tasks_hold_the_questions_of_the_eval_command(tmp_path, capsys):
    from vlm_fix.eval.run.runner import Settings
    from vlm_fix.eval.tasks import build

    assert main(["lmms-tasks", "--out", str(tmp_path), "--limit", "3", "--seed", "5"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path.resolve())
    (task,) = build(Settings("pope", data="picto:shift", limit=3, seed=5))
    pixels = {sample.file: sample.image for sample in task.samples}
    for split, questions in task.questions.items():
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert [(r["question"], r["answer"]) for r in rows] == [(q.text, q.label) for q in questions]
        for row, question in zip(rows, questions, strict=True):
            assert lmms.pope_visual(row)[0].tobytes() == pixels[question.image].tobytes()


def test_tasks_of_a_folder_without_images_are_refused(tmp_path, capsys):
    assert main(["lmms-tasks", "--out", str(tmp_path / "new"), "--data", f"coco:{tmp_path}"]) == 2
    assert "holds no images" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_packaged_tasks_are_printed_and_packaged(capsys):
    assert main(["lmms-tasks"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert {path.name for path in folder.iterdir()} >= {"pope_official.yaml", "pope_official_random.yaml"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["lmms_eval.models"] == {"vlm_fix": "vlm_fix.eval.harness.lmms:models"}


# ------------------------------------------------------------------------------------------------- lmms-eval itself


def run_lmms_eval(folder, task, *arguments, **model_args):
    """lmms-eval in its own process, without a network; the finished process."""
    given = ",".join(f"{name}={value}" for name, value in (model_args | {"dtype": "float32"}).items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlm_fix_llava_hf", "--model_args", given]
    command += ["--device", "cpu", "--tasks", task, "--include_path", str(folder), *arguments]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


@needs_lmms
def test_the_entry_point_registers_the_models():
    from lmms_eval.models import MODEL_REGISTRY_V2

    for name in ("vlm_fix_llava_hf", "vlm_fix_qwen2_5_vl", "vlm_fix_qwen3_vl"):
        found = MODEL_REGISTRY_V2.get_model_class(name)
        assert found.__init__.__qualname__.startswith("Fixed") and not found.is_simple


@needs_lmms
def test_the_official_tasks_load(monkeypatch):
    """The group and its three splits, over a stand-in for the data set's download with the columns it has."""
    import datasets
    from lmms_eval.tasks import TaskManager, get_task_dict

    asked = []

    def load(path, name=None, **kwargs):
        asked.append((path, name))
        row = {"question_id": "1", "image": Image.new("L", (8, 8)), "question": "Is there a dog? ", "answer": "no"}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([row]) for split in ("random", "popular", "adversarial")}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    manager = TaskManager(include_path=str(lmms.TASKS), include_defaults=False)
    (members,) = get_task_dict(["pope_official"], manager).values()
    assert sorted(members) == [f"pope_official_{split}" for split in ("adversarial", "popular", "random")]
    assert set(asked) == {("lmms-lab-encoder/POPE", "Full")}
    for task in members.values():
        (doc,) = task.test_docs()
        assert task.doc_to_text(doc) == "Is there a dog?" and task.doc_to_visual(doc)[0].mode == "RGB"
        assert task.process_results(doc, ["No."])["pope_accuracy"]["score"] == 1
        assert task.config.generation_kwargs["max_new_tokens"] == 16
        assert task.aggregation()["pope_f1_score"] is not None


@needs_lmms
def test_lmms_eval_agrees_with_the_eval_command(tmp_path):
    """The same samples, model, method and scorer in both: the same answers and the same figures, in every split."""
    from vlm_fix.eval.picto import model_path
    from vlm_fix.eval.run.runner import Settings, evaluate

    settings = Settings("pope", data="picto:shift", limit=6, seed=1, batch_size=1, methods=((METHOD,),), device="cpu")
    ours = evaluate(settings, tmp_path / "ours")
    answers = {}
    for line in (tmp_path / "ours/samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers[row["run"], row["image"].removesuffix(".png"), row["prompt"]] = row["answer"]
    keys = {key[1:] for key in answers}
    assert sum(answers["baseline", *key] != answers[METHOD, *key] for key in keys) > len(keys) / 4

    tasks = lmms.write_tasks(tmp_path / "tasks", settings)
    done = run_lmms_eval(
        *(tasks, "pope_picto", "--output_path", str(tmp_path / "theirs"), "--log_samples"),
        pretrained=model_path("picto-llava"),
        method=METHOD.replace(",", ";"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "theirs").rglob("*_results.json")
    theirs = json.loads(results.read_text())["results"]
    for split, figures in ours["runs"][METHOD]["pope"].items():
        found = theirs[f"pope_picto_{split}"]
        for name, field in lmms.METRICS.items():
            assert found[f"pope_{name},none"] == pytest.approx(figures[field], abs=1e-12), (split, name)
        (samples,) = (tmp_path / "theirs").rglob(f"*_samples_pope_picto_{split}.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        assert len(rows) == 36
        for row in rows:
            key = (Path(row["input_media"][0]).stem, row["input"])
            assert row["filtered_resps"].strip() == answers[METHOD, *key]
        scored = BENCHMARKS["pope"].score_files(str(samples))  # its own file, by `vlm-fix score`
        assert scored.n == 36 and scored.accuracy == figures["accuracy"] and scored.f1 == figures["f1"]


@needs_lmms
def test_an_unknown_method_ends_lmms_eval_with_one_sentence(tmp_path):
    from vlm_fix.eval.run.runner import Settings

    tasks = lmms.write_tasks(tmp_path, Settings("pope", data="picto:shift", limit=2, splits=("random",)))
    done = run_lmms_eval(tasks, "pope_picto_random", pretrained="picto-llava", method="pay")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "error: there is no method 'pay'; did you mean 'pai'?"


@needs_lmms
def test_a_failure_is_no_empty_answer(monkeypatch):
    from lmms_eval.api.instance import Instance

    from vlm_fix.eval.harness.lmms_models import VlmFixLlavaHf

    made = VlmFixLlavaHf(pretrained="picto-llava", method="pai", device="cpu", dtype="float32")
    image = Image.new("RGB", (128, 128), "white")

    def messages(doc):
        words = [{"type": "image", "url": image}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": words}]

    made.task_dict["one"] = {"test": [{"question": "Is there a dog in the image?"}]}
    request = Instance(
        request_type="generate_until",
        arguments=("", messages, {"max_new_tokens": 4}, 0, "one", "test"),
        idx=0,
        metadata={"task": "one", "doc_id": 0, "repeats": 1},
    )
    (answer,) = made.generate_until([request])
    assert answer.text

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(made.model.model.language_model.layers[1].mlp, "forward", broken)
    with pytest.raises(SystemExit, match="error: out of memory"):
        made.generate_until([request])


@needs_lmms
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_qwen_classes_load_wrap_and_generate(name, monkeypatch, models):
    """Their processors need torchvision, so the checkpoint's loading is replaced; the rest is the class itself."""
    from vlm_fix.eval.harness import lmms_models

    base = lmms_models.CHAT[name]
    made_of = getattr(lmms_models, f"VlmFix{base}")
    theirs = made_of.__mro__[2]
    model = models["qwen2_5_vl"]
    seen = {}

    def load(self, **kwargs):
        seen.update(kwargs)
        self._model = model

    monkeypatch.setattr(theirs.__mro__[1], "__init__", load)
    monkeypatch.setattr(theirs.__mro__[1], "model", property(lambda self: self._model))
    plain = model.generate(**make_inputs("qwen2_5_vl", [1]), max_new_tokens=4, do_sample=False)
    made = made_of(pretrained="here", method=METHOD.replace(",", ";"), max_pixels=9)
    try:
        assert seen == {"pretrained": "here", "max_pixels": 9}
        changed = made.model.generate(**make_inputs("qwen2_5_vl", [1]), max_new_tokens=4, do_sample=False)
        assert not torch.equal(plain, changed)
    finally:
        vlm_fix.unwrap(model)


# -------------------------------------------------------------------------------------------------------- VLMEvalKit


def test_models_get_a_name_of_their_own():
    arguments = ["--data", "POPE", "MME", "--model", "a", "b", "--verbose", "--work-dir", "out"]
    renamed, names = vlmevalkit.rename(arguments, "pai:alpha=0.2;layers=2|3+vcd")
    assert names == {"a--pai-alpha-0.2-layers-2-3+vcd": "a", "b--pai-alpha-0.2-layers-2-3+vcd": "b"}
    assert renamed == [*arguments[:4], *names, *arguments[6:]]
    assert vlmevalkit.rename(["--model=a"], "pai") == (["--model", "a--pai"], {"a--pai": "a"})


@pytest.mark.parametrize("flag", ["--config", "--use-vllm", "--api-mode", "--base-url=http://localhost", "--base"])
def test_other_kinds_of_model_are_refused(flag):
    with pytest.raises(VlmFixError, match=f"{flag.partition('=')[0]}.* --model"):
        vlmevalkit.rename(["--model", "a", "--mode", "all", "--api-nproc", "4", flag], "pai")


@pytest.fixture
def kit(tmp_path, monkeypatch, models):
    """A folder with a run.py that treats models as VLMEvalKit's does; its main writes what the model answered."""
    (tmp_path / "run.py").write_text(
        textwrap.dedent("""
            import argparse, json
            from vlmkit_models import supported_VLM

            def load_env(): pass

            def main():
                parser = argparse.ArgumentParser()
                parser.add_argument("--data", nargs="+")
                parser.add_argument("--model", nargs="+")
                args = parser.parse_args()
                for name in args.model:
                    try:
                        answer = supported_VLM[name]().generate()
                    except Exception:  # as run.py does: one failed combination is skipped
                        answer = None
                    with open(args.data[0], "w") as file:
                        json.dump([name, answer], file)
            """)
    )

    class Kept:
        def __init__(self, key):
            self.model = models[key]

        def generate(self):
            return self.model.generate(**make_inputs("llava", [1]), max_new_tokens=4, do_sample=False).tolist()

    table = {"llava": lambda: Kept("llava"), "other": lambda: SimpleNamespace(model=object())}
    monkeypatch.setitem(sys.modules, "vlmkit_models", SimpleNamespace(supported_VLM=table))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["vlm-fix"])
    yield tmp_path
    vlm_fix.unwrap(models["llava"])


def test_the_launcher_runs_the_wrapped_model(kit, models):
    out = kit / "answer.json"
    inputs = make_inputs("llava", [1])
    with vlm_fix.wrapped(models["llava"], METHOD):
        expected = models["llava"].generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    plain = models["llava"].generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    command = ["vlmevalkit", str(kit), "--method", METHOD, "--model", "llava", "--data", str(out)]
    assert main(command) == 0
    name, answer = json.loads(out.read_text())
    assert name == "llava--pai-alpha-1.5-layers-0" and answer == expected != plain


def test_the_launcher_says_what_is_wrong(kit, tmp_path, capsys, monkeypatch):
    def error(*command):
        assert main(["vlmevalkit", *command]) == 2
        return capsys.readouterr().err

    assert "clone github.com/open-compass/VLMEvalKit" in error(str(tmp_path / "no"), "--method", "pai", "--model", "a")
    assert "did you mean 'pai'" in error(str(kit), "--method", "pay", "--model", "llava")
    assert "add --model NAME" in error(str(kit), "--method", "pai", "--data", "POPE")
    assert "no model 'lava'" in error(str(kit), "--method", "pai", "--model", "lava", "--data", "POPE")
    with pytest.raises(SystemExit, match="holds no Hugging Face model"):  # not skipped, as run.py would
        main(["vlmevalkit", str(kit), "--method", "pai", "--model", "other", "--data", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    monkeypatch.delitem(sys.modules, "vlmkit_models")
    assert "VLMEvalKit needs vlmkit_models: pip install -e" in error(str(kit), "--method", "pai", "--model", "llava")
