"""Options that would have no effect are errors, before a model is loaded; so are stacks that make no sense."""

import json

import pytest

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.run import loading, plan, runner
from vlm_fix.eval.settings import Settings

BAD = {
    "temperature": ("eval pope --temperature 0.7", "--temperature has no effect on this run: add --sample"),
    "the default temperature": ("eval pope --temperature 1.0", "--temperature has no effect"),
    "top-p": ("eval chair --top-p 0.9 --num-beams 2", "--top-p has no effect"),
    "temperature beside beams": (
        "eval pope --controls --num-beams 4 --temperature 0.5",
        "--temperature has no effect on this run: add --sample, which goes without beams, or leave it out",
    ),
    "top-p beside beams": ("eval pope --controls --num-beams 4 --top-p 0.5", "--top-p has no effect"),
    "top_k beside beams": (
        "eval pope --controls --num-beams 4 --gen-kwargs top_k=5",
        "--gen-kwargs top_k has no effect on this run: add --sample, which goes without beams",
    ),
    "ids with picto": ("eval pope --ids {dir}/ids", "--ids has no effect on this run: it is for pope and chair with"),
    "ids with amber": ("eval amber --data amber:{dir} --ids {dir}/ids", "--ids has no effect"),
    "splits of captions": ("eval chair --split random", "--split has no effect"),
    "splits of files": ("eval pope --data coco:{dir} --questions a.json --split random", "--split has no effect"),
    "questions from picto": ("eval pope --build", "--build has no effect"),
    "scorer of captions": ("eval chair --scorer vcd", "--scorer has no effect on this run: captions are judged by"),
    "variant of questions": ("eval pope --variant nltk", "--variant has no effect"),
    "sentences of questions": ("eval pope --drop-incomplete", "--drop-incomplete has no effect"),
    "two places": ("eval pope --device cpu --device-map auto", "--device has no effect"),
    "prompt": ("eval chair --prompt {{question}}?", "--prompt with {{question}} is for questions"),
    "judge": ("eval hallusion --data hallusion:{dir} --scorer official", "is GPT-4, which is not called"),
    "sampling of a greedy run": (
        "eval pope --gen-kwargs top_k=5",
        "--gen-kwargs top_k has no effect on this run: add --sample",
    ),
    "beams of a greedy run": (
        "eval pope --gen-kwargs length_penalty=3.0,early_stopping=true",
        "length_penalty has no effect",
    ),
    "devices of a CPU": ("eval pope --device-map auto", "--device-map auto has no effect on this machine"),
    "code of a bundled model": ("eval pope --trust-remote-code", "--trust-remote-code has no effect on picto-llava"),
    "a judge that is none": ("export hallo a.jsonl --out {dir}/z", "there is no judge and no method 'hallo'"),
    "capitals": ("eval amber --scorer official", "take ours"),
    "no method": ("eval pope --method ,", "',' names no method"),
    "method twice": ("eval pope --method pai,vcd,pai", "names the run pai twice"),
    "method twice, spelt apart": ("eval pope --method pai,pai:alpha=0.2", "names the run pai:alpha=0.2 twice (as pai)"),
    "baseline": ("eval pope --method baseline", "--method baseline adds nothing"),
    "a stack of three pruners": ("eval pope --method hiprune+cdpruner+dart", "and dart all prune tokens"),
    "stack of one method": ("eval pope --method pai+pai", "pai is listed twice"),
    "stack of contrasts": ("eval pope --method vcd+icd", "vcd and icd both contrast"),
    "stack of pruners": ("eval pope --method hiprune:keep=8+fastv", "both prune tokens"),
    "layers of another model": ("eval pope --method pai:layers=0-99", "has layers 0 to 5"),
    "seeds of greedy runs": ("eval pope --method pai --seeds 0,1", "--seeds 0,1 has no effect"),
    "one seed of greedy runs": ("eval pope --seeds 3", "--seeds 3 has no effect"),
    "samples": ("report {dir} --samples -1", "--samples -1: give 0 or more"),
    "samples of a table": ("report {dir} --markdown {dir}/x.md --samples 3", "--samples 3: it is for the page"),
    "a run twice": ("report {dir} {dir}", "is given twice"),
    "keep": ("bench attention --keep 64", "--keep has no effect on bench attention"),
    "questions": ("bench attention --questions 2", "--questions has no effect on bench attention"),
    "no question": ("bench serve --questions 0", "--questions 0: at least one is asked"),
    "bench without methods": ("bench attention --method ,", "names no method"),
    "tasks that are not written": ("lmms-tasks --limit 3", "--limit has no effect: it is for the tasks that --out"),
    "ids of picto's tasks": ("lmms-tasks --out {dir}/t --ids {dir}/ids", "--ids has no effect"),
    "search": ("calibrate iri --search alpha=1 --search alpha=2", "--search names alpha twice"),
    "published": ("published --method ,", "names no method; leave it out"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_option_without_effect_is_an_error(case, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(runner, "load_model", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids").write_text("42\n")
    command, says = (text.format(dir=tmp_path) for text in BAD[case])
    assert cli.main(command.split()) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in error


def test_options_that_act_reach_the_settings(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(runner, "evaluate", lambda settings, *args, **kwargs: seen.append(settings) or exit(0))
    for command in (
        "eval pope --sample --temperature 0.7 --top-p 0.9 --seeds 0,1 --split random --scorer vcd --device cpu",
        "eval pope",
        "eval all --variant pattern --drop-incomplete --controls --temperature 0.5 --gen-kwargs top_k=5",
    ):
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--output", str(tmp_path / "o")])
    given, usual, controls = seen
    assert (given.temperature, given.top_p, given.seeds, given.splits) == (0.7, 0.9, (0, 1), ("random",))
    assert (given.scorer, given.device) == ("vcd", "cpu")
    assert usual == Settings("pope") and controls.temperature == 0.5 and controls.variant == "pattern"


def test_the_outline_has_no_weights_and_none_is_made_of_what_cannot_be_read(tmp_path):
    model = loading.outline("picto-llava")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert loading.outline(str(tmp_path)) is None
    settings = Settings(methods=(("vcd", "vcd"),))
    with pytest.raises(VlmFixError, match=r"vcd\+vcd: vcd is listed twice"):
        plan.check_stacks(settings)
    with pytest.raises(VlmFixError, match="both contrast"):
        plan.check_stacks(settings, model)
    plan.check_stacks(Settings(methods=(("pai", "hiprune:keep=8"), ("vcd",))), model)


@pytest.mark.parametrize("benchmark", ["pope", "chair", "amber"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_image_is_enough(benchmark, seed):
    made = tasks.build(Settings(benchmark, limit=1, seed=seed, variant="pattern" if benchmark != "pope" else None))
    for task in made:
        assert len({sample.file for sample in task.samples}) == 1
        assert task.score({sample.id: "Yes" for sample in task.samples})
    if benchmark == "pope":
        assert made[0].sizes == {"random": 6, "popular": 6, "adversarial": 6}


def test_images_may_lie_in_images_val2014(tmp_path):
    from PIL import Image

    from vlm_fix.eval.tasks.coco import Folder

    folder = tmp_path / "images" / "val2014"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "COCO_val2014_000000000042.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps({"images": [], "annotations": []}))
    opened = Folder.open(tmp_path)
    assert opened.images == {42: folder / "COCO_val2014_000000000042.jpg"} and not opened.own
