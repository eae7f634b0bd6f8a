"""The tab that looks inside: heatmaps, changes and drawings against the model's own numbers."""

import copy
import dataclasses
import html
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

import vlm_fix
from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError, list_methods
from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.demo import app, compare, examples, inside, look
from vlm_fix.eval.run import generation
from vlm_fix.wing import engine_of

EXTRA: dict[str, str] = {}  # methods that need a parameter


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


def test_changes_shown_are_those_against_the_baseline(loaded, views):
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


def test_views_of_inspect_are_its_own_figures(loaded, views):
    from vlm_fix.demo import views as shown

    image, view = examples.scenes()[0].image, views["pai"]
    inside.inspect(loaded, image, PROMPT, view)
    inputs = dict(generation.encode(loaded.model, loaded.processor, [image], [PROMPT]))
    said = [i for i in view.pane.ids if i != loaded.model.generation_config.eos_token_id]
    with vlm_fix.wrapped(loaded.model, view.pane.stack):
        alone = vlm_fix.inspect(loaded.model, inputs, said)
    assert torch.equal(view.found.lens_tokens, alone.lens_tokens) and len(said) == len(view.pane.ids) - 1
    word = view.first
    rows = list(view.words[word].rows)
    assert torch.allclose(view.rolled(word).flatten(), alone.rollout[rows][:, alone.visual].mean(0), atol=1e-6)
    assert torch.allclose(view.salient(word).flatten(), alone.saliency.sum(0)[rows][:, alone.visual].mean(0), atol=1e-6)
    for which, words in zip(shown.VIEWS, ("logit lens", "Attention rollout", "Sinks"), strict=True):
        made = shown.shown(view, word, which)
        assert words in made and "None" not in made.replace("None: in no head", "")
    assert shown.shown(view, word, "What each layer would say").count("<tr>") == 6 + 2  # layers, the answer, the head
    with pytest.raises(VlmFixError, match="unwrap the pruner"):
        inside.inspect(loaded, image, PROMPT, views["hiprune"])
    assert not hasattr(loaded.model, "_vlm_fix_engine") and not loaded.turn.line


def test_maps_have_a_scale(views):
    view = views["pai"]
    made = look.figures(view, view.first, None, None)
    peak = 100 * float(view.heatmap(view.first, None, None).max())
    assert f"<span>{peak:.2g} % in a patch</span>" in made and 'class="scale change"' in made


def test_a_click_while_answers_are_written_opens_when_they_are_done(catalogue, loaded):
    """The events of the page itself; the browser's test may come too late to see the wait."""
    events = {event.name: event.fn for event in app.build(catalogue).fns.values()}
    image = examples.scenes()[0].image
    asked = compare.Asked(loaded.name, image, PROMPT, {}, running=True)
    late, _, _, said, *_ = events["noted"](asked, None, 0, 2, -1, -1)
    assert late and look.WAIT in said
    assert all("__type__" in skipped for skipped in events["then"](True, asked, None, 0, 2, -1, -1)), (
        "nothing opens yet"
    )
    pane = last(compare.compare(loaded, image, PROMPT, [], 16))[0]
    done = dataclasses.replace(asked, panes={0: pane}, running=False)
    assert all("__type__" in skipped for skipped in events["then"](False, done, None, 0, 2, -1, -1)), (
        "nothing was clicked"
    )
    late, view, place, said, *_, answer, _, _ = events["then"](True, done, None, 0, 2, -1, -1)
    assert not late and view.pane is pane and place == 0 and not said
    assert 'data-word="2" class="word ' in answer and answer.count('aria-pressed="true"') == 1
