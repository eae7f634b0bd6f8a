"""A kind of method that the package does not know: a base class and a wing defined here, and no file of the core edited."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch

import vlm_fix
from tests.support.models import make_inputs, single
from tests.support.run import greedy
from vlm_fix.method import Method, param
from vlm_fix.wing import Wing


@dataclass(frozen=True)
class NormScale(Method):
    """The toy kind: its methods scale what the decoder's last norm gives, in every row."""

    def scale(self) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Dim(NormScale):
    """h -> share * h."""

    name = "dim"
    share: float = param(1.0, "factor of the last norm's output", low=0.0)

    @property
    def neutral(self) -> bool:
        return self.share == 1

    def scale(self) -> float:
        return self.share


@pytest.fixture
def wing():
    """The wing of the toy kind, registered by being defined, and what it was told."""
    before = list(Wing.kinds)

    class NormWing(Wing):
        order = 90
        seen: list[str] = []

        @classmethod
        def claim(cls, host):
            return cls(host) if any(isinstance(m, NormScale) for m in host.active) else None

        def check(self):
            names = [m.name for m in self.host.active if isinstance(m, NormScale)]
            if "vhr" in [m.name for m in self.host.active]:
                raise vlm_fix.VlmFixError(f"{names[0]} scales what vhr wrote; use one of them.")

        def install(self):
            factor = 1.0
            for method in self.host.active:
                factor *= method.scale() if isinstance(method, NormScale) else 1
            return [self.host.language.norm.register_forward_hook(lambda module, args, output: output * factor)]

        def refuse(self, options):
            if options.beams > 1:
                raise vlm_fix.VlmFixError("dim does not work with beams; drop num_beams.")

        @contextlib.contextmanager
        def around_generate(self, call, options):
            self.seen.append("begun")
            yield
            self.seen.append("ended")

        def on_prompt(self, session):
            self.seen.append("prompt")

    yield NormWing
    Wing.kinds[:] = before


def test_new_kind_acts_and_comes_off_without_an_edit_of_the_core(family, model, wing):
    inputs = make_inputs(family, [1, 2])
    plain = greedy(model, inputs, 3)[1]
    with vlm_fix.wrapped(model, Dim(share=0.5)):
        dimmed = greedy(model, inputs, 3)[1]
    bias = model.lm_head.bias
    assert bias is None and torch.allclose(dimmed[:, 0], plain[:, 0] / 2, atol=1e-5)
    assert not torch.equal(dimmed, plain)
    assert wing.seen == ["begun", "prompt", "ended"]
    assert torch.equal(greedy(model, inputs, 3)[1], plain), "the wing's hook stayed on the model"


def test_new_kind_stacks_with_the_built_in_ones_and_refuses_what_it_cannot_do(models, wing):
    model, inputs = models["llava"], single("llava", [1, 2], 1)
    with vlm_fix.wrapped(model, "pai:alpha=0.5"):
        alone = greedy(model, inputs, 1)[1]
    with vlm_fix.wrapped(model, ["pai:alpha=0.5", Dim(share=0.5)]):
        assert torch.allclose(greedy(model, inputs, 1)[1], alone / 2, atol=1e-5)
        with pytest.raises(vlm_fix.VlmFixError, match="dim does not work with beams"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)
    with pytest.raises(vlm_fix.VlmFixError, match="dim scales what vhr wrote"):
        vlm_fix.wrap(model, [Dim(share=0.5), "vhr"])


def test_neutral_method_of_a_new_kind_brings_no_wing(models, wing):
    model, inputs = models["llava"], single("llava", [1, 2], 1)
    plain = greedy(model, inputs, 2)
    with vlm_fix.wrapped(model, Dim()):
        assert all(torch.equal(a, b) for a, b in zip(greedy(model, inputs, 2), plain, strict=True))
    assert not wing.seen
