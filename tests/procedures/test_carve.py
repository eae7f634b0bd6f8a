"""CARVE's map, regions and crop against loops in float64; batches, decoding modes, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import vlm_fix
from tests.support import families
from tests.support.models import GRIDS, IMAGE, PAD, make_inputs, single
from tests.support.references.base import Reference, double, teacher_forced, visual_columns
from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import CACHE
from vlm_fix.methods.procedures.carve import CARVE
from vlm_fix.methods.procedures.pixels import labelled
from vlm_fix.wing import engine_of

BLACK, GENERAL = (-1.8, -1.75, -1.5), (11, 12, 13)
METHOD = CARVE(tokens=GENERAL, black=BLACK, steps=3)
BOTH = CARVE(tokens=GENERAL, black=BLACK, steps=3, images="both")


def refined(model, inputs, method=METHOD):
    """What generate is given in place of the inputs' pixel_values."""
    with vlm_fix.wrapped(model, method):
        engine = engine_of(model)
        return engine.wing(ProcedureWing).refine(Call(model, engine.family, dict(inputs)))["pixel_values"]


# ---- the reference ------------------------------------------------------------------------------------------------------


@dataclass
class Seen(Reference):
    rows_seen: dict = field(default_factory=dict)  # (layer, row) -> head weights [L], one after the other

    def weight(self, a, layer, head, row):
        self.rows_seen.setdefault((layer, row), {})[head] = a.clone()
        return a


def looked(twin, inputs, layers, steps):
    """Per step and layer: head-mean weights on the image columns, and whether an end came before."""
    columns, length = visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    answer = torch.zeros(0, dtype=torch.long)
    eos, found, ended = twin.generation_config.eos_token_id, [], False
    for t in range(steps):
        run = Seen(columns, length, layers)
        logits = teacher_forced(twin, run, inputs, answer)
        rows = [run.rows_seen[layer, length - 1 + t] for layer in layers]
        found.append(([sum(heads.values())[columns] / len(heads) for heads in rows], ended))
        answer = torch.cat([answer, logits[-1].argmax()[None]])
        ended = ended or int(answer[-1]) == eos
    return found


def reference_map(twin, inputs, layers=(2, 3), steps=3):
    """S of the image tokens of one prompt, in order."""
    ids = inputs["input_ids"][0].tolist()
    end = max(i for i, token in enumerate(ids) if token == IMAGE) + 1
    end += ids[end] == 94
    general = {**inputs, "input_ids": torch.tensor([[*ids[:end], *GENERAL]])}
    total = torch.zeros(ids.count(IMAGE), dtype=torch.float64)
    for t, ((q, end_q), (g, end_g)) in enumerate(
        zip(looked(twin, inputs, layers, steps), looked(twin, general, layers, steps), strict=True)
    ):
        for layer in range(len(layers)):
            for j in range(len(total)):
                if not end_q and not end_g:
                    total[j] += (t + 1) * q[layer][j] / (g[layer][j] + 1e-8)
    return total


def tables(new, old, reach, kernel):
    """[new, old] weights of a separable resize: a kernel of `reach` around each pixel's place."""
    table = torch.zeros(new, old, dtype=torch.float64)
    ratio = old / new
    wide = max(1.0, ratio) if reach == 2 else 1.0
    for i in range(new):
        place = (i + 0.5) * ratio - 0.5
        for j in range(math.floor(place - reach * wide), math.ceil(place + reach * wide) + 1):
            weight = kernel(abs(j - place) / wide)
            if reach == 1:  # borders repeat
                table[i, min(max(j, 0), old - 1)] += weight
            elif 0 <= j < old:  # borders are left out
                table[i, j] += weight
        table[i] /= table[i].sum()
    return table


def cubic(x):
    if x >= 2:
        return 0.0
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2


def regions_of(mask):
    """Regions by flood fill over 8 neighbours."""
    left, found = {(y, x) for y, x in mask.nonzero().tolist()}, []
    while left:
        region, edge = set(), {min(left)}
        while edge:
            region |= edge
            left -= edge
            edge = {(y + v, x + u) for y, x in edge for v in (-1, 0, 1) for u in (-1, 0, 1)} & left
        found.append(region)
    return found


def reference_crop(image, s, top=0.2, regions=3, share=0.2):
    """[3, H, W] float64 image and its map [h, w] -> (refined image, box y, box x)."""
    _, height, width = image.shape
    line = lambda x: max(0.0, 1 - x)  # noqa: E731
    s = tables(height, s.shape[0], 1, line) @ s @ tables(width, s.shape[1], 1, line).T
    cut = sorted(s.flatten().tolist(), reverse=True)[round(top * height * width) - 1]
    found = regions_of(s >= cut)
    found.sort(key=lambda region: -sum(float(s[y, x]) for y, x in region))
    kept = set().union(*found[: max(regions, int(share * len(found)))])
    dark = torch.tensor(BLACK, dtype=torch.float64)[:, None, None].expand_as(image).clone()
    for y, x in kept:
        dark[:, y, x] = image[:, y, x]
    ys, xs = [y for y, _ in kept], [x for _, x in kept]
    dark = dark[:, min(ys) : max(ys) + 1, min(xs) : max(xs) + 1]
    return tables(height, dark.shape[1], 2, cubic) @ dark @ tables(width, dark.shape[2], 2, cubic).T


def unpacked(patches, h, w, patch=4, merge=2):
    """Qwen's patches of one image [h w, 3 * 2 * P * P] -> [3, H, W], by loops over patches."""
    image = torch.zeros(3, h * patch, w * patch, dtype=patches.dtype)
    order = [
        (y + v, x + u)
        for y in range(0, h, merge)
        for x in range(0, w, merge)
        for v in range(merge)
        for u in range(merge)
    ]
    for (y, x), values in zip(order, patches.view(h * w, 3, 2, patch, patch), strict=True):
        assert torch.equal(values[:, 0], values[:, 1])  # both frames show the image
        image[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = values[:, 0]
    return image


def pictures(family, inputs, pixels):
    if family == "llava":
        return list(pixels)
    grids = inputs["image_grid_thw"].tolist()
    parts = pixels.split([h * w for _, h, w in grids])
    return [unpacked(part, h, w) for part, (_, h, w) in zip(parts, grids, strict=True)]


def close(maps, s):
    """1e-5 of the peak: a ratio of two small weights has the rounding errors of both scores."""
    return torch.allclose(torch.cat([m.flatten() for m in maps]).double(), s, rtol=1e-5, atol=1e-5 * float(s.max()))


# ---- tests --------------------------------------------------------------------------------------------------------------


def test_map_and_crop_are_the_formulas(model, family):
    """A prompt of two images."""
    inputs = single(family, [1, 2, 1], 1)
    s = reference_map(double(model), inputs)
    with vlm_fix.wrapped(model, METHOD):
        engine = engine_of(model)
        assert engine.active[0].layers == (2, 3)
        found = engine.active[0].maps(Call(model, engine.family, dict(inputs)))
    assert close(found, s)
    sizes = [m.shape for m in found]
    assert sizes == ([(6, 6)] * 2 if family == "llava" else [(h // 2, w // 2) for h, w in GRIDS[1:3]])
    maps = [part.view(size) for part, size in zip(s.split([h * w for h, w in sizes]), sizes, strict=True)]
    before = pictures(family, inputs, inputs["pixel_values"])
    after = pictures(family, inputs, refined(model, inputs))
    for image, made, m in zip(before, after, maps, strict=True):
        expected = reference_crop(image.double(), m)
        assert made.shape == image.shape and not torch.equal(made, image)
        assert torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_crops_of_many_shapes():
    """`refined` alone, with regions beyond the least number, at the edges, and maps coarser than the image."""
    g = torch.Generator().manual_seed(3)
    for height, width, h, w, regions, share in (
        (24, 24, 6, 6, 3, 0.2),
        (40, 16, 10, 4, 1, 0.5),
        (12, 28, 12, 28, 1, 0.1),
    ):
        image, s = torch.randn(3, height, width, generator=g), torch.rand(h, w, generator=g).double()
        method = CARVE(regions=regions, share=share)
        got = method.refined(image, s, torch.tensor(BLACK))
        expected = reference_crop(image.double(), s, regions=regions, share=share)
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_regions_touch_over_corners_and_round_bends():
    g = torch.Generator().manual_seed(0)
    snake = torch.zeros(9, 31, dtype=torch.bool)
    snake[::2], snake[1::4, -1], snake[3::4, 0] = True, True, True
    for mask in (snake, torch.eye(7).bool(), *(torch.rand(17, 23, generator=g) < p for p in (0.1, 0.3, 0.45, 1.1))):
        labels, found = labelled(mask), regions_of(mask)
        assert torch.equal(labels > 0, mask) and len(labels[mask].unique()) == len(found)
        assert all(len({int(labels[p]) for p in region}) == 1 for region in found)


def test_answers_are_those_to_the_refined_image(model, family):
    inputs = single(family, [1, 2, 1], 0)
    crop = {**inputs, "pixel_values": refined(model, inputs)}
    for how in ({}, {"num_beams": 3}, {"do_sample": True}):
        options = {"max_new_tokens": 6, "do_sample": False, **how}
        torch.manual_seed(0)
        expected = model.generate(**crop, **options)
        with vlm_fix.wrapped(model, METHOD):
            torch.manual_seed(0)
            assert torch.equal(model.generate(**inputs, **options), expected)
    assert not torch.equal(expected, model.generate(**inputs, **options)) or not torch.equal(
        model(**crop).logits, model(**inputs).logits
    )


def test_a_contrast_beside_it_gets_the_crop(model, family):
    inputs = single(family, [1, 2, 1], 0)
    crop = {**inputs, "pixel_values": refined(model, inputs)}
    with vlm_fix.wrapped(model, "vcd"):
        expected = model.generate(**crop, max_new_tokens=5, do_sample=False)
    with vlm_fix.wrapped(model, [METHOD, "vcd"]):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("ends", [False, True])
def test_a_batch_equals_single_runs(model, family, ends):
    """ends: one of the short answers ends early, so that its later tokens must not count."""
    images = [1, 2, 1]
    batch = make_inputs(family, images)
    if ends:
        with vlm_fix.wrapped(model, "baseline"):
            plain = model.generate(**single(family, images, 1), max_new_tokens=2, do_sample=False)
        model.generation_config.eos_token_id = int(plain[0, -2])
    try:
        together = pictures(family, batch, refined(model, batch))
        alone = []
        for i in range(3):
            inputs = single(family, images, i)
            alone += pictures(family, inputs, refined(model, inputs))
        if ends:
            inputs = single(family, images, 1)
            s = reference_map(double(model), inputs)
            with vlm_fix.wrapped(model, METHOD):
                engine = engine_of(model)
                found = engine.active[0].maps(Call(model, engine.family, dict(inputs)))
            assert close(found, s)
    finally:
        model.generation_config.eos_token_id = None
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with vlm_fix.wrapped(model, METHOD):
        rows = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
        for i in range(3):
            one = model.generate(**single(family, images, i), max_new_tokens=4, do_sample=False)[0, -4:]
            assert torch.equal(rows[i], one)


# ---- image and crop -----------------------------------------------------------------------------------------------------


def paired(inputs, crops):
    """Inputs with each image's block of tokens once more behind it and `crops` as these images; rows padded to the longest."""
    grids, pixels = inputs.get("image_grid_thw"), inputs["pixel_values"]
    count = 0 if grids is None else len(grids)
    sizes = [1] * len(pixels) if grids is None else [int(h * w) for _, h, w in grids]
    sequence, number = [], 0
    for ids, seen in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        old, new = [token for token, real in zip(ids, seen, strict=True) if real], []
        while old:
            if old[0] == 93 and count:
                n = 2 + sizes[number] // 4
            elif old[0] == IMAGE:
                n = 36
            else:
                new.append(old.pop(0))
                continue
            new += old[:n] * 2
            old, number = old[n:], number + 1
        sequence.append(new)
    length = max(map(len, sequence))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in sequence])
    made = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    images = [x for pair in zip(pixels.split(sizes), crops.split(sizes), strict=True) for x in pair]
    made["pixel_values"] = torch.cat(images)
    if "mm_token_type_ids" in inputs:
        made["mm_token_type_ids"] = (ids == IMAGE).int()
    if count:
        made["image_grid_thw"] = torch.stack([grid for grid in grids for _ in range(2)])
    return made


HOW = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}


@pytest.mark.parametrize("images", [[1], [2], [1, 2, 1], [1, 0, 2]])
def test_image_and_crop_are_the_prompt_of_both(model, family, images):
    """Tokens and logits of the prompt built by hand from what `images="crop"` puts in; the user's own ids stay in front."""
    inputs = make_inputs(family, images)
    by_hand, length = paired(inputs, refined(model, inputs)), inputs["input_ids"].shape[1]
    full = {**HOW, "return_dict_in_generate": True, "output_logits": True}
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(0)
        expected = model.generate(**by_hand, **{**full, **how})
        with vlm_fix.wrapped(model, BOTH):
            torch.manual_seed(0)
            got = model.generate(**inputs, **{**full, **how})
        times = len(got.sequences) // len(images)
        assert torch.equal(got.sequences[:, :length], inputs["input_ids"].repeat_interleave(times, dim=0))
        assert torch.equal(got.sequences[:, length:], expected.sequences[:, by_hand["input_ids"].shape[1] :])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.logits, expected.logits, strict=True))
    plain = model.generate(**inputs, **full)
    assert not torch.allclose(plain.logits[0][0], got.logits[0][0], atol=1e-3)


def test_a_batch_with_both_equals_single_runs(model, family):
    images = [1, 2, 1]
    with vlm_fix.wrapped(model, BOTH):
        rows = model.generate(**make_inputs(family, images), **HOW)[:, -6:]
        beams = model.generate(**make_inputs(family, images), **HOW, num_beams=3)[:, -6:]
        for i in range(3):
            inputs = single(family, images, i)
            assert torch.equal(model.generate(**inputs, **HOW)[0, -6:], rows[i])
            assert torch.equal(model.generate(**inputs, **HOW, num_beams=3)[0, -6:], beams[i])


class Noting:
    """A streamer, logits processor and stopping criterion that keeps what it is shown."""

    def __init__(self, result=None):
        self.seen, self.result = [], result

    def __call__(self, ids, scores):
        self.seen.append(ids.clone())
        return scores if self.result is None else self.result(ids)

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.seen.append("end")


def test_with_both_the_caller_sees_the_prompt_as_given(model, family):
    """Streamer, processors, stopping criteria and lengths of the caller's speak of the prompt that the caller knows."""
    inputs, batch = single(family, [1, 2], 1), make_inputs(family, [1, 2])
    ids, more = inputs["input_ids"], {k: v for k, v in HOW.items() if k != "max_new_tokens"}
    with vlm_fix.wrapped(model, BOTH):
        expected = model.generate(**inputs, **HOW)
        streamer = Noting()
        assert torch.equal(model.generate(**inputs, **HOW, streamer=streamer), expected)
        assert torch.equal(streamer.seen[0], ids) and streamer.seen[-1] == "end"
        assert [int(token) for token in streamer.seen[1:-1]] == expected[0, -6:].tolist()
        processor = Noting()
        assert torch.equal(model.generate(**inputs, **HOW, logits_processor=[processor]), expected)
        assert all(torch.equal(seen, expected[:, : ids.shape[1] + t]) for t, seen in enumerate(processor.seen))
        stop = Noting(lambda seen: torch.full((len(seen),), seen.shape[1] >= ids.shape[1] + 3))
        assert torch.equal(model.generate(**inputs, **HOW, stopping_criteria=[stop]), expected[:, :-3])
        config = GenerationConfig(**more, pad_token_id=PAD, max_length=ids.shape[1] + 2)
        for how in ({**more, "max_length": ids.shape[1] + 2}, {"generation_config": config}):
            assert torch.equal(model.generate(**inputs, **how), expected[:, :-4])
        for option in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
            assert torch.equal(model.generate(**inputs, **HOW, **option), expected)
        model.generation_config.eos_token_id = int(expected[0, -5])
        try:
            stopped = model.generate(**inputs, **HOW)
            assert stopped.shape[1] <= ids.shape[1] + 2
            assert model.generate(**inputs, **HOW, min_length=ids.shape[1] + 4).shape[1] >= ids.shape[1] + 4
        finally:
            model.generation_config.eos_token_id = None
        seen = []
        allowed = lambda row, sent: seen.append((row, sent.clone())) or [7, 8]  # noqa: E731
        got = model.generate(**batch, **HOW, num_beams=2, prefix_allowed_tokens_fn=allowed)[:, -6:]
        assert torch.isin(got, torch.tensor([7, 8])).all() and len(seen) == 24
        width = batch["input_ids"].shape[1]
        assert all(torch.equal(sent[:width], batch["input_ids"][row]) for row, sent in seen)
        with pytest.raises(VlmFixError, match="leave position_ids out"):
            model.generate(**inputs, **HOW, position_ids=torch.arange(ids.shape[1])[None])


def test_with_both_other_methods_get_both(model, family):
    """A contrast, edits and a search of their own, on the prompt built by hand."""
    inputs = make_inputs(family, [1, 2])
    for stack in (["vcd"], ["pai:alpha=0.3,gamma=1.1"], ["opera:beams=2"], ["deco", "vhr"]):
        by_hand = paired(inputs, refined(model, inputs, [METHOD, *stack]))  # edits act in its looks too
        with vlm_fix.wrapped(model, stack):
            expected = model.generate(**by_hand, **HOW)[:, -6:]
        with vlm_fix.wrapped(model, [BOTH, *stack]):
            got = model.generate(**inputs, **HOW)
        assert torch.equal(got[:, -6:], expected) and torch.equal(got[:, :-6], inputs["input_ids"]), stack


@pytest.mark.parametrize("name", ["vipllava", "qwen3_vl", "glm4v"])
def test_both_in_further_families(name):
    """Other names of the markers, images side by side without any, and towers that pack them."""
    model, inputs = families.build(name), families.prompt(name, [1, 2])
    if name == "vipllava":  # the test prompts have words in the markers' place
        keep = ~torch.isin(inputs["input_ids"], torch.tensor([93, 94]))
        for row, real in zip(inputs["input_ids"], keep, strict=True):
            row[~real] = PAD
        order = (inputs["input_ids"] != PAD).int().argsort(dim=1, stable=True)
        inputs["input_ids"] = inputs["input_ids"].gather(1, order)
        inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    by_hand = paired(inputs, refined(model, inputs))
    expected = model.generate(**by_hand, **HOW)[:, -6:]
    with vlm_fix.wrapped(model, BOTH):
        assert torch.equal(model.generate(**inputs, **HOW)[:, -6:], expected)


def test_both_is_seen_by_observe(model, family):
    inputs, answer = single(family, [1, 2], 1), [5, 6, 7]
    by_hand = paired(inputs, refined(model, inputs))
    expected = vlm_fix.observe(model, by_hand, answer)
    with vlm_fix.wrapped(model, BOTH):
        seen = vlm_fix.observe(model, inputs, answer)
    assert len(seen.cells) == 4 and torch.allclose(seen.weights_to_image, expected.weights_to_image, atol=1e-6)


def test_image_of_which_every_pixel_is_kept_is_the_image():
    image = torch.randn(3, 8, 8)
    assert CARVE(top=1.0, images="both").refined(image, torch.rand(4, 4), torch.zeros(3)) is image


def test_what_it_cannot_do_is_one_sentence(model, family):
    inputs = single(family, [1, 2, 1], 0)
    with vlm_fix.wrapped(model, CARVE(tokens=GENERAL)), pytest.raises(VlmFixError, match="carve:black="):
        model.generate(**inputs, max_new_tokens=2)
    with vlm_fix.wrapped(model, CARVE(black=BLACK)), pytest.raises(VlmFixError, match="carve:tokens="):
        model.generate(**inputs, max_new_tokens=2)
    with vlm_fix.wrapped(model, CARVE(tokens=GENERAL, black=(0.0,))), pytest.raises(VlmFixError, match="3 channels"):
        model.generate(**inputs, max_new_tokens=2)
    without = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with vlm_fix.wrapped(model, METHOD):
        with pytest.raises(VlmFixError, match="needs pixel_values of whole images"):
            model.generate(**without, max_new_tokens=2)
        with pytest.raises(VlmFixError, match="whole conversation"):
            kept = DynamicCache()
            kept.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
            model.generate(**inputs, max_new_tokens=2, **{CACHE: kept})
    with pytest.raises(VlmFixError, match="carve looks at all image tokens, of which hiprune drops some"):
        vlm_fix.wrap(model, ["hiprune", METHOD])
    for wrong in ("carve:steps=0", "carve:top=2", "carve:regions=0"):
        with pytest.raises(VlmFixError, match="must be a number"):
            vlm_fix.parse_spec(wrong)
