"""Features of images that candidates share: the same answers, and the tower runs only where it has to."""

import pytest
import torch

import vlm_fix
from vlm_fix.eval.picto import scene
from vlm_fix.eval.recommend.features import SharedFeatures
from vlm_fix.eval.run import generation
from vlm_fix.eval.run.loading import load_model

PROMPTS = ["is there a dog in the image?", "describe the image."]


class Clock:
    """A second a look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


@pytest.fixture(scope="module")
def picto():
    return load_model("picto-llava", device="cpu")[:2]


@pytest.fixture(scope="module")
def asked():
    return [scene("test", 0, i).image for i in range(2)]


@pytest.fixture
def runs(picto, monkeypatch):
    """How often the tower ran."""
    tower, count = picto[0].model.vision_tower, []
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a, **k: (count.append(1), forward(*a, **k))[1])
    return count


def answers(picto, images, spec):
    model, processor = picto
    method = vlm_fix.wrap(model, spec) if spec else None
    try:
        return generation.generate(model, processor, images, PROMPTS, 0, max_new_tokens=8, do_sample=False).ids
    finally:
        if method is not None:
            vlm_fix.unwrap(model)


@pytest.mark.parametrize(
    "spec, more",
    [("pai:alpha=0.8", 0), ("vhr", 0), ("dola", 0), ("vcd", 1), ("hiprune:keep=16", 1), ("avisc", 0), ("ritual", 1)],
)
def test_a_method_answers_as_alone(picto, asked, runs, spec, more):
    """`more`: passes of the tower that stay. A noised or turned image is another one; a pruner reads the tower."""
    alone, before = answers(picto, asked, spec), len(runs)
    shared = SharedFeatures(picto[0], Clock())
    with shared.of("batch"):
        plain = answers(picto, asked, None)
    assert plain == answers(picto, asked, None) and shared.saved == 0
    runs.clear()
    with shared.of("batch"):
        assert answers(picto, asked, spec) == alone
    assert len(runs) == more < before + 1
    assert (shared.saved > 0) == (before > more)
    with shared.of("batch"):
        assert answers(picto, asked, None) == plain
    assert "get_image_features" not in vars(picto[0].model)


def test_another_batch_or_another_image_is_not_served(picto, asked, runs):
    shared = SharedFeatures(picto[0], Clock())
    for name, images in (("a", asked), ("b", asked), ("a", asked[::-1])):
        with shared.of(name):
            answers(picto, images, None)
    assert len(runs) == 3 and shared.saved == 0
    with shared.of("a"):
        answers(picto, asked, None)
    assert len(runs) == 3 and shared.saved == 1  # the clock's second


def test_what_is_kept_is_bounded(picto, asked, runs):
    shared = SharedFeatures(
        picto[0], Clock(), room=2 * 2 * 3 * 128 * 128 * 4
    )  # two batches' images, less their features
    for name in "aba":
        with shared.of(name):
            answers(picto, asked, None)
    assert len(runs) == 3 and len(shared.kept) == 1
    shared = SharedFeatures(picto[0], Clock(), room=0)
    with shared.of("a"):
        answers(picto, asked, None)
    assert not shared.kept


def test_a_failure_inside_leaves_the_model_as_it_was(picto):
    shared = SharedFeatures(picto[0], Clock())
    with pytest.raises(KeyboardInterrupt), shared.of("a"):
        raise KeyboardInterrupt
    assert "get_image_features" not in vars(picto[0].model)


def test_a_model_that_names_no_features_shares_none():
    shared = SharedFeatures(torch.nn.Linear(2, 2), Clock())
    with shared.of("a"):
        pass
    assert shared.inner is None
