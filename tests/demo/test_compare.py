"""The compare tab: panes say what a benchmark gets, and what was run can be copied."""

import itertools
import json
import shlex
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

import vlm_fix
from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError, cli
from vlm_fix.demo import compare, examples, models
from vlm_fix.demo.cards import card
from vlm_fix.eval import picto
from vlm_fix.eval.run import generation
from vlm_fix.eval.scorers.chair import data as chair_data


def test_panes_equal_the_runner_and_the_truth(loaded, scene):
    panes = last(compare.compare(loaded, scene, PROMPT, [["vcd"], ["pai:alpha=0.5", "hiprune:keep=32"]]))
    present = examples.scenes()[0].truth
    for pane in panes:
        with vlm_fix.wrapped(loaded.model, pane.stack):
            how = {"do_sample": False, "max_new_tokens": 64}
            images = [examples.scenes()[0].image]
            expected = generation.generate(loaded.model, loaded.processor, images, [PROMPT], 0, **how)
        assert pane.state == "done" and pane.text.strip() == expected.texts[0] and pane.tokens == expected.tokens[0]
        assert 0 < pane.first_token < pane.seconds
        assert "".join(text for text, _, _ in pane.words()) == pane.text
        named = [(label, node) for _, label, node in pane.words() if label]
        assert named and all((label == "grounded") == (node in present) for label, node in named)
        wrong = sum(label == "hallucinated" for label, _ in named)
        assert pane.score().chair_i == pytest.approx(wrong / len(named))
    assert len({pane.text for pane in panes}) > 1


def test_an_answer_grows(loaded, scene):
    compare_refresh, compare.REFRESH = compare.REFRESH, 0
    try:
        texts = [panes[0].text for panes in compare.compare(loaded, scene, PROMPT, [])]
    finally:
        compare.REFRESH = compare_refresh
    assert len(set(texts)) > 5 and all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_truth_belongs_to_the_pixels(loaded, scene, tmp_path):
    altered = examples.scenes()[0].image.copy()
    altered.putpixel((0, 0), (1, 2, 3))
    altered.save(tmp_path / "other.png")
    assert last(compare.compare(loaded, scene, PROMPT, []))[0].score() is not None
    assert last(compare.compare(loaded, tmp_path / "other.png", PROMPT, []))[0].score() is None


def test_photographs_are_known_by_their_coco_id_and_credited(loaded):
    truth = chair_data.ground_truth("coco", "pattern")
    rows = {f"coco:{row['coco_id']}": row for row in json.loads((examples.FOLDER / "ATTRIBUTION.json").read_text())}
    files = {path.name for path in examples.FOLDER.glob("*.jpg")}
    assert {row["file"] for row in rows.values()} == files and len(examples.photographs()) == len(files) >= 8
    for example in examples.photographs():
        row = rows[example.name]
        assert example.truth == truth[row["coco_id"]] and len(example.truth) >= 1
        assert row["license"] == "CC BY 2.0" and row["page"] in example.credit and row["license_url"] in example.credit
        assert examples.find(example.name) is example is examples.recognise(example.image.copy())
    made = last(compare.compare(loaded, example.image, PROMPT, []))[0]
    assert made.truth == example.truth and made.score() is not None
    with pytest.raises(VlmFixError, match="no example 'coco:1': choose from scene:0"):
        examples.find("coco:1")


def test_a_refused_stack_says_why_and_the_rest_runs(loaded, scene):
    base, refused, fine = last(compare.compare(loaded, scene, PROMPT, [["vcd", "pai:gamma=1.1"], ["vhr"]]))
    assert (base.state, refused.state, fine.state) == ("done", "failed", "done")
    assert refused.notes == ["vcd and pai both contrast; use one of them at a time."]
    assert "use one of them" in card(refused)


@pytest.mark.parametrize("how", ["stopped", "closed"])
def test_stop_ends_the_answer_and_frees_the_model(loaded, scene, how):
    stop, refresh, compare.REFRESH = compare.Stop(), compare.REFRESH, 0
    try:
        running = compare.compare(loaded, scene, PROMPT, [["vcd"]], max_new_tokens=512, stop=stop)
        next(running)
        if how == "closed":
            running.close()
        else:
            stop.set()
            assert [pane.state for pane in last(running)] == ["stopped", "stopped"]
    finally:
        compare.REFRESH = refresh
    assert stop.is_set()
    assert last(compare.compare(loaded, scene, PROMPT, []))[0].state == "done"


def test_two_visitors_at_once(loaded, tmp_path):
    alone, together = [], [None, None]
    for i in range(2):
        examples.scenes()[i].image.save(tmp_path / f"{i}.png")
        alone.append(last(compare.compare(loaded, tmp_path / f"{i}.png", PROMPT, [["vcd"], ["vhr"]])))

    def visit(i):
        together[i] = last(compare.compare(loaded, tmp_path / f"{i}.png", PROMPT, [["vcd"], ["vhr"]]))

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert [[p.text for p in panes] for panes in together] == [[p.text for p in panes] for panes in alone]


def test_a_pane_says_what_the_model_used(loaded, scene):
    pane = last(compare.compare(loaded, scene, PROMPT, []))[0]
    assert pane.peak_mb > 100 and f"peak memory {pane.peak_mb:.0f} MB" in card(pane)
    assert loaded.processor.tokenizer.decode(pane.ids, skip_special_tokens=True).strip() == pane.text.strip()


def test_turns_are_taken_in_order():
    turn, order, started = models.Turn(), [], []

    def ask(name):
        started.append(name)
        with turn:
            order.append(name)

    with turn:
        threads = []
        for i in range(5):
            threads.append(threading.Thread(target=ask, args=(i,)))
            threads[-1].start()
            while len(turn.line) < i + 2:
                time.sleep(0.001)
        turn.pass_on()
        assert order == started == [0, 1, 2, 3, 4]
    [thread.join() for thread in threads]
    assert not turn.line


def test_a_stack_is_refused_before_it_runs(loaded):
    assert loaded.refusal(["vcd", "vhr"]) == loaded.refusal([]) == ""
    assert loaded.refusal(["vcd", "pai:gamma=1.1"]) == "vcd and pai both contrast; use one of them at a time."
    assert loaded.refusal(["decore"]) == ""  # whose heads come with the model
    assert loaded.refusal(["pai:layers=40-41"]).startswith("pai: layers='40-41' does not fit this model")


def test_cards_escape():
    pane = compare.Pane(["<b>"], "failed", text="<script>", notes=["<img src=x>"])
    assert not any(tag in card(pane) for tag in ("<b>", "<script>", "<img"))
    assert "&lt;script&gt;" in card(pane)


@pytest.mark.parametrize(("temperature", "which"), [(0, "scene:0"), (0.7, "scene:0"), (0, "coco:126107")])
def test_the_python_copy_gives_the_same_answers(loaded, scene, temperature, which, capsys):
    examples.find(which).image.save(scene)
    stacks = [["vcd"], ["vhr", "hiprune:keep=32"]]
    panes = last(compare.compare(loaded, scene, PROMPT, stacks, 24, temperature, seed=3))
    exec(compare.recipes(loaded.name, scene, PROMPT, stacks, compare.how(24, temperature), 3)[0], {})
    expected = [line for pane in panes for line in (pane.title, pane.text.strip())]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_python_copy_of_an_upload_runs(loaded, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (99, 60), "green").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    panes = last(compare.compare(loaded, "image.png", 'say "hi"', [], 8))
    exec(compare.recipes(loaded.name, "image.png", 'say "hi"', [], compare.how(8, 0), 0)[0], {})
    assert capsys.readouterr().out.splitlines() == ["baseline", panes[0].text.strip()]


@pytest.mark.parametrize("which", ["scene:1", "coco:126107"])
def test_the_command_copy_gives_the_same_answers(loaded, tmp_path, which, capsys):
    examples.find(which).image.save(tmp_path / "1.png")
    stacks = [["pai:alpha=0.5,gamma=1.1", "vhr"]]
    what = (tmp_path / "1.png", PROMPT, stacks)
    panes = last(compare.compare(loaded, *what, 16))
    words = shlex.split(compare.recipes(loaded.name, *what, compare.how(16, 0), 0)[1].replace("\\\n", ""))
    assert words[0] == "vlm-fix" and cli.main([*words[1:], "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    wanted = 126107 if "coco" in which else picto.scene(examples.SPLIT, 0, 1).image_id
    answers = {row["run"]: row["answer"] for row in rows if row["image_id"] == wanted}
    assert answers == {"+".join(pane.stack): pane.text.strip() for pane in panes}
