"""CCA: rings of any grid, positions in every family, prompts that it refuses."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import attention as edits
from tests.support.run import greedy


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_cca_in_further_mrope_families(name):
    """The model itself, given position ids made by hand: two images of unlike grids, prompt and three words more."""
    model, inputs = families.build(name), families.prompt(name, [1, 2], rows=[1])
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    where = edits.concentric(ids[0].tolist(), grids, mrope=True)[0][:, None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
    given |= {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        expected, plain = model(**given, position_ids=where).logits, model(**given).logits
        with vlm_fix.wrapped(model, "cca:mask=false"):
            assert torch.allclose(model(**given).logits, expected, atol=1e-5)
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
            batch = families.prompt(name, [1, 2])
            rows = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
    assert not torch.allclose(expected, plain, atol=1e-2) and torch.equal(rows[1, -4:], tokens[0, -4:])


def test_cca_with_edits_and_text(family, model):
    """It stacks with edits and a contrast; a text-only row keeps its positions; what it cannot do is said."""
    inputs = make_inputs(family, [1, 0, 2])
    plain = greedy(model, inputs)[1]
    with vlm_fix.wrapped(model, "cca"):
        got = greedy(model, inputs)[1]
    assert float((got[1] - plain[1]).abs().max()) < 1e-5 and not torch.allclose(got[0], plain[0])
    with vlm_fix.wrapped(model, ["cca", "paint", "pai:alpha=0.3", "vcd:beta=0.01"]):
        tokens = greedy(model, make_inputs(family, [1, 2, 1]))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, [1, 2, 1], row))[0][0], tokens[row])
    with (
        vlm_fix.wrapped(model, ["cca", "hiprune:keep=4"]),
        pytest.raises(vlm_fix.VlmFixError, match="without a pruning"),
    ):
        greedy(model, make_inputs(family, [1]))
    if family == "qwen2_5_vl":
        del inputs["mm_token_type_ids"]
        with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="3-D positions"):
            model(**inputs)


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7), (1, 3), (24, 24)])
def test_rings_fit_a_grid_of_any_size(models, height, width):
    """Positions and rings of one h x w image between two words, against peeling the image from outside."""
    from vlm_fix.call import Call
    from vlm_fix.families import arch_of, family_of
    from vlm_fix.methods.attention import cca
    from vlm_fix.session import Session

    model, ids = models["llava"], torch.tensor([[5] + [IMAGE] * height * width + [6, 7]])
    method = vlm_fix.parse_spec("cca").resolve(arch_of(model))
    session = Session(Call(model, family_of(model), {"input_ids": ids}), prompt_len=ids.shape[1])
    session.advance(0, torch.where(ids == IMAGE, 2, 1))
    with vlm_fix.wrapped(model, "cca"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cca, "image_cells", lambda *a: [torch.arange(height * width).view(height, width)])
        ring, image, shift = method.places(session)
    left, peeled, depth = {(y, x) for y in range(height) for x in range(width)}, {}, 0
    while left:
        inner = {(y, x) for y, x in left if {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} <= left}
        peeled.update(dict.fromkeys(left - inner, depth))
        left, depth = inner, depth + 1
    order = [peeled[y, x] for y in range(height) for x in range(width)]
    expected = [0, *(1 + r for r in order), 1 + depth, 2 + depth]
    assert (torch.arange(ids.shape[1]) + shift[0]).tolist() == expected and ring[0, 1:-2].tolist() == order
    assert image[0].tolist() == [0] + [1] * height * width + [0, 0]
    assert depth == 12 or (height, width) != (24, 24)


def test_cca_keeps_to_causal_prompts():
    """All of PaliGemma's prompt sees all of it: rings have nothing to add, their positions do."""
    model, inputs = families.build("paligemma"), families.prompt("paligemma", [1])
    plain = greedy(model, inputs)[1]
    with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="cca:mask=false"):
        greedy(model, inputs)
    with vlm_fix.wrapped(model, "cca:mask=false"):
        assert not torch.allclose(greedy(model, inputs)[1], plain, atol=1e-3)


def test_paint_and_cca_refuse_images_cut_into_crops():
    """LLaVA-NeXT shows an image as several grids with newlines between."""
    model, inputs = families.build("llava_next"), families.prompt("llava_next", [1])
    with pytest.raises(vlm_fix.VlmFixError, match="cannot in llava_next"):
        vlm_fix.wrap(model, "paint")
    with vlm_fix.wrapped(model, "cca"), pytest.raises(vlm_fix.VlmFixError, match="one grid in reading order"):
        greedy(model, inputs)
    with vlm_fix.wrapped(model, ["act", "tame"]):
        greedy(model, inputs)
