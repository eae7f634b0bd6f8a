"""control_mllm against autograd through materialised float64 attention; regions by hand; what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

import vlm_fix
from tests.support.models import GRIDS, IMAGE, make_inputs, single
from tests.support.references.base import decoder, double
from vlm_fix.errors import VlmFixError
from vlm_fix.methods.procedures import regions
from vlm_fix.methods.procedures.control_mllm import ControlMLLM, Energies

BOX = (0.1, 0.1, 0.6, 0.6)
WAYS = {
    "++": {"version": "++", "rows": "last", "steps": 3, "lr": 0.3, "layers": "1-2"},
    "1": {"version": "1", "steps": 3, "lr": 0.5, "layers": "0-3"},
    "1 as its code": {"version": "1", "steps": 2, "lr": 0.5, "accumulate": True, "layers": "0|2"},
}


def reference(twin, inputs, m, columns, rows, layers, version, steps, lr, accumulate=False):
    """(p, energies): m [N] on the image's columns; autograd through all layers, weights formed, one row after the other."""
    twin.requires_grad_(False)
    p = torch.zeros(len(columns), twin.config.get_text_config().hidden_size, dtype=torch.float64)
    before, added, first, second, energies = p, p, p, p, []
    for step in range(1, steps + 2):
        p = p.detach().requires_grad_()
        shown = (p + before) / 2 if version == "1" else p

        def add(module, args, kwargs, shown=shown, added=added):
            x = kwargs["inputs_embeds"].clone()
            x[0, columns] = x[0, columns] + added + shown
            return args, {**kwargs, "inputs_embeds": x}

        hook = decoder(twin).register_forward_pre_hook(add, with_kwargs=True)
        given = {**inputs, "pixel_values": inputs["pixel_values"].double()}
        weights = twin(**given, output_attentions=True, use_cache=False).attentions
        hook.remove()
        a = sum(weights[i][0, h, r] for i in layers for h in range(4) for r in rows)[columns]
        energy = 400 * (1 - (a * m).sum() / a.sum()) ** 2
        energies.append(float(energy.detach()))
        if step > steps:
            return added + shown, energies
        (grad,) = torch.autograd.grad(energy, p)
        if version == "1":
            before = shown.detach()
            added = added + before if accumulate else added
            p = p - lr * grad
        else:
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            p = p - lr * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-3)


def touched(h, w):
    """By hand: the cells of BOX on h x w."""
    return torch.tensor(
        [
            float(i / h < 0.6 and (i + 1) / h > 0.1 and j / w < 0.6 and (j + 1) / w > 0.1)
            for i in range(h)
            for j in range(w)
        ]
    )


@pytest.mark.parametrize("way", WAYS)
def test_latent_and_energies_against_autograd(model, family, monkeypatch, way):
    """The second of two images is pointed at; the embeddings that the language model gets, and E before and after each step."""
    inputs, how, seen = single(family, [1, 2], 1), WAYS[way], []
    original = ControlMLLM.prepare

    def note(self, session, kwargs):
        new = original(self, session, kwargs)
        if not session.start:
            seen.append((new["inputs_embeds"] - kwargs["inputs_embeds"], session.memory(self, Energies).energy))
        return new

    monkeypatch.setattr(ControlMLLM, "prepare", note)
    with vlm_fix.wrapped(model, ControlMLLM(box=BOX, image=1, contrast=0.0, **how)):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    (added, energy), ids = seen[0], inputs["input_ids"][0]
    h, w = (6, 6) if family == "llava" else (GRIDS[2][0] // 2, GRIDS[2][1] // 2)
    columns = (ids == IMAGE).nonzero()[:, 0][-h * w :]
    last = int(columns[-1])
    rows = range(last + 1, len(ids)) if how["version"] == "1" else [len(ids) - 1]
    layers = {"1-2": [1, 2], "0-3": [0, 1, 2, 3], "0|2": [0, 2]}[how["layers"]]
    rest = {k: how[k] for k in ("version", "steps", "lr", "accumulate") if k in how}
    p, expected = reference(double(model), inputs, touched(h, w), columns, rows, layers, **rest)
    assert torch.allclose(energy[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-3)
    assert float((added[0, columns].double() - p).abs().max() / p.abs().max()) < 1e-3
    others = torch.ones(len(ids), dtype=torch.bool).index_fill(0, columns, False)
    assert not added[0, others].any() and expected[-1] < expected[0]


def test_weights_are_left_alone(model, family):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    try:
        with vlm_fix.wrapped(model, ControlMLLM(box=BOX)):
            model.generate(**single(family, [1, 2], 1), max_new_tokens=2, do_sample=False)
            assert not any("forward" in vars(layer) for layer in decoder(model).layers)
        assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    finally:
        frozen.requires_grad_(True)


def test_the_contrast_is_with_the_plain_model(model, family):
    """(1 + c) l - c l_without, both from models of their own."""
    inputs, how = single(family, [1, 2], 1), {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    full = {**how, "output_logits": True, "output_scores": True}
    plain = model.generate(**inputs, **full).logits[0].log_softmax(dim=-1)
    with vlm_fix.wrapped(model, ControlMLLM(box=BOX, contrast=0.0, lr=0.5)):
        led = model.generate(**inputs, **full).logits[0].log_softmax(dim=-1)
    with vlm_fix.wrapped(model, ControlMLLM(box=BOX, contrast=0.6, lr=0.5)):
        got = model.generate(**inputs, **full).scores[0]
    expected = 1.6 * led - 0.6 * plain
    left = led >= led.max() + math.log(0.1)
    assert torch.equal(got.isfinite(), left) and torch.allclose(got[left], expected[left], atol=1e-4)


def test_regions(tmp_path):
    assert torch.equal(regions.of_box(BOX, (6, 4), "touch", "x"), touched(6, 4).view(6, 4))
    centre = regions.of_box((0.3, 0.3, 0.8, 0.8), (4, 4), "centre", "x")
    assert centre.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    image = Image.new("L", (40, 20))
    image.paste(255, (21, 0, 30, 9))
    image.save(tmp_path / "mask.png")
    for cover in ("touch", "centre"):
        mask = regions.of_mask(str(tmp_path / "mask.png"), (2, 4), cover, "x")
        assert mask.nonzero().tolist() == [[0, 2]], cover
    near = regions.of_points((0.5, 0.5, 0.9, 0.1), (3, 5), 0.4, "x")
    for i in range(3):
        for j in range(5):
            d = [min(math.dist((i + 0.5, j + 0.5), at) for at in ((1.5, 2.5), (0.3, 4.5)))]
            all_d = [
                min(math.dist((a + 0.5, b + 0.5), at) for at in ((1.5, 2.5), (0.3, 4.5)))
                for a in range(3)
                for b in range(5)
            ]
            share = (d[0] - min(all_d)) / (max(all_d) - min(all_d))
            assert math.isclose(
                float(near[i, j]), math.exp(-(share**2) / 0.32) / (math.sqrt(2) * math.pi * 0.4), rel_tol=1e-5
            )


def test_what_it_cannot_do_is_one_sentence(model, family):
    inputs = make_inputs(family, [1, 2])
    for method, words in (
        (ControlMLLM(), "takes one region, and got none"),
        (ControlMLLM(box=BOX, point=(0.1, 0.1)), "got box and point"),
        (ControlMLLM(box=(0.5, 0.1, 0.4, 0.6)), r"left\|top\|right\|bottom"),
        (ControlMLLM(mask="nowhere.png"), "there is no mask"),
        (ControlMLLM(point=(0.1,)), r"points are x\|y"),
        (ControlMLLM(box=BOX, image=4), "no prompt has that many"),
        (ControlMLLM(box=(0.01, 0.01, 0.02, 0.02), cover="centre"), "holds no image token's centre"),
    ):
        with vlm_fix.wrapped(model, method), pytest.raises(VlmFixError, match=words):
            model.generate(**inputs, max_new_tokens=1)


def test_training_is_refused(model, family):
    model.train()
    try:
        spec, message = "control_mllm:box=0.1|0.1|0.6|0.6", "learns at test time"
        with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match=message):
            model(**make_inputs(family, [1]))
    finally:
        model.eval()
