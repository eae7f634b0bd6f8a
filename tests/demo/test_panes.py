"""What is in the panes: prepared answers, answers to other questions taken away, yes and no graded, methods by kind."""

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError, list_methods, parse_spec
from vlm_fix.demo import choices, compare, examples, panes, prepared
from vlm_fix.demo.cards import card
from vlm_fix.eval.picto import questions


def test_prepared_answers_are_what_the_model_says(loaded):
    held = prepared.answers()[loaded.identity["weights"]]
    every = (*examples.scenes(), *examples.photographs())
    assert list(held) == [each.name for each in every]
    assert all(list(stacks) == ["baseline", *("+".join(stack) for stack in choices.START)] for stacks in held.values())
    assert prepared.make(loaded, [every[1]]) == {every[1].name: held[every[1].name]}
    assert any(
        label == "hallucinated"
        for stack in held["scene:0"]
        for _, label, _ in prepared.pane(
            loaded.identity["weights"], every[0], PROMPT, prepared.LONGEST, 0, [stack]
        ).words()
    )


def test_prepared_answers_are_of_these_settings_alone(loaded):
    weights, example = loaded.identity["weights"], examples.scenes()[0]
    asked = (weights, example, PROMPT, prepared.LONGEST, 0, ["vcd"])
    made = prepared.pane(*asked)
    assert made.state == "done" and made.prepared and "made earlier" in card(made)
    others = ("sha256:other", None, "Is there a dog?", 32, 0.5, ["vcd:alpha=0.2"])
    for i, other in enumerate(others):
        assert prepared.pane(*asked[:i], other, *asked[i + 1 :]) is None


def test_answers_to_something_else_are_taken_away(catalogue, scene):
    board, path = panes.Board(catalogue), str(scene)
    how, stacks = ("picto-llava", path, "Say something.", 64, 0, 0), {0: ["baseline"], 1: ["vcd"], 2: ["vcd+icd"]}
    mine = {0: compare.Pane(["baseline"], "done", text="a dog"), 1: compare.Pane(["vcd"], "done", text="a cat")}
    asked = compare.Asked(how[0], None, how[2], mine, how)
    now = board.settled(asked, how, stacks)
    assert now.panes[0] is mine[0] and now.panes[1] is mine[1]
    assert now.panes[2].state == "failed" and "both contrast" in now.panes[2].notes[0]
    other = board.settled(asked, how, {0: ["baseline"], 1: ["vcd:alpha=0.5"]})
    assert other.panes[0] is mine[0] and other.panes[1] == compare.Pane(["vcd:alpha=0.5"])
    for i, value in enumerate(("else", None, "Say more.", 12, 0.5, 1)):
        changed = board.settled(asked, (*how[:i], value, *how[i + 1 :]), {0: ["baseline"], 1: ["vcd"]})
        assert [pane.state for pane in changed.panes.values()] == ["idle", "idle"]
    begun = board.settled(None, (*how[:2], PROMPT, *how[3:]), {0: ["baseline"], 1: ["vcd"]})
    assert all(pane.prepared and pane.state == "done" for pane in begun.panes.values())


def test_yes_and_no_are_graded_on_scenes(loaded):
    for example in examples.scenes():
        offered = examples.asks(example)
        labels = [examples.label(example, text) for text in offered]
        assert labels[:2] == ["no", "yes"] and set(labels) <= {"yes", "no"} and len(offered) == 4
    scene, boat = examples.scenes()[0], "Is there a boat in the image?"
    for asked in questions.about(examples._scenes()[0]):
        assert examples.label(scene, asked.text) == asked.label
    assert examples.label(scene, boat) == "yes" and examples.label(scene, "is there any bird in this picture?") == "no"
    for unknown in ("Is it a nice boat?", "Is there a boat and a bird in the image?", PROMPT, "Is there a unicorn?"):
        assert examples.label(scene, unknown) == ""
    assert examples.label(examples.photographs()[0], boat) == examples.label(None, boat) == ""
    (pane,) = last(compare.compare(loaded, scene.image, boat, [], 8))
    assert pane.text.strip() == "yes" and pane.right() is True and pane.score() is None
    assert [(text, label) for text, label, _ in pane.words() if label] == [("yes", "grounded")] and ">right<" in card(
        pane
    )
    for text, state, right in (("No, no boat.", "done", False), ("Perhaps.", "done", False), ("Yes", "running", None)):
        assert compare.Pane(["vcd"], state, label="yes", text=text).right() is right
    wrong = compare.Pane(["vcd"], "done", label="yes", text="There is no boat.")
    assert [label for _, label, _ in wrong.words() if label] == ["hallucinated"] and ">wrong<" in card(wrong)
    assert "".join(text for text, _, _ in wrong.words()) == wrong.text


def test_state_and_errors_stand_below_the_name():
    for state in ("idle", "waiting", "running", "done", "stopped", "failed"):
        made = card(compare.Pane(["vcd"], state, text="a dog" if state == "done" else "", notes=["why"]))
        assert made.index("<h3>vcd") < made.index('class="state"') < made.index(">why<")
        assert "said" not in made or made.index(">why<") < made.index('class="said')
    said = card(compare.Pane(["vcd"], "done", text="a dog runs"))
    assert said.count('role="button"') == 3 and said.count('tabindex="0"') == 1  # arrows lead on from there


def test_methods_by_kind_with_a_line_each():
    names = choices.listed()
    assert sorted(names) == sorted(cls.name for cls in list_methods() if cls.name != "baseline")
    kinds = [next(cls.kind for cls in list_methods() if cls.name == name) for name in names]
    assert [kind for i, kind in enumerate(kinds) if not i or kinds[i - 1] != kind] == list(dict.fromkeys(kinds))
    for label, name in choices.method_choices():
        head, _, rest = label.partition("\n")
        assert head == name and 12 < len(rest) < 120
    book = choices.catalogue(3)
    assert book.count("data-method=") == 3 * len(names) and f'data-method="{len(names) - 1}" data-pane="3"' in book


def test_presets_run_on_the_bundled_model(loaded):
    recommended = [parse_spec("vhr:alpha=1.5")]
    found = choices.presets(recommended)
    assert next(iter(found)) == choices.RECOMMENDED and found[choices.RECOMMENDED][0] == recommended
    assert choices.RECOMMENDED not in choices.presets()
    for stacks in found.values():
        assert len(stacks) == len(choices.START)
        for stack in stacks:
            assert not loaded.refusal([method.spec() for method in stack])


def test_a_bad_setting_is_left_to_compare():
    with pytest.raises(VlmFixError):
        panes.stacks_of(4, [["vcd"], {"vcd": {"alpha": "x"}}, [], {}, [], {}])
    assert panes.stacks_of(2, [["vcd"], {}, ["vhr"], {}, [], {}]) == {0: ["baseline"], 1: ["vcd"]}
