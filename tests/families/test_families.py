"""Every family in the table, with tiny random weights: attention edits, a contrast, batches, observe, refusals."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.families import EVERY, TINY, prompt
from tests.support.models import BUILD, IMAGE
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix.families import FAMILIES, REFUSED, attention_modules, get_part
from vlm_fix.observation.layers import by_layer

build = functools.cache(families.build)
SPECS = [
    "var:tau=1.7,min_visual_mass=0.05,rho=0.1,layers=1-",
    "pai:alpha=0.5",
    "vhr:layers=0-",
    "vcd:beta=0.01,noise_step=900",
]
IMAGES = [1, 2, 1]
# in float32 the rounding of their linear attention alone passes 1e-5; in float64 they agree to 1e-13
LINEAR = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6")


@pytest.fixture(params=[n for n in TINY if n != "mllama"])  # that has a file of its own: test_cross.py
def name(request):
    yield request.param
    vlm_fix.unwrap(build(request.param))


def test_all_families_are_tried():
    configs = [build(name).config for name in TINY]
    built = (
        {c.model_type for c in configs} | {f"{c.model_type}+{c.vision_config.model_type}" for c in configs} | set(BUILD)
    )
    elsewhere = {name for name, tiny in EVERY.items() if tiny.needs_timm}  # make test-timm
    assert {kind for f in FAMILIES for kind in f.model_types} <= built | elsewhere


def test_edits_in_batches_and_alone(name):
    """Each method changes the answer's logits; a left-padded batch gives what each row gives; nothing stays behind."""
    model, batch = build(name), prompt(name, IMAGES)
    plain = greedy(model, batch, 4)
    other = greedy(model, {**batch, "pixel_values": batch["pixel_values"].flip(-1)}, 4)[1]
    assert error(other, plain[1].double()) > 1e-3, "the image must matter for this test to mean anything"
    for spec in SPECS:
        with vlm_fix.wrapped(model, spec):
            tokens, _, scores = greedy(model, batch, 4)
            change = (scores - plain[2])[~torch.isinf(scores)].abs().max()
            assert float(change) > 1e-2, f"{spec} must matter for this test to mean anything"
            for row in range(3):
                t, _, s = greedy(model, prompt(name, IMAGES, rows=[row]), 4)
                finite = ~torch.isinf(s[0])
                assert torch.equal(t[0], tokens[row]) and torch.equal(finite, ~torch.isinf(scores[row])), spec
                assert float((s[0] - scores[row])[finite].abs().max()) < 2e-4, spec
        assert torch.equal(greedy(model, batch, 4)[1], plain[1]), "unwrap must restore the model"


def test_markers_of_an_image_keep_their_experts_in_a_prompt_without_it():
    """Ernie sends them to its experts for images, whether or not their keys are taken over from the main prompt."""
    model, batch = build("ernie4_5_vl_moe"), prompt("ernie4_5_vl_moe", IMAGES)
    with vlm_fix.wrapped(model, "m3id:decay=0.3,beta=0"):
        scores = greedy(model, batch, 3)[2]
        for row in range(3):
            alone = greedy(model, prompt("ernie4_5_vl_moe", IMAGES, rows=[row]), 3)[2]
            assert torch.allclose(alone[0], scores[row], atol=2e-4), row


@torch.no_grad()
def test_untouched_rows_are_bit_identical(name):
    model, batch = build(name), prompt(name, IMAGES)
    plain = model(**batch).logits
    with vlm_fix.wrapped(
        model, "pai:alpha=0.5,layers=3"
    ):  # PaliGemma's prompt rows see each other: the last layer only
        edited = model(**batch).logits
    assert torch.equal(edited[:, :-1], plain[:, :-1]) and not torch.equal(edited[:, -1], plain[:, -1])


def test_pai_and_observe_equal_loops(name):
    """Logits and weights on the image against float64 loops over whole matrices, prompt and answer."""
    if name == "paligemma2":
        pytest.skip("capped scores have their own reference: test_softcap.py")
    inputs = prompt(name, [1, 2], rows=[1])
    if name not in LINEAR:
        return equal_loops(name, build(name), inputs)
    with ref.NoFloat32():
        inputs["pixel_values"] = inputs["pixel_values"].double()
        equal_loops(name, ref.float64(build(name)), inputs, near=1e-10)


def equal_loops(name, model, inputs, near=1e-5):
    answer = [5, 17, 40]
    visual, length = ref.visual_columns(inputs["input_ids"]), inputs["input_ids"].shape[1]
    with vlm_fix.wrapped(model, "pai:alpha=0.5"):
        tokens, logits, _ = greedy(model, inputs, 4, suppress_tokens=[IMAGE])
        seen = vlm_fix.observe(model, inputs, answer, text_only=True)
    twin, run, rows = ref.double(model), ref.PaiReference(visual, length, [2, 3], alpha=0.5), []
    plain = ref.teacher_forced(twin, None, inputs, tokens[0, :-1])
    expected = ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
    assert float((expected - plain).abs().max()) > 1e-2 and error(logits[0], expected) < near
    attending = list(attention_modules(ref.decoder(twin)))
    for attn in attention_modules(ref.decoder(twin)).values():
        attn.register_forward_hook(lambda m, a, o: rows.append(o[1][0][:, length - 1 :]))
    ref.teacher_forced(twin, run, inputs, torch.tensor(answer))
    rest = [i for i in range(4) if i not in attending]
    assert not seen.weights_to_image[rest].any() and not seen.heads[rest].any()
    assert error(seen.weights_to_image[attending], torch.stack(rows)[..., visual]) < near
    if name in ("idefics2", "aria"):
        with pytest.raises(vlm_fix.VlmFixError, match="show no certain patch"):
            seen.heatmap(0)
    else:
        assert sum(h * w for h, w in seen.grids) <= len(visual) and len(seen.grids) >= 2
        assert seen.heatmap(0).shape == seen.grids[0] and bool((seen.heatmap(0) > 0).any())
    text = ref.text_only_outputs(twin, inputs, attending)
    assert error(seen.heads_text, by_layer(text, 4)) < near


def test_cells_leave_out_newlines():
    """LLaVA-NeXT: 40 x 20 pixels fill 48 x 24, two tiles below each other: 12 x 6 patches, each row with a newline."""
    model, inputs = build("llava_next"), prompt("llava_next", [1])
    cells = vlm_fix.observe(model, inputs).cells
    assert [tuple(c.shape) for c in cells] == [(6, 6), (12, 6)]
    assert cells[1][0].tolist() == list(range(36, 42)) and cells[1][1].tolist() == list(range(43, 49))


def test_pruners_are_refused_where_the_tower_is_unknown():
    unknown = next(f.name for f in FAMILIES if f.encoder is None)
    with pytest.raises(vlm_fix.VlmFixError, match="cannot read the vision tower of .*; it works with llava"):
        vlm_fix.wrap(build(unknown), "hiprune:keep=4")
    assert "generate" not in build(unknown).__dict__


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_families_say_why(kind):
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    with pytest.raises(vlm_fix.VlmFixError, match=f"'{kind}' are not supported: .+; `vlm-fix models`"):
        vlm_fix.wrap(model, "pai")
    assert get_part(model, "config").model_type == kind


@pytest.mark.parametrize("name", ["gemma3", "aya_vision"])
@pytest.mark.parametrize("spec", [SPECS[0], "pai:alpha=0.5", "zerotuning:rate=0.2", "avar:visual=1.5,system=0.4"])
def test_sliding_static_cache(name, spec):
    """A static cache rolls its windows in place: the same logits as from a growing cache, in a padded batch."""
    model, batch = build(name), prompt(name, IMAGES)
    with vlm_fix.wrapped(model, spec):
        expected = greedy(model, batch, 6, suppress_tokens=[IMAGE])
        got = greedy(model, batch, 6, suppress_tokens=[IMAGE], cache_implementation="static")
    assert torch.equal(got[0], expected[0]) and float((got[1] - expected[1]).abs().max()) < 2e-4
