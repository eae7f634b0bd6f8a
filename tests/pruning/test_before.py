"""Token pruners against slow float64 references: the choice from its formula, the answer from a full-length prompt."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import BUILD, make_inputs, single
from tests.support.references import base as ref
from tests.support.references import pruning_choices as more
from tests.support.references.pruning_before import (
    divprune,
    masked_logits,
    sensitivity,
    uniform_grid,
    visionzip,
    vscan,
    zoo_prune,
)
from tests.support.run import error, greedy
from vlm_fix.eval.bench import peak_mb
from vlm_fix.pruning import PruningWing, encoder
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.wing import engine_of

# ---- slow choices: loops over Python floats -------------------------------------------------------------------------


MERGES = {
    "vscan:windows=2,llm_keep=1": (vscan, 8),
    "visionzip:contextual=0.4": (visionzip, 5),
    "prumerge:neighbours=3,spatial=0.5": (more.prumerge, 6),
    "fastvid:context=0.6": (more.fastvid, 5),
    "visiontrim:complement=0.5": (more.visiontrim, 6),
    "visiontrim:complement=0.4,rating=received,rounds=1": (more.visiontrim, 5),
}
CHOICES = {
    "divprune": divprune,
    "zoo_prune:directions=3,seed=4": zoo_prune,
    "uniform_grid": uniform_grid,
    "cdpruner": more.cdpruner,
    "cdpruner:theta=0.8,inverse=true": more.cdpruner,
    "vispruner:important=0.4,step=3": more.vispruner,
    "holov:crops=5,alpha=2": more.holov,
    "scope:alpha=0.5": more.scope,
    "flowcut:memory=0.3": more.flowcut,
    "agilepruner:slope=0.08,erank_avg=9": more.agilepruner,
    "agilepruner:slope=0.2,space=projected,tau_max=0.9": more.agilepruner,
}
EVERY = [*CHOICES, *MERGES, "random_tokens"]


# ---- what the tower says, by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", CHOICES)
def test_answer_equals_reference(family, model, spec):
    """Two images; the choice from the formula in float64, the logits from a full-length prompt with masked columns."""
    inputs, budget = single(family, [1, 2], 1), 5
    full = f"{spec}{',' if ':' in spec else ':'}keep={budget}"
    with vlm_fix.wrapped(model, full):
        tokens, logits, _ = greedy(model, inputs)
    twin, kept, offset = copy.deepcopy(model).double(), [], 0
    for image in more.described(family, twin, inputs):
        kept += [offset + i for i in CHOICES[spec](image, budget, vlm_fix.parse_spec(full))]
        offset += len(image["z"])
    expected = masked_logits(family, twin, inputs, kept, tokens[0], compact=family == "llava")
    assert error(logits[0], expected) < 1e-5
    other = [i for i in range(offset) if i not in kept][: len(kept)]
    assert error(logits[0], masked_logits(family, twin, inputs, other, tokens[0], compact=family == "llava")) > 1e-3


@pytest.mark.parametrize("spec", MERGES)
def test_merged_answer_equals_reference(family, model, spec):
    inputs, (reduce, budget) = single(family, [1, 2], 1), MERGES[spec]
    with vlm_fix.wrapped(model, f"{spec},keep={budget}"):
        tokens, logits, _ = greedy(model, inputs)
        method = engine_of(model).wing(PruningWing).pruners.pruner
    twin, kept, offset = copy.deepcopy(model).double(), {}, 0
    for image in more.described(family, twin, inputs):
        kept |= {offset + i: z for i, z in reduce(image, budget, method).items()}
        offset += len(image["z"])
    compact = family == "llava"
    assert error(logits[0], masked_logits(family, twin, inputs, kept, tokens[0], compact)) < 1e-5
    assert error(logits[0], masked_logits(family, twin, inputs, list(kept), tokens[0], compact)) > 1e-3, (
        "nothing merged"
    )


def test_original_positions_equal_reference(models):
    model, inputs = models["llava"], single("llava", [1, 2], 1)
    with vlm_fix.wrapped(model, "uniform_grid:keep=7,positions=original"):
        tokens, logits, _ = greedy(model, inputs)
    kept = [36 * n + i for n in range(2) for i in uniform_grid({"grid": (6, 6)}, 7, None)]
    expected = masked_logits("llava", copy.deepcopy(model).double(), inputs, kept, tokens[0])
    assert error(logits[0], expected) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2000, 2**20])
def test_column_scores_equal_loops_in_any_chunks(monkeypatch, chunk):
    g = torch.Generator().manual_seed(chunk)
    q, k = (3 * torch.randn(2, 3, 11, 8, generator=g) for _ in range(2))
    monkeypatch.setattr(encoder, "chunk_bytes", lambda x: chunk)
    scores = encoder.column_means(q, k, 8**-0.5)
    for image in range(2):
        expected = ref.received(q[image].double(), k[image].double(), 8**-0.5)
        assert float((scores[image] - expected).abs().max() / expected.max()) < 1e-6


def test_column_scores_hold_no_square_of_the_patches():
    q, k = (torch.randn(1, 4, 1500, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    scores: list[torch.Tensor] = []
    held = peak_mb(lambda: scores.append(encoder.column_means(q, k, 8**-0.5)), q.device)
    assert 2 < held < 9  # the scores of all heads and patches would be 36 MB
    expected = (q.double() @ k.double().mT * 8**-0.5).softmax(dim=-1).mean(dim=(1, 2))
    assert float((scores[0] - expected).abs().max() / expected.max()) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_selection_on_random_features(seed):
    """Random features, and axis vectors whose distances are all 0 or 1: there every choice is a tie."""
    g = torch.Generator().manual_seed(seed)
    height, width = 3 + seed, 7 - seed
    n = height * width
    axis = torch.eye(5)[torch.randint(5, (n,), generator=g)] * 2.0 ** torch.randint(-3, 3, (n, 1), generator=g)
    matrix = torch.randn(6, 5, generator=g)
    raw = torch.randn(n, 6, generator=g)
    question, flow = torch.randn(3, 8, generator=g), [torch.rand(n, 3, generator=g) for _ in range(4)]
    for z in (torch.randn(n, 8, generator=g), axis):
        image = ImageTokens((height, width), {}, features=z, raw=lambda: raw, project=lambda x: (x @ matrix).tanh())
        image.first, image.question = {3: flow[3][:, 0]}, question[:, : z.shape[1]]
        image.flow = dict(enumerate(flow[:3]))
        slow = {"grid": (height, width), "z": z.double(), "raw": raw.double(), "question": image.question.double()}
        slow |= {"first": image.first, "flow": {i: x.tolist() for i, x in enumerate(flow)}}
        slow["project"] = lambda x: (x @ matrix.double()).tanh()
        method = vlm_fix.parse_spec("zoo_prune:step=0.5,directions=9")  # a step at which one side is not the other
        expected = torch.tensor(sensitivity(slow, method))
        assert float((method.sensitivity(image) - expected).abs().max() / expected.max()) < 1e-5
        for spec, choose in CHOICES.items():
            for budget in (1, 2, 5, n - 1, n):
                method = vlm_fix.parse_spec(
                    f"{spec}{',' if ':' in spec else ':'}keep={budget if budget > 1 else 1 / n}"
                )
                kept = method.select(image).tolist()
                assert kept == sorted(set(kept)) and len(kept) == budget
                assert kept == choose(slow, budget, method), (spec, budget)


@pytest.mark.parametrize("seed", range(4))
def test_merging_on_random_features(seed):
    """As above; whole-number scores and axis vectors as features and keys make every choice a tie."""
    g = torch.Generator().manual_seed(seed)
    height, width = 3 + seed, 7 - seed
    n = height * width
    matrix, raw = torch.randn(6, 5, generator=g), torch.randn(n, 6, generator=g)
    scores = {layer: torch.randint(4, (n,), generator=g).float() for layer in (1, 3)}
    for z in (torch.randn(n, 5, generator=g), torch.eye(5)[torch.randint(5, (n,), generator=g)]):
        slow = {
            "grid": (height, width),
            "z": z.double(),
            "raw": raw.double(),
            "first": scores,
            "keys": {3: z.double()},
            "project": lambda x: (x @ matrix.double()).tanh(),
        }
        for spec, (reduce, _) in MERGES.items():
            if spec.startswith(("prumerge", "fastvid", "visiontrim")):
                continue
            first = scores if "vscan" in spec else {3: scores[3]}
            image = ImageTokens(
                (height, width),
                {},
                first,
                keys={3: z},
                features=z,
                raw=lambda: raw,
                project=lambda x: (x @ matrix).tanh(),
            )
            for budget in (2, 5, 9, n - 1, n):
                method = vlm_fix.parse_spec(f"{spec},keep={budget}")
                kept, features = method.reduce(image)
                expected = reduce(slow, budget, method)
                assert kept.tolist() == list(expected) and len(kept) == budget
                for index, feature in zip(kept.tolist(), features, strict=True):
                    assert float((feature - expected[index]).abs().max()) < 1e-5
                assert budget < n or torch.equal(features, z)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "spec", ["prumerge:neighbours=4", "prumerge:adaptive=true,neighbours=2", "prumerge:adaptive=true,spatial=0"]
)
def test_prumerge_on_random_features(spec, seed):
    g = torch.Generator().manual_seed(seed)
    matrix, raw, z = torch.randn(8, 5, generator=g), torch.randn(30, 8, generator=g), torch.randn(30, 5, generator=g)
    heads = [(*(torch.randn(2, 31, 4, generator=g) * (1 + 3 * (i < 2)) for i in range(2)), 0.5)]
    image = ImageTokens(
        (5, 6), {}, heads={3: heads}, features=z, raw=lambda: raw, project=lambda x: (x @ matrix).tanh()
    )
    q, k = (x.double().transpose(0, 1).flatten(1) for x in heads[0][:2])
    slow = {"raw": raw.double(), "joint": ((k @ q[0] / 8**0.5).softmax(0)[1:], k[1:])}
    slow["project"] = lambda x: (x @ matrix.double()).tanh()
    for budget in (2, 3, 11, 29):
        method = vlm_fix.parse_spec(f"{spec},keep={budget}")
        kept, features = method.reduce(image)
        expected = more.prumerge(slow, budget, method)
        assert kept.tolist() == list(expected) and (method.adaptive or len(kept) == budget)
        assert float((features - torch.stack([*expected.values()])).abs().max()) < 1e-5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("frames", [1, 2])
def test_visiontrim_on_random_features(seed, frames):
    """Images and videos of one row, of one column and wider; with a question and without; as many tokens as there are."""
    g, (height, width) = torch.Generator().manual_seed(seed), [(1, 7), (5, 1), (3, 4), (4, 5)][seed]
    n = frames * height * width
    matrix, raw, question = (torch.randn(*s, generator=g) for s in ((6, 5), (n, 6), (3, 5)))
    first, received = torch.rand(2, n, generator=g)
    project = lambda x: (x @ matrix.to(x.dtype)).tanh()  # noqa: E731
    image = ImageTokens((frames * height, width), {3: received}, {3: first}, features=project(raw), frames=frames)
    image.raw, image.project = lambda: raw, project
    slow = {"grid": image.grid, "frames": frames, "first": {3: first.double()}, "received": received.double()}
    slow |= {"raw": raw.double(), "z": project(raw.double()), "project": project}
    for words in (question, question[:0], None):
        image.question, slow["question"] = words, None if words is None else words.double()
        for spec in ("", "reach=2,rounds=1", "rating=received,complement=1", "reach=0,complement=0.6", "complement=0"):
            for budget in (2, n // 2, n - 1, n):
                method = vlm_fix.parse_spec(f"visiontrim:keep={budget},{spec}".rstrip(","))
                (kept, features), expected = method.reduce(image), more.visiontrim(slow, budget, method)
                assert kept.tolist() == list(expected) and len(kept) == budget, (spec, budget)
                assert float((features - torch.stack([*expected.values()])).abs().max()) < 1e-5
                assert budget < n or torch.equal(features, image.features)


@pytest.mark.parametrize("seed", range(4))
def test_fastvid_on_random_videos(seed):
    """Segments of one frame and of several, frames that keep nothing by themselves, more anchors than a frame has room for."""
    g, frames, n = torch.Generator().manual_seed(seed), 9, 12
    drift = torch.randn(frames, 1, 6, generator=g).cumsum(dim=0) * torch.tensor([0.1, 0.6, 1.5, 0.3])[seed]
    z = (2 + drift + 0.7 * torch.randn(frames, n, 6, generator=g)).flatten(0, 1)
    flow = torch.rand(frames * n, 3, generator=g)
    image = ImageTokens((frames * 3, 4), {}, features=z, frames=frames, video=True, flow={3: flow})
    slow = {"z": z.double(), "frames": frames, "flow": {3: flow.tolist()}}
    for spec in (
        "",
        "segments=1,tau=0.97,ignore=0.99",
        "segments=3,tau=-1,ignore=0.97,every=2,context=0.9,own=0.2",
        "keep=40",
    ):
        method = vlm_fix.parse_spec(f"fastvid:{spec}" if "keep" in spec else f"fastvid:keep=0.4,{spec}".rstrip(","))
        kept, features = method.reduce(image)
        expected = more.fastvid(slow, method.budget(len(z)), method)
        assert kept.tolist() == list(expected) and len(kept) <= method.budget(len(z)) + frames
        assert float((features - torch.stack([*expected.values()])).abs().max()) < 1e-5


FOUR = ["llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", FOUR)
def test_choices_in_bf16_are_those_of_what_the_tower_said(name, monkeypatch):
    """In half precision: the choice from the formula in float64 on the very numbers that the method had."""
    model = BUILD[name](torch.bfloat16) if name in BUILD else copy.deepcopy(families.build(name)).to(torch.bfloat16)
    inputs = single(name, [1, 2], 1) if name in BUILD else families.prompt(name, [2])
    for spec, choose in CHOICES.items():
        if spec in ("uniform_grid",) or "zoo" in spec:
            continue
        seen, method = [], vlm_fix.parse_spec(f"{spec},keep=5" if ":" in spec else f"{spec}:keep=5")
        real = type(method).select
        monkeypatch.setattr(
            type(method),
            "select",
            lambda self, im, seen=seen, real=real: seen.append((im, real(self, im))) or seen[-1][1],
        )
        with vlm_fix.wrapped(model, method):
            greedy(model, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}, 1)
        monkeypatch.undo()
        assert len(seen) == 2
        for image, kept in seen:
            facts = {
                "z": image.features.double(),
                "raw": image.raw().double(),
                "first": image.first,
                "grid": image.grid,
            }
            facts["question"] = None if image.question is None else image.question.double()
            facts["flow"] = {i: x.double().tolist() for i, x in image.flow.items()} | {99: None}
            assert kept.tolist() == choose(facts, 5, method), spec


def test_calibration_measures_the_effective_rank(model, family):
    from vlm_fix.methods.pruning.agilepruner import AgilePruner, effective_rank
    from vlm_fix.sample import Sample

    samples, said = [Sample(single(family, [1, 2], row), 3, 4) for row in range(2)], []
    found = AgilePruner().calibrate(model, samples, 0, lambda what, share: said.append(share))["erank_avg"]
    images = [im for s in samples for im in more.described(family, copy.deepcopy(model).double(), s.inputs)]
    ranks = [float(effective_rank(torch.stack([x.flatten() for x in im["raw"]]))) for im in images]
    assert said == [0, 0.5] and abs(found - sum(ranks) / 3) < 1e-4 and max(ranks) < 36


def test_grid_is_exact_for_every_size():
    for height in range(1, 8):
        for width in range(1, 8):
            image = ImageTokens((height, width), {})
            for budget in range(2, height * width + 1):
                kept = vlm_fix.parse_spec(f"uniform_grid:keep={budget}").select(image).tolist()
                assert len(kept) == budget == len(set(kept)) and kept == sorted(kept)
                assert kept[0] >= 0 and kept[-1] < height * width
    image = ImageTokens((24, 24), {})
    kept = vlm_fix.parse_spec("uniform_grid:keep=64").select(image).tolist()
    assert kept == [y * 24 + x for y in range(1, 24, 3) for x in range(1, 24, 3)]


def test_random_draw_is_uniform_and_belongs_to_the_image():
    images = [ImageTokens((4, 5), {}, pixels=torch.full((3, 8, 8), float(i))) for i in range(400)]
    method = vlm_fix.parse_spec("random_tokens:keep=5")
    draws = [method.select(image).tolist() for image in images]
    assert all(d == sorted(set(d)) and len(d) == 5 for d in draws)
    counts = torch.tensor([i for d in draws for i in d]).bincount(minlength=20)
    assert float((counts - 100).square().sum() / 75) < 43.8  # chi square, 19 degrees of freedom, p = .001
    assert draws == [method.select(image).tolist() for image in images]
    other = vlm_fix.parse_spec("random_tokens:keep=5,seed=1")
    assert sum(other.select(image).tolist() == d for image, d in zip(images, draws, strict=True)) < 10


@pytest.mark.parametrize("spec", ["hiprune", "visionzip", "fastv", "knorm", "a_vl:core=1", "vscan:llm_keep=1"])
def test_a_budget_that_covers_all_is_told_once(models, spec):
    inputs, join = make_inputs("llava", [1, 2]), "," if ":" in spec else ":"
    for keep, told in (("1000", 1), ("1.0", 0), ("0.5", 0)):
        with (
            vlm_fix.wrapped(models["llava"], f"{spec}{join}keep={keep}"),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            greedy(models["llava"], inputs)
            greedy(models["llava"], inputs)
        idle = [str(w.message) for w in caught if "changed nothing" in str(w.message)]
        assert len(idle) == told and all(f"{spec.partition(':')[0]} changed nothing" in line for line in idle)
