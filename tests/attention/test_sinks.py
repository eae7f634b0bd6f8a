"""Attention sinks: known dimensions, lives over layers, and what one sample leaves to the next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlm_fix
from tests.support.models import BUILD, single
from tests.support.run import greedy


def test_known_sink_dimensions():
    def dims(family, **sizes):
        arch = replace(vlm_fix.families.arch_of(BUILD["llava"]()), family=family, **sizes)
        return vlm_fix.parse_spec("var").resolve(arch).sink_dims

    by_name = {f.name: f for f in vlm_fix.families.FAMILIES}
    llama = {"text_type": "llama", "hidden": 4096, "depth": 32}
    qwen = {"text_type": "qwen2_vl_text", "hidden": 3584, "depth": 28}
    assert dims(by_name["llava"], **llama, vocab=32064) == (1415, 2533)
    assert dims(by_name["llava"], text_type="llama", hidden=5120, depth=40, vocab=32000) == (2100, 4743)
    assert dims(by_name["qwen2_vl"], **qwen, vocab=152064) == (458, 2570)
    assert dims(by_name["internvl"], **llama, vocab=92553) == (3584,)
    for unknown in (
        dims(by_name["llava"], **llama, vocab=128256),
        dims(by_name["qwen2_5_vl"], **qwen, vocab=152064),
        dims(by_name["internvl"], **llama, vocab=151674),
    ):
        assert unknown is None


def test_secondary_sinks_live_between_the_limits_of_the_depth():
    """Hand-made lives in a model of 36 layers: 4 < layers < 21; below 24 layers the limits shrink."""
    from vlm_fix.methods.attention.sinks import lifetime_limits, secondary

    assert lifetime_limits(36) == (4, 21) and lifetime_limits(48) == (4, 33) and lifetime_limits(24) == (4, 9)
    assert lifetime_limits(12) == (2, 4.5)
    alive = torch.zeros(37, 1, 5, dtype=torch.bool)
    for column, (first, count) in enumerate([(0, 37), (10, 4), (10, 5), (12, 20), (5, 21)]):
        alive[first : first + count, 0, column] = True
    found = secondary(alive, lifetime_limits(36))
    assert found.any(dim=0)[0].tolist() == [False, False, True, True, False]
    assert torch.equal(found[:, :, 2:4], alive[:, :, 2:4])


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_var_forgets_the_sinks_of_the_sample_before(family, model):
    """VAR's official code keeps the sinks of the first sample for later ones; here the second sees its own only."""
    from vlm_fix.methods.attention.var import VAR, VARMemory

    spec = "var:tau=2.2,min_visual_mass=0.1,rho=0.2,layers=1-3"
    first, second = single(family, [2], 0, seed=1), single(family, [1], 0, seed=2)
    with vlm_fix.wrapped(model, spec):
        alone, sinks = greedy(model, second)[1], {}

        def note(self, x, layer, session, original=VAR.read_layer_input):
            original(self, x, layer, session)
            own = sinks.setdefault(id(session), (session, {}))[1]  # held: the next session may take a freed one's id
            own[layer] = session.memory(self, VARMemory).sinks[layer].clone()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VAR, "read_layer_input", note)
            greedy(model, first)
            after = greedy(model, second)[1]
        (_, old), (_, new) = sinks.values()
        width = second["input_ids"].shape[1]
        assert any(not torch.equal(old[i][:, :width], new[i][:, :width]) for i in new), (
            "the samples must differ in sinks"
        )

        def leak(self, a, rows, original=VAR.edit_weights):
            rows.memory(VARMemory).sinks[rows.layer] = old[rows.layer][:, :width]
            return original(self, a, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VAR, "edit_weights", leak)
            assert not torch.equal(greedy(model, second)[1], alone), "a leak must be visible here"
    assert torch.equal(after, alone)
