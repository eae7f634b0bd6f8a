"""The Picto world, its bundled model and the program that trained it."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.picto import sprites, train, world
from vlm_fix.eval.scorers.chair.words import find_objects


def test_every_sprite_exists_in_every_style():
    for style in sprites.STYLES:
        for name, images in sprites.load(style).items():
            assert name in world.COCO_IDS and len(images) == len(sprites.EMOJI[name].split())
            assert all(i.size == (64, 64) and i.getchannel("A").getextrema() == (0, 255) for i in images)


def test_same_seed_same_scenes():
    first, second = (picto.scenes("test", 6, seed=3) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.image.tobytes() == b.image.tobytes() and a.objects == b.objects and a.captions == b.captions
    assert picto.scenes("test", 6, seed=4)[0].image.tobytes() != first[0].image.tobytes()
    assert picto.scene("test", 3, 5).image.tobytes() == first[5].image.tobytes()


def test_folder_opens_with_pycocotools(tmp_path):
    out = picto.render(tmp_path / "a", scenes=12, split="shift", seed=1)
    drawn = picto.scenes("shift", 12, seed=1)
    instances, captions = COCO(out / "instances_shift.json"), COCO(out / "captions_shift.json")
    assert len(instances.imgs) == 12 and len(captions.anns) == 60
    for s in drawn:
        assert (out / "images" / s.file_name).exists()
        anns = instances.loadAnns(instances.getAnnIds(imgIds=s.image_id))
        names = [instances.cats[a["category_id"]]["name"] for a in anns]
        assert Counter(names) == Counter(name for name, _ in s.objects)
        assert sorted(a["bbox"] for a in anns) == sorted(box for _, box in s.objects)
        for a in anns:
            outline = instances.annToMask(a).astype(bool)
            x, y, w, h = a["bbox"]
            assert 0 < a["area"] <= w * h and outline[y : y + h, x : x + w].sum() >= 0.9 * outline.sum()

    def info(name, seed):
        folder = picto.render(tmp_path / name, scenes=12, split="shift", seed=seed)
        return json.loads((folder / "instances_shift.json").read_text())["info"]

    assert info("b", seed=1) == instances.dataset["info"]
    assert info("c", seed=2)["sha256"] != instances.dataset["info"]["sha256"]


def test_shift_breaks_the_prior():
    def core_share(split):
        """Share of the scene types' core objects among the objects that are there."""
        drawn = picto.scenes(split, 200)
        return np.mean([name in world.SCENE_TYPES[s.scene_type].core for s in drawn for name in s.names])

    assert core_share("test") > 0.45 and core_share("style") > 0.45
    assert core_share("shift") < 0.2


def test_reference_captions_are_true_and_training_captions_are_not_always():
    rng, wrong = train._rng(0, "test", 0), 0
    for s in picto.scenes("train", 300):
        for caption in s.captions:
            said = {item.node for item in find_objects(caption, "pattern")[1]}
            assert said and said <= s.names, caption
        imagined = world.imagine(rng, s.scene_type, s.names)
        assert not set(imagined) & s.names
        wrong += bool(imagined)
    assert 0.25 < wrong / 300 < 0.5


@pytest.mark.parametrize(
    "call",
    [
        lambda: picto.scenes("tset", 3),
        lambda: picto.scenes("test", 0),
        lambda: picto.model_path("picto-lava"),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(VlmFixError) as error:
        call()
    assert "choose" in str(error.value) or "at least" in str(error.value)


@pytest.fixture(scope="module")
def bundled():
    model = AutoModelForImageTextToText.from_pretrained(picto.model_path(), dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(picto.model_path())


def prompt(processor, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def generate(model, processor, images, texts, n):
    inputs = processor(images=images, text=[prompt(processor, t) for t in texts], padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_prompt_and_words_survive_the_processor(bundled):
    model, processor = bundled
    words = processor.tokenizer
    text = prompt(processor, "Is there a cup in the image?")
    assert text == "USER: <image>\nIs there a cup in the image? ASSISTANT:"
    inputs = processor(images=picto.scene("test", 0, 0).image, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert (ids == model.config.image_token_id).sum() == 64 and ids[0] == words.bos_token_id
    assert words.decode(ids, skip_special_tokens=True).endswith("is there a cup in the image? assistant :")
    for question in (f"Is there {world.with_article(name)} in the image?" for name in world.COCO_IDS):
        assert words.unk_token_id not in words(question).input_ids
    for caption in picto.scene("test", 0, 1).captions:
        assert words.decode(words(caption).input_ids, skip_special_tokens=True) == caption.lower()
    s = picto.scene("test", 0, 0)
    pixels = torch.from_numpy(np.array(s.image)).permute(2, 0, 1)
    torch.testing.assert_close(train.pixels(processor, pixels), inputs["pixel_values"][0], atol=1e-5, rtol=0)


def test_bundled_model_answers_and_captions(bundled):
    drawn = picto.scenes("test", 20)
    questions, labels = [], []
    for s in drawn:
        absent = sorted(set(world.CATEGORIES) - s.names)
        for name, label in ((s.objects[0][0], "yes"), (absent[s.image_id * 7 % len(absent)], "no")):
            questions.append(f"Is there {world.with_article(name)} in the image?")
            labels.append(label)
    answers = generate(*bundled, [s.image for s in drawn for _ in range(2)], questions, 4)
    assert set(answers) <= {"yes", "no"}
    assert np.mean([a == b for a, b in zip(answers, labels, strict=True)]) >= 0.75
    captions = generate(*bundled, [s.image for s in drawn[:8]], ["Please describe this image in detail."] * 8, 64)
    found = [
        any(word in caption for word in (*world._SAID_AS.get(name, (name,)), world._PLURAL.get(name, name)))
        for s, caption in zip(drawn, captions, strict=False)
        for name in s.names
    ]
    assert all(caption.endswith(".") and " ." not in caption for caption in captions)
    assert np.mean(found) >= 0.6


def test_interrupted_training_continues_as_if_it_had_not_been(tmp_path):
    def run(out, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return layer(torch.full((1, 4), 1.0 + step)).square().sum(), {}

        train.fit("tiny", [layer], loss_of, 6, 0.1, out, save_every=0)
        return layer.weight.detach()

    (tmp_path / "whole").mkdir(), (tmp_path / "broken").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop=3)
    assert torch.equal(run(tmp_path / "broken"), run(tmp_path / "whole"))


@pytest.mark.slow
def test_training_program_gives_the_same_checkpoint_twice(tmp_path):
    steps = {"vision_steps": 2, "align_steps": 2, "llm_steps": 2, "prior_steps": 2, "scenes": 16, "batch": 4}
    size = {"width": 8, "depth": 2}
    one, two = (train.train(0, tmp_path / name, **steps, **size) for name in ("one", "two"))
    assert AutoProcessor.from_pretrained(one).image_token == "<image>"
    first, second = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (one, two))
    start = train.build_model(train.build_processor(), **size).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    moved = {name.split(".")[1] for name, value in first.items() if not torch.equal(value, start[name].to(value.dtype))}
    assert moved >= {"vision_tower", "multi_modal_projector", "language_model"}
