"""The demo: what its panes say equals what a benchmark gets, every error is a sentence, and a browser can use it."""

import asyncio
import base64
import contextlib
import copy
import dataclasses
import html
import io
import itertools
import json
import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.request
import zlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

gr = pytest.importorskip("gradio", reason="the demo needs gradio")

import vlm_fix  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402
from vlm_fix import VlmFixError, cli, list_methods, parse_spec  # noqa: E402
from vlm_fix.decoding import ProcedureWing  # noqa: E402
from vlm_fix.demo import app, benchmark, compare, examples, inside, look, models, tools  # noqa: E402
from vlm_fix.demo.page import stop_with  # noqa: E402
from vlm_fix.demo.panes import about, card, control, remember  # noqa: E402
from vlm_fix.eval import picto  # noqa: E402
from vlm_fix.eval.run import generation, runner  # noqa: E402
from vlm_fix.eval.scorers.chair import data as chair_data  # noqa: E402
from vlm_fix.session import Call  # noqa: E402
from vlm_fix.wing import engine_of  # noqa: E402

PROMPT = compare.CAPTION_PROMPT
EXTRA: dict[str, str] = {}  # methods that need a parameter


@pytest.fixture(scope="module")
def loaded():
    return models.Loaded("picto-llava")


@pytest.fixture
def scene(tmp_path):
    """The first example scene as a file."""
    examples.scenes()[0].image.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def last(made_of):
    for made in made_of:
        result = made
    return result


# --------------------------------------------------------------------------------------------------------------- panes


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


# -------------------------------------------------------------------------------------------------------------- models


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


def test_a_stack_is_refused_before_it_runs(loaded):
    assert loaded.refusal(["vcd", "vhr"]) == loaded.refusal([]) == ""
    assert loaded.refusal(["vcd", "pai:gamma=1.1"]) == "vcd and pai both contrast; use one of them at a time."
    assert loaded.refusal(["decore"]) == ""  # whose heads come with the model
    assert loaded.refusal(["pai:layers=40-41"]).startswith("pai: layers='40-41' does not fit this model")


# --------------------------------------------------------------------------------------------------------- look inside


@pytest.fixture(scope="module")
def views(loaded):
    """Baseline, pai, vcd and hiprune looked into, by name."""
    image = examples.scenes()[0].image
    stacks = [["pai:alpha=0.5"], ["vcd"], ["hiprune:keep=24"]]
    panes = last(compare.compare(loaded, image, PROMPT, stacks))
    return {pane.stack[0].partition(":")[0]: inside.look(loaded, image, PROMPT, pane) for pane in panes}


def test_a_words_heatmap_is_the_attention_of_the_rows_that_predict_it(loaded, views):
    """Against the weights of an eager copy of the model, over the whole sequence at once."""
    view, twin = views["baseline"], copy.deepcopy(loaded.model)
    twin.set_attn_implementation("eager")
    inputs = generation.encode(twin, loaded.processor, [examples.scenes()[0].image], [PROMPT])
    prompt = inputs["input_ids"][0].tolist()
    whole = torch.tensor([prompt + view.pane.ids])
    with torch.no_grad():
        out = twin(input_ids=whole, pixel_values=inputs["pixel_values"], output_attentions=True)
    columns = [i for i, token in enumerate(prompt) if token == twin.config.image_token_index]
    tokens = [loaded.processor.tokenizer.decode([i]) for i in view.pane.ids]
    for i, word in enumerate(view.words):
        assert "".join(tokens[row] for row in word.rows).replace(" ", "") == word.text.replace(" ", "")
        a = torch.stack(out.attentions)[:, 0][:, :, [len(prompt) - 1 + row for row in word.rows]]
        a = a[..., columns].mean(2)  # [layers, heads, 64]
        assert torch.allclose(view.heatmap(i, None, None), a.mean((0, 1)).view(8, 8), atol=1e-5)
        assert torch.allclose(view.heatmap(i, 2, 5), a[2, 5].view(8, 8), atol=1e-5)
        assert torch.allclose(view.mass(i), a.sum(-1), atol=1e-5)
        assert torch.allclose(view.mass(i, 2, 5), a[2, 5].sum(), atol=1e-5) and view.mass(i, None, 5).shape == (6, 1)
    labels = [word.label for word in view.words]
    assert view.first == labels.index("hallucinated") and "grounded" in labels
    assert sorted(row for word in view.words for row in word.rows) == list(range(len(view.pane.ids) - 1))  # not the end


def test_what_a_method_changes(loaded, views):
    view = views["pai"]
    inputs = generation.encode(loaded.model, loaded.processor, [examples.scenes()[0].image], [PROMPT])
    plain = vlm_fix.observe(loaded.model, inputs, view.pane.ids)
    rows = view.words[3].rows
    expected = sum(view.seen.heatmap(row, [4]) - plain.heatmap(row, [4]) for row in rows) / len(rows)
    change = view.heatmap(3, 4, None, "change")
    assert torch.allclose(change, expected, atol=1e-6) and change.abs().max() > 1e-3
    assert views["vcd"].heatmap(3, None, None, "change").abs().max() == 0  # it edits no attention
    with pytest.raises(VlmFixError, match="no method to hold against it"):
        views["baseline"].heatmap(0, None, None, "change")
    assert views["baseline"].others == views["pai"].others == []


def test_pruned_patches_and_noised_images_are_the_methods_own(loaded, views):
    dropped = views["hiprune"].dropped(None)
    assert dropped.shape == (8, 8) and int((~dropped).sum()) == 24 and views["pai"].dropped(2) is None
    assert (views["hiprune"].heatmap(0, None, None)[dropped] == 0).all()
    ((title, _, image),) = views["vcd"].others
    pixels = generation.encode(loaded.model, loaded.processor, [examples.scenes()[0].image], [PROMPT])["pixel_values"]
    call = Call(loaded.model, None, {"pixel_values": pixels})
    expected = inside.unpixel(loaded.processor, vlm_fix.parse_spec("vcd").noised(pixels, call))[0]
    assert title.startswith("vcd: ") and image.tobytes() == expected.tobytes() != views["vcd"].picture.tobytes()
    seen, sent = (np.asarray(x, dtype=int) for x in (views["vcd"].picture, examples.scenes()[0].image))
    assert abs(seen - sent).max() <= 1


def test_a_crop_takes_the_images_place(loaded):
    image = examples.scenes()[0].image
    *_, pane = last(compare.compare(loaded, image, PROMPT, [["carve"]], 12))
    assert pane.state == "done"
    view = inside.look(loaded, image, PROMPT, pane)
    inputs = dict(generation.encode(loaded.model, loaded.processor, [image], [PROMPT]))
    with vlm_fix.wrapped(loaded.model, "carve"):
        call = Call(loaded.model, engine_of(loaded.model).family, inputs)
        crop = engine_of(loaded.model).wing(ProcedureWing).refine(call)["pixel_values"]
    assert view.picture.tobytes() == inside.unpixel(loaded.processor, crop)[0].tobytes()
    assert [(title, shown) for title, _, shown in view.others] == [("Before carve", image)]
    plain = vlm_fix.observe(loaded.model, {**inputs, "pixel_values": crop}, pane.ids)
    expected = torch.stack([plain.heatmap(row) for row in view.words[0].rows]).mean(0)
    assert torch.allclose(view.heatmap(0, None, None), expected, atol=1e-6)
    assert view.base is None and "shows the model another image" in look.figures(view, 0, None, None)


def test_a_crop_comes_after_the_image(loaded):
    """The heatmap stays on the image, so that it can be held against the baseline's."""
    image, methods = examples.scenes()[0].image, ["carve:images=both"]
    *_, pane = last(compare.compare(loaded, image, PROMPT, [methods], 12))
    assert pane.state == "done" and pane.tokens
    view = inside.look(loaded, image, PROMPT, pane)
    inputs = dict(generation.encode(loaded.model, loaded.processor, [image], [PROMPT]))
    with vlm_fix.wrapped(loaded.model, methods):
        call = Call(loaded.model, engine_of(loaded.model).family, dict(inputs))
        both = {**inputs, **engine_of(loaded.model).wing(ProcedureWing).refine(call)}
    sent, crop = inside.unpixel(loaded.processor, both["pixel_values"])
    assert view.picture.tobytes() == sent.tobytes() and not view.note
    assert [(title, shown) for title, _, shown in view.others] == [("carve: a second image", crop)]
    for seen, given in ((view.seen, both), (view.base, inputs)):
        plain = vlm_fix.observe(loaded.model, given, pane.ids)
        assert torch.allclose(seen.heatmap(0, image=0), plain.heatmap(0, image=0), atol=1e-6)
    assert view.heatmap(0, None, None, "change").abs().max() > 0 and look.figures(view, 0, None, None)


def test_flattened_patches_become_the_image_again():
    how = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 84)
    image = examples.photographs()[0].image.resize((84, 56))
    made = how([image, image.transpose(Image.Transpose.ROTATE_90)], return_tensors="pt")
    back = inside.unpatch(types.SimpleNamespace(image_processor=how), made["pixel_values"], made["image_grid_thw"])
    for got, sent in zip(back, (image, image.transpose(Image.Transpose.ROTATE_90)), strict=True):
        assert got.size == sent.size and abs(np.asarray(got, dtype=int) - np.asarray(sent, dtype=int)).max() <= 1


def test_drawings_show_their_numbers():
    picture, heat = Image.new("RGB", (64, 32), (90, 120, 150)), torch.zeros(4, 8)
    heat[1, 6] = 0.3
    drawn = np.asarray(inside.overlay(picture, heat, 0.3), dtype=int).sum(-1)
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (y * 4 // drawn.shape[0], x * 8 // drawn.shape[1]) == (1, 6)
    heat[3, 0] = -0.3
    red = np.asarray(inside.overlay(picture, heat, 0.3, signed=True), dtype=int)
    side = red.shape[0] // 4
    assert red[side * 3 // 2, side * 13 // 2, 0] > red[side * 3 // 2, side * 13 // 2, 2] + 50
    assert red[side * 7 // 2, side // 2, 2] > red[side * 7 // 2, side // 2, 0] + 50
    sinks = torch.zeros(4, 8, dtype=torch.bool)
    sinks[2, 2] = True
    ringed = inside.overlay(picture, torch.zeros(4, 8), 1, sinks=sinks)
    assert (np.asarray(ringed) == 255).all(-1).any() and not (np.asarray(ringed)[:, side * 4 :] == 255).all(-1).any()
    kept = np.asarray(inside.pruned(picture, ~sinks), dtype=int)
    centre = kept[side * 5 // 2, side * 5 // 2]
    assert centre.tolist() == [90, 120, 150] and kept[side // 2, side // 2].sum() < 0.6 * centre.sum()


def test_the_page_of_a_look(views):
    view = views["baseline"]
    shown = look.spoken(view, view.first)
    assert shown.count("<button") == len(view.words) and shown.count('aria-pressed="true"') == 1
    assert f'data-word="{view.first}" class="word hallucinated"' in shown
    for view in views.values():
        made = look.figures(view, view.first, None, None)
        assert made.count("<img") == made.count("<figcaption>") and 'alt=""' not in made
    assert "leaves this attention as it is" in look.figures(views["vcd"], 0, None, None)
    assert "24 of 64 patches reach the last layer" in look.figures(views["hiprune"], 0, None, None)
    assert "pai:alpha=0.5 minus baseline" in look.figures(views["pai"], 0, 5, 2)
    grid = look.heads(view, 0, 3, None)
    assert grid.count("<i ") == 6 * 8 and grid.count("<button") == 8 and grid.count('class="on"') == 8
    strange = dataclasses.replace(view, words=[inside.Word('<b>"x"', (0,), None)])
    assert "<b>&quot;" not in look.spoken(strange, 0) + look.figures(strange, 0, None, None)


def test_sinks_are_ringed_and_taken_out(views):
    view = views["baseline"]
    marked = view.seen.image_sinks.clone()
    marked[2, 9] = True  # this model has none of its own
    view = dataclasses.replace(view, seen=dataclasses.replace(view.seen, image_sinks=marked))
    assert (
        view.sinks(2).nonzero().tolist() == [[1, 1]] == view.sinks(None).nonzero().tolist() and not view.sinks(3).any()
    )
    raw, masked = (view.heatmap(0, 2, None, what) for what in ("raw", "masked"))
    assert raw[1, 1] > 0 == masked[1, 1] and torch.equal(raw.flatten()[10:], masked.flatten()[10:])
    assert "1 sink tokens (ringed) taken out" in look.figures(view, 0, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("cls", list_methods(), ids=lambda c: c.name)
def test_every_method_answers_and_can_be_looked_into(loaded, cls):
    """Or the page says in a sentence why not."""
    image = examples.scenes()[0].image
    stack = [EXTRA.get(cls.name, cls.name)] if cls.name != "baseline" else []
    *_, pane = last(compare.compare(loaded, image, PROMPT, [stack] if stack else [], 12))
    assert pane.state == "done" or (len(pane.notes) == 1 and not pane.notes[0].partition(":")[0].endswith("Error"))
    if pane.state == "done":
        try:
            view = inside.look(loaded, image, PROMPT, pane)
        except VlmFixError as error:
            assert "\n" not in str(error)
        else:
            assert all(word.rows for word in view.words)
            assert view.note in html.unescape(look.figures(view, 0, None, None))
    assert not hasattr(loaded.model, "_vlm_fix_engine")


def test_an_answer_that_was_stopped_cannot_be_looked_into(loaded, scene):
    with pytest.raises(VlmFixError, match="not finished"):
        inside.look(loaded, examples.scenes()[0].image, PROMPT, compare.Pane(["vcd"], "stopped", "a dog"))


# ----------------------------------------------------------------------------------------------------------- benchmark

SMALL = ("picto-llava", "all", "shift", 3, ["vhr:alpha=3+hiprune:keep=32"], 3)


@pytest.fixture(scope="module")
def measured(loaded, tmp_path_factory):
    """A benchmark that was stopped after some batches and continued, with comparisons in between."""
    folder, settings = tmp_path_factory.mktemp("bench") / "run", benchmark.settings_of(*SMALL)
    stop, seen, said = compare.Stop(), [], []
    for state in benchmark.run(loaded, settings, folder, stop):
        seen.append(state)
        if state.done and not said:
            said.append(last(compare.compare(loaded, examples.scenes()[0].image, PROMPT, [["vhr"]])))
            stop.set()
    assert seen[-1].results is None and 0 < seen[-1].done < seen[-1].total
    seen = list(benchmark.run(loaded, settings, folder, compare.Stop()))
    return settings, folder, seen, said[0]


def test_a_stopped_benchmark_continues_and_equals_the_runner(loaded, measured, tmp_path):
    settings, _, seen, said = measured
    lone = runner.evaluate(settings, tmp_path, console=benchmark.Console(quiet=True))
    timed = ("date", "speed")
    got = seen[-1].results
    assert {k: v for k, v in got.items() if k not in timed} == {k: v for k, v in lone.items() if k not in timed}
    assert seen[-1].done == seen[-1].total == sum(count["answers"] for count in got["changed"].values())
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    alone = last(compare.compare(loaded, examples.scenes()[0].image, PROMPT, [["vhr"]]))
    assert [pane.text for pane in said] == [pane.text for pane in alone]
    assert not hasattr(loaded.model, "_vlm_fix_engine") and not loaded.turn.line


def test_results_are_shown_kept_and_opened_again(measured, tmp_path):
    results = measured[2][-1].results
    picture, archive = benchmark.keep(results, measured[1])
    assert Image.open(picture).width > 500
    shutil.unpack_archive(archive, tmp_path / "out")
    assert {"results.json", "samples.jsonl", "table.md", "figure.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert benchmark.open_results(tmp_path / "out") == benchmark.open_results(tmp_path / "out/results.json") == results
    shown = benchmark.table(results)
    for run, scores in results["runs"].items():
        assert f"| `{run}` |" in shown and f"{100 * scores['chair']['captions']['recall']:.1f}" in shown
    assert shown.count("<small>") >= sum(
        len(split["delta"])
        for scores in results["runs"].values()
        for part in scores.values()
        for split in part.values()
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 1}', '{"runs": {"a": {}}}'])
def test_what_is_no_result_is_one_sentence(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(VlmFixError, match="This is no results.json") as error:
        benchmark.open_results(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(VlmFixError, match="There is no results.json"):
        benchmark.open_results(tmp_path / "nowhere")


def test_a_benchmark_that_cannot_run_is_one_sentence(loaded, tmp_path):
    with pytest.raises(VlmFixError, match="1 to 500 scenes, not 501"):
        benchmark.settings_of("picto-llava", "pope", "shift", 501, [], 0)
    settings = benchmark.settings_of("picto-llava", "pope", "shift", 5, ["vcd+icd"], 0)
    with pytest.raises(VlmFixError, match="both contrast"):
        last(benchmark.run(loaded, settings, tmp_path / "run", compare.Stop()))
    assert not loaded.turn.line


def test_the_benchmark_command_is_the_same_run(monkeypatch, tmp_path, capsys):
    settings, seen = benchmark.settings_of(*SMALL), []

    def evaluate(*given, **options):
        seen.append(given[0])
        raise VlmFixError("enough")

    monkeypatch.setattr(runner, "evaluate", evaluate)
    words = shlex.split(benchmark.as_command(settings).replace("\\\n", ""))
    assert cli.main([*words[1:], "--output", str(tmp_path)]) == 2 and seen == [settings]
    capsys.readouterr()


# --------------------------------------------------------------------------------------------------------------- input


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "text": (b"not an image", "not a readable image"),
    "empty": (b"", "not a readable image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not a readable image"),
    "truncated": (None, "not a readable image"),
    "large": (png_header(5001, 5000), "5001 x 5000 pixels"),
    "bomb": (png_header(60000, 60000), "too many pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence(loaded, scene, tmp_path, name):
    data, words = BAD[name]
    file = tmp_path / "bad.png"
    file.write_bytes(scene.read_bytes()[:2000] if data is None else data)
    with pytest.raises(VlmFixError, match=words) as error:
        next(compare.compare(loaded, file, PROMPT, []))
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_no_image_and_no_prompt(loaded, scene):
    with pytest.raises(VlmFixError, match="no image yet"):
        next(compare.compare(loaded, None, PROMPT, []))
    with pytest.raises(VlmFixError, match="no prompt"):
        next(compare.compare(loaded, scene, "  ", []))


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert compare.read_image(tmp_path / "turned.jpg").size == (20, 40)


def test_cards_escape():
    pane = compare.Pane(["<b>"], "failed", "<script>", ["<img src=x>"])
    assert not any(tag in card(pane) for tag in ("<b>", "<script>", "<img"))
    assert "&lt;script&gt;" in card(pane)


# ------------------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("cls", list_methods(), ids=lambda c: c.name)
def test_each_field_has_a_control_that_sets_it(cls):
    for field in dataclasses.fields(cls):
        made = control(cls, field, None)
        assert made.info == field.metadata["help"] and made.label == field.name
        untouched = remember({}, made.value, method=cls.name, field=field.name)
        if made.value != "auto":
            assert compare.stack_of([cls.name], untouched) == [cls.name]
        if isinstance(made, gr.Slider):
            low, high = field.metadata["low"], field.metadata["high"]
            low += made.step if field.metadata.get("open") else 0  # such as keep, which must be above 0
            assert made.minimum == low and made.maximum == (5 * field.default if high is None else high)
            for end in (made.minimum, made.maximum):
                spec = compare.stack_of([cls.name], remember({}, end, method=cls.name, field=field.name))[0]
                assert getattr(parse_spec(spec), field.name) == pytest.approx(end, rel=1e-5)


@pytest.mark.parametrize("cls", list_methods(), ids=lambda c: c.name)
def test_each_method_is_explained(cls):
    shown = html.unescape(about(cls))
    for line in (cls.__doc__ or "").strip().splitlines():
        assert line.strip() in shown
    assert cls.paper in shown


def test_the_kind_of_control():
    pai, hiprune = (next(c for c in list_methods() if c.name == name) for name in ("pai", "hiprune"))
    kinds = {
        f.name: type(control(c, f, None)) for c in (pai, hiprune) for f in dataclasses.fields(c) if f.name != "alpha"
    }
    assert kinds["beta"] is kinds["gamma"] is gr.Slider
    assert kinds["positions"] is gr.Dropdown and kinds["layers"] is kinds["keep"] is gr.Textbox


def test_an_emptied_box_is_the_default():
    options = remember({}, "2-3", method="pai", field="layers")
    assert compare.stack_of(["pai"], options) == ["pai:layers=2-3"]
    assert compare.stack_of(["pai"], remember(options, "", method="pai", field="layers")) == ["pai"]


# --------------------------------------------------------------------------------------------------------------- tools


@pytest.fixture(scope="module")
def catalogue(loaded):
    """A page's models, one of them loaded."""
    made = models.Models(["picto-llava"])
    made.loaded["picto-llava"] = loaded
    return made


def test_tools_say_what_panes_say(loaded, catalogue, scene):
    describe, ask, compared = tools.tools(catalogue)
    panes = last(compare.compare(loaded, scene, PROMPT, [["vcd"], ["vhr", "hiprune:keep=32"]], 128))
    rows = json.loads(compared("scene:0", methods="vcd,baseline,vhr+hiprune:keep=32"))
    assert [row["methods"] for row in rows] == [pane.title for pane in panes]
    for row, pane in zip(rows, panes, strict=True):
        assert row["answer"] == pane.text.strip() and row["chair_i"] == pane.score().chair_i
        assert set(row["hallucinated"]) == {node for _, label, node in pane.words() if label == "hallucinated"}
    assert describe("scene:0", "baseline") == rows[0]["answer"] and describe("scene:0", "vcd") == rows[1]["answer"]
    encoded = base64.b64encode(scene.read_bytes()).decode()
    for image in (encoded, f"data:image/png;base64,{encoded}"):
        assert ask(image, "Is there a dog in the image?") == ask("scene:0", "Is there a dog in the image?") == "yes"


@pytest.mark.parametrize(
    ("tool", "given", "words"),
    [
        (0, {"image": "nothing"}, "There is no such image"),
        (0, {"image": "/etc/hostname"}, "There is no such image"),
        (0, {"image": "data:image/png;base64,AAAA"}, "not a readable image"),
        (0, {"image": "scene:99"}, "no example 'scene:99'"),
        (0, {"image": "scene:0", "methods": "vcd,vhr"}, "2 runs: join methods with"),
        (0, {"image": "scene:0", "longest": 5000}, "give 1 to 512"),
        (0, {"image": "scene:0", "model": "/tmp"}, "This page offers picto-llava"),
        (1, {"image": "scene:0", "question": " "}, "no prompt"),
        (2, {"image": "scene:0", "methods": "vcd+icd"}, "both contrast"),
        (2, {"image": "scene:0", "methods": "vcd:alpha=x"}, "not a valid value"),
    ],
)
def test_tools_refuse_in_a_sentence(catalogue, tool, given, words):
    with pytest.raises(VlmFixError, match=words):
        tools.tools(catalogue)[tool](**given)


def test_files_are_read_on_this_machine_only(scene):
    assert tools.image_of(str(scene), own=True).tobytes() == examples.scenes()[0].image.tobytes()
    with pytest.raises(VlmFixError, match="no such image"):
        tools.image_of(str(scene), own=False)


def test_the_server_for_programs(catalogue):
    client = pytest.importorskip("mcp.client.streamable_http", reason="the MCP server needs mcp")
    from mcp import ClientSession

    page = app.build(catalogue, mcp=True)
    _, url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, mcp_server=True, show_error=True)

    async def talk():
        async with (
            client.streamablehttp_client(f"{url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            offered = (await session.list_tools()).tools
            good = await session.call_tool("ask", {"image": "scene:0", "question": "Is there a dog in the image?"})
            return offered, good, await session.call_tool("describe", {"image": "scene:99"})

    try:
        offered, good, bad = asyncio.run(talk())
    finally:
        page.close()
    assert [tool.name for tool in offered] == ["describe", "ask", "compare"]
    for tool in offered:
        assert all(about.get("description") for about in tool.inputSchema["properties"].values())
    assert not good.isError and good.content[0].text == "yes"
    assert bad.isError and bad.content[0].text.startswith("There is no example 'scene:99'")


def test_without_mcp_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--mcp"]) == 2
    assert "pip install '.[mcp]'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- copies


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


# ----------------------------------------------------------------------------------------------------------------- page


def test_the_page_is_built(catalogue):
    page = app.build(catalogue)
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Image", "Prompt", "Baseline", "Methods 1", "Methods 3", "As Python", "Number of scenes"} <= labels
    folders = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == "folder"]
    assert [block.visible for block in folders] == [False]  # others may reach this page


def test_each_visitor_stops_their_own_run():
    stops = {"me": compare.Stop(), "you": compare.Stop()}
    mine, yours = stops.values()
    with gr.Blocks() as page:
        stop_with(page, gr.Button(), stops)
    press, leave = (event.fn for event in page.fns.values())
    press(types.SimpleNamespace(session_hash="nobody"))
    press(types.SimpleNamespace(session_hash="me"))
    assert mine.is_set() and not yours.is_set() and len(stops) == 2
    leave(types.SimpleNamespace(session_hash="you"))
    assert yours.is_set() and list(stops) == ["me"]


def test_without_gradio_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vlm_fix.demo.app")
    assert cli.main(["demo"]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("where", [["--port", "99999"], ["--host", "203.0.113.9"]])
def test_an_address_that_cannot_be_served(where, capsys):
    assert cli.main(["demo", *where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The page cannot be served on") and error.count("\n") == 1


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of `vlm-fix demo`, run as a person would; at its end no image may be left."""
    folder = tmp_path_factory.mktemp("uploads")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = subprocess.Popen(
        [sys.executable, "-m", "vlm_fix.cli", "demo", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)},
    )
    try:
        assert any("Running on" in line for line in run.stdout), "the demo ended before it served a page"
        assert list(folder.glob("vlm-fix-demo-*/**/*.png")), "the examples are served from here"
        yield f"http://127.0.0.1:{port}"
    finally:
        run.terminate()
        run.wait(20)
    assert not list(folder.glob("vlm-fix-demo-*"))


@pytest.mark.slow
def test_only_this_machine_and_small_files(site):
    port = int(site.rsplit(":", 1)[1])
    with socket.socket() as other, contextlib.suppress(OSError):
        other.connect((socket.gethostbyname(socket.gethostname()), port))
        assert other.getpeername()[0].startswith("127.")
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(21 << 20)
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{site}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 413


@pytest.fixture(scope="module")
def artifacts():
    """Where pictures of the tabs are kept to be looked at."""
    folder = ROOT / "build/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("the browser test needs chromium")
    flags = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in flags.split()])
        yield started
        started.close()


@pytest.fixture
def page(browser, site):
    made = browser.new_page(viewport={"width": 390, "height": 844})
    outside = []
    made.on("request", lambda r: outside.append(r.url) if not r.url.startswith((site, "data:", "blob:")) else None)
    made.goto(site)
    made.wait_for_selector("#pane2")
    yield made
    made.close()
    assert not outside, "the page asked another machine for something"


@pytest.mark.slow
def test_in_a_browser(page, artifacts, loaded, scene):
    page.click("#go")
    page.wait_for_selector("#pane2 .card.done", timeout=60_000)
    panes = last(compare.compare(loaded, scene, PROMPT, [["vcd"], ["vhr"]]))
    for i, pane in enumerate(panes):
        assert page.inner_text(f"#pane{i} .said") == pane.text.strip()
    assert page.locator("mark.hallucinated").count() >= 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=artifacts / "compare-phone.png", full_page=True)

    page.get_by_text("vcd: settings").click()
    number = page.get_by_label("number input for alpha").first
    number.fill("2")
    number.press("Tab")
    page.wait_for_timeout(500)
    page.locator("#examples button.thumbnail-item").nth(1).click()
    page.wait_for_timeout(500)
    page.click("#go")
    page.wait_for_function("document.querySelector('#pane1 h3').innerText == 'vcd:alpha=2.0'")
    page.wait_for_selector("#pane2 .card.done", timeout=60_000)
    page.get_by_text("Copy what was run").click()
    page.wait_for_selector("#python >> text=vcd:alpha=2.0")
    assert 'find("scene:1")' in page.inner_text("#python")
    assert "--method vcd:alpha=2.0,vhr" in page.inner_text("#command")
    page.locator("#m1 input").fill("icd")
    page.locator("#m1 input").press("Enter")
    page.wait_for_selector("#pane1 .card.failed >> text=vcd and icd both contrast")


@pytest.mark.slow
def test_two_sessions_in_a_browser(browser, site, loaded, tmp_path):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for i, page in enumerate(pages):
        page.goto(site)
        page.wait_for_selector("#pane2")
        page.locator("#examples button.thumbnail-item").nth(i + 1).click()
        page.wait_for_timeout(1000)
    for page in pages:
        page.click("#go")
    for i, page in enumerate(pages):
        page.wait_for_selector("#pane2 .card.done", timeout=60_000)
        examples.scenes()[i + 1].image.save(tmp_path / "scene.png")
        panes = last(compare.compare(loaded, tmp_path / "scene.png", PROMPT, [["vcd"], ["vhr"]]))
        assert [page.inner_text(f"#pane{n} .said") for n in range(3)] == [pane.text.strip() for pane in panes]
        page.context.close()


@pytest.mark.slow
def test_pictures_of_the_tabs(browser, site, artifacts):
    """As on a desk, light and dark; `docs/images` has some of them."""
    page = browser.new_page(viewport={"width": 1360, "height": 900}, device_scale_factor=1.25)
    page.goto(site)
    page.wait_for_selector("#pane2")
    page.locator("#count label").nth(2).click()
    page.click("#go")
    page.wait_for_selector("#pane3 .card.done", timeout=60_000)
    tops = [page.locator(f"#pane{i}").bounding_box()["y"] for i in range(4)]
    assert max(tops) - min(tops) < 5, "four panes stand beside each other"
    take(page, artifacts / "demo.png")
    page.locator("#pane3 mark.hallucinated").first.click()
    page.wait_for_selector("#maps >> text=patches reach the last layer", timeout=60_000)
    assert page.locator("#maps figure").count() == 4
    take(page, artifacts / "demo-inside.png")
    page.get_by_role("tab", name="Benchmark").click()
    page.get_by_text("Open earlier results").click()
    page.fill("#folder textarea, #folder input", str(ROOT / "results/picto-shift"))
    page.press("#folder textarea, #folder input", "Enter")
    page.wait_for_selector("#table table")
    take(page, artifacts / "demo-benchmark.png")
    page.close()


def take(page, file):
    """Two pictures of a page; dark must not show light cards, nor light dark ones."""
    shades = []
    for mode in ("dark", "light"):
        page.evaluate(f"document.body.classList.toggle('dark', {str(mode == 'dark').lower()})")
        page.wait_for_timeout(400)
        path = file if mode == "light" else file.with_stem(f"{file.stem}-dark")
        page.screenshot(path=path, full_page=True)
        shades.append(np.asarray(Image.open(path).convert("L")))
    assert np.median(shades[0]) < 80 and np.median(shades[1]) > 200


@pytest.mark.slow
def test_looking_inside_in_a_browser(page, artifacts):
    page.get_by_role("tab", name="Look inside").click()
    page.wait_for_selector("#look-notice >> text=Compare something first")
    page.get_by_role("tab", name="Compare").click()
    page.click("#go")
    page.wait_for_selector("#pane2 .card.done", timeout=60_000)
    page.locator("#pane0 mark.hallucinated").first.click()
    page.wait_for_selector("#maps figure img", timeout=60_000)
    assert (
        page.inner_text("#answer .word[aria-pressed=true]") == page.inner_text("#answer .word.hallucinated") == "ball"
    )
    assert page.locator("#maps figure").count() == 2 and not page.locator("#look-notice .notice").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    before = page.get_attribute("#maps figure:nth-child(2) img", "src")
    page.locator("#answer .word").nth(4).focus()  # the keyboard reaches every word
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer .word[data-word='4'][aria-pressed=true]")
    assert page.get_attribute("#maps figure:nth-child(2) img", "src") != before
    page.get_by_label("vhr", exact=True).click()
    page.wait_for_selector("#maps >> text=vhr minus baseline", timeout=60_000)
    page.locator("#heads .thumbs button").nth(2).click()
    page.wait_for_selector("#maps >> text=/layer \\d, head \\d/")
    page.screenshot(path=artifacts / "inside-phone.png", full_page=True)


@pytest.mark.slow
def test_a_benchmark_in_a_browser(page, artifacts, tmp_path):
    page.get_by_role("tab", name="Benchmark").click()
    page.get_by_label("number input for Number of scenes").fill("200")
    page.get_by_label("number input for Number of scenes").press("Tab")
    page.click("#run")
    page.wait_for_selector("#bar >> text=/baseline: [1-9]/", timeout=60_000)
    page.click("#halt")
    page.wait_for_selector("#bar >> text=/stopped after [1-9]/", timeout=60_000)
    page.get_by_label("number input for Number of scenes").fill("5")
    page.get_by_label("number input for Number of scenes").press("Tab")
    page.click("#run")
    page.wait_for_selector("#figure img", timeout=120_000)
    page.wait_for_selector("#bar >> text=/answers in/")
    assert page.locator("#table table").count() >= 3 and page.locator("#table td small").count() > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    with page.expect_download() as download:
        page.click("#save")
    shutil.unpack_archive(download.value.path(), tmp_path / "out", "zip")
    assert (tmp_path / "out/samples.jsonl").exists()
    page.get_by_text("Open earlier results").click()
    page.locator("#upload ~ input[type=file], #open input[type=file]").first.set_input_files(
        {"name": "results.json", "mimeType": "application/json", "buffer": b"{}"}
    )
    page.wait_for_selector("#bench-notice .notice >> text=This is no results.json")
    page.fill("#folder textarea, #folder input", str(ROOT / "results/picto-shift"))
    page.press("#folder textarea, #folder input", "Enter")
    page.wait_for_selector("#table >> text=300 scenes")
    page.screenshot(path=artifacts / "benchmark-phone.png", full_page=True)


@pytest.mark.slow
def test_models_in_a_browser(page):
    box = page.locator("#model input")
    box.fill("/nowhere/${1+1}{{name}}<b>")
    box.press("Enter")
    page.wait_for_selector("#model-notice .notice >> text=could not be loaded")
    assert "/nowhere/${1+1}{{name}}<b>" in page.inner_text("#model-notice")
    page.click("#go")
    page.wait_for_selector("#notice .notice >> text=could not be loaded")
    box.fill(str(picto.model_path("picto-llava")))
    box.press("Enter")
    page.wait_for_selector("#about >> text=7 million parameters")
    page.click("#go")
    page.wait_for_selector("#pane2 .card.done", timeout=60_000)
    assert page.locator("#notice .notice").count() == 0


@pytest.mark.slow
def test_a_bad_upload_in_a_browser(page):
    page.locator("#image button[aria-label*='Clear'], #image button[aria-label*='Remove']").first.click()
    upload = page.locator("#image input[type=file]").first
    upload.set_input_files({"name": "bad.png", "mimeType": "image/png", "buffer": b"not an image"})
    page.wait_for_selector("#notice .notice")
    assert page.inner_text("#notice") == "This file is not a readable image: give a PNG, JPEG, WEBP, BMP, GIF file."
    good = io.BytesIO()
    Image.new("RGB", (50, 40), "blue").save(good, "PNG")
    page.locator("#image button[aria-label*='Clear'], #image button[aria-label*='Remove']").first.click()
    page.locator("#image input[type=file]").first.set_input_files(
        {"name": "good.png", "mimeType": "image/png", "buffer": good.getvalue()}
    )
    page.wait_for_selector("#notice .notice", state="detached")
    page.click("#go")
    page.wait_for_selector("#pane2 .card.done", timeout=60_000)
    assert page.locator("mark.grounded").count() == 1  # the legend's alone: no truth is known
