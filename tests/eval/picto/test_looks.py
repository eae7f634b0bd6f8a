"""Looks of Picto's scenes and questions about more than existence: the default world stays as it was, bit for bit."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto, tasks
from vlm_fix.eval.picto import dialogues, looks, questions, train, world
from vlm_fix.eval.scorers.chair.words import find_objects
from vlm_fix.eval.settings import Settings

ALL = ("crowded", "small", "large", "crowded+small+large")


@pytest.mark.parametrize(
    ("split", "sha256"),
    [
        ("train", "79856f5cfea51303dcf3565e10765d84b9d38a6da1d4f99662b92e5a7e050f10"),
        ("test", "9b9f47e313d24517ab1721914ff65e0cc54026f52828fabf37da3214e9834b6e"),
        ("shift", "bdc8edca7e0aa25962b88f05e2cb14ee21304201c9e360c3e3a992f392b9aecd"),
        ("style", "866b256eea5b43a4f3ef81ec07bda1c12c03b2342114a0dbfe6100cf767b85a7"),
    ],
)
def test_the_default_world_is_the_one_before_there_were_looks(split, sha256):
    digest = hashlib.sha256()
    for s in picto.scenes(split, 20, 0):
        digest.update(s.image.tobytes() + s.masks.tobytes())
        digest.update(json.dumps([s.image_id, s.file_name, s.scene_type, s.objects, s.captions]).encode())
        digest.update(s.patch_classes().tobytes())
    assert digest.hexdigest() == sha256


@pytest.mark.parametrize("words", ALL)
def test_a_look_is_seeded_and_true(words):
    name = f"shift+{words}"
    drawn, again = picto.scenes(name, 40, 1), picto.scene(name, 1, 7)
    assert again.image.tobytes() == drawn[7].image.tobytes() and again.captions == drawn[7].captions
    look = looks.read(name)[1]
    for s in drawn:
        assert s.image.size == (look.side, look.side) == s.masks.shape
        assert s.file_name == f"picto_{name}_1_{s.image_id - 1:06d}.png"
        assert len(s.objects) in look.counts and all(box[2] and box[3] for _, box in s.objects)
        for i, (_, (x, y, w, h)) in enumerate(s.objects):
            ys, xs = np.nonzero(s.masks == i)
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        for caption in s.captions:
            said = {item.node for item in find_objects(caption, "pattern")[1]}
            assert said and said <= s.names, caption
    assert s.patch_classes(look.patch).shape == (look.patches,)


def test_what_a_look_changes_and_what_it_keeps():
    plain, crowded, small, large = (picto.scenes(f"test{w}", 60) for w in ("", "+crowded", "+small", "+large"))
    for a, b, c in zip(plain, small, large, strict=True):
        assert a.scene_type == b.scene_type == c.scene_type
        assert Counter(n for n, _ in a.objects) == Counter(n for n, _ in b.objects) == Counter(n for n, _ in c.objects)
    sides = {n: [max(box[2:]) for s in d for _, box in s.objects] for n, d in (("plain", plain), ("small", small))}
    assert max(sides["small"]) <= 18 < np.mean(sides["plain"])
    assert np.mean([len(s.objects) for s in plain]) < 6 < 8 <= min(len(s.objects) for s in crowded)
    share = [np.mean([(s.masks != 255).mean() for s in d]) for d in (plain, large)]
    assert share[1] == pytest.approx(share[0], rel=0.1), "large scenes are as full, in more pixels"
    assert looks.DEFAULT.patches == 64 and looks.read("test+large")[1].patches == 256


def test_an_unknown_look_is_one_sentence():
    with pytest.raises(VlmFixError, match="unknown look 'huge' of Picto's scenes: choose from crowded, small, large"):
        picto.scenes("test+huge", 2)
    with pytest.raises(VlmFixError, match="unknown Picto split 'tset'"):
        picto.scenes("tset+small", 2)


def test_a_folder_of_a_look_says_its_size(tmp_path):
    folder = picto.render(tmp_path / "a", scenes=3, split="test+large+crowded", seed=2)
    made = json.loads((folder / "instances_test+large+crowded.json").read_text())
    assert {(i["width"], i["height"]) for i in made["images"]} == {(224, 224)}
    assert all((folder / "images" / i["file_name"]).is_file() for i in made["images"])
    assert all(max(p[0::2]) <= 224 and max(p[1::2]) <= 224 for a in made["annotations"] for p in a["segmentation"])


# --- questions -------------------------------------------------------------------------------------------------------


def holds(scene, text):
    """Whether what a question asks is so, by the masks of the scene alone."""
    counts = Counter(name for name, _ in scene.objects)

    def box(name):
        [i] = [i for i, (n, _) in enumerate(scene.objects) if n == name]
        ys, xs = np.nonzero(scene.masks == i)
        return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1

    if found := re.match(r"(?:Is there only|Are there) (.+) in the image\?", text):
        [(name, n)] = [(c, k) for c in counts for k in range(1, 13) if world.counted(c, k) == found[1]]
        assert ("only" in text) == (n == 1)
        return counts[name] == n
    if found := re.match(r"(?:Is|Are) the (.+) in the (left|right|upper|lower) half", text):
        x0, y0, x1, y1 = box(found[1])
        at = (x0 + x1) / 2 if found[2] in ("left", "right") else (y0 + y1) / 2
        assert abs(at - scene.image.width / 2) >= scene.image.width / 8
        return (at < scene.image.width / 2) == (found[2] in ("left", "upper"))
    if found := re.match(r"(?:Is|Are) the (.+) (larger|smaller) than the (.+)\?", text):
        first, second = ((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (box(found[1]), box(found[3])))
        return (first > second) == (found[2] == "larger")
    found = re.match(r"(?:Is|Are) the (.+) to the (left|right) of the (.+)\?", text)
    first, second = ((x0 + x1) / 2 for x0, _, x1, _ in (box(found[1]), box(found[3])))
    return (first < second) == (found[2] == "left")


@pytest.mark.parametrize("split", ["test", "shift+crowded+large"])
def test_questions_are_answered_by_the_scene(split):
    labels, forms = Counter(), Counter()
    for s in picto.scenes(split, 150):
        asked = questions.about(s)
        assert asked == questions.about(s) and len({q.text for q in asked}) == len(asked) <= 8
        for kind, text, label in asked:
            assert label == ("yes" if holds(s, text) else "no"), (s.file_name, text)
            labels[label] += 1
            forms[kind, text.split()[0], "half" in text, "than" in text] += 1
    assert 0.42 < labels["yes"] / labels.total() < 0.58 and labels.total() > 600
    assert {kind for kind, *_ in forms} == {"attribute", "relation"}


def test_amber_asks_them_only_if_it_is_told_to():
    given = Settings(benchmark="amber", data="picto:shift+small", limit=6, variant="pattern")
    _, plain = tasks.build(given)
    captions, more = tasks.build(Settings(**vars(given) | {"data": "picto:shift+small+attributes"}))
    assert set(plain.sizes) == {"existence"}
    assert set(more.sizes) == {"existence", "attribute", "relation", "questions"}
    assert more.data["source"] == captions.data["source"] == "picto:shift+small+attributes, seed 0"
    assert more.sizes["existence"] == plain.sizes["existence"] and captions.samples[0].image.size == (128, 128)
    right = more.score({s.id: s.reference["label"].title() for s in more.samples})
    assert all(result.figures["accuracy"] == 1 for result in right.values())
    with pytest.raises(VlmFixError, match="unknown look 'attributes'"):
        tasks.build(Settings(benchmark="pope", data="picto:shift+attributes", limit=3))


# --- training --------------------------------------------------------------------------------------------------------


def test_large_scenes_are_256_tokens_of_a_model():
    look = looks.read("train+large")[1]
    images, classes, facts = dialogues.pool(3, 5, look)
    assert images.shape == (3, 3, 224, 224) and classes.shape == (3, 256) and len(facts) == 3
    processor = train.build_processor(look)
    model = train.build_model(processor, width=8, depth=2, look=look).eval()
    x = train.features(model, processor, images, autocast=False)
    assert x.shape[:2] == (3, 256)
    batch = dialogues.Dialogues(processor, facts, 0.5, patches=x.shape[1]).batch(train._rng(0, "t", 0), [0, 1, 2])
    assert ((batch["ids"] == model.config.image_token_id).sum(1) == 256).all()
    inputs = processor(
        images=picto.scene("test+large", 0, 0).image, text="USER: <image>\nhow many?", return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    plain = train.build_model(train.build_processor(), width=8, depth=2)
    assert plain.config.image_seq_length == 64 and plain.config.vision_config.patch_size == 16


@pytest.mark.slow
def test_training_on_a_look_ends_in_a_checkpoint_for_it(tmp_path):
    steps = {"vision_steps": 1, "align_steps": 1, "llm_steps": 1, "prior_steps": 1, "scenes": 16, "batch": 4}
    folder = train.train(0, tmp_path, **steps, width=8, depth=2, look="crowded+large")
    config = json.loads((folder / "config.json").read_text())
    assert config["image_seq_length"] == 256 and config["vision_config"]["image_size"] == 224
