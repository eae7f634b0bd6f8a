"""What is easily forgotten in a method of one's own is one sentence that says what to write."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlm_fix
from tests.support.models import make_inputs
from vlm_fix import registry
from vlm_fix.attention.edits import ColumnMasker, HeadEdit, LogWeightEdit, ScoreEdit, WeightEdit
from vlm_fix.decoding.kinds import Contrast, LogitEdit, Procedure
from vlm_fix.hidden.edit import HiddenEdit, LayerOutputEdit
from vlm_fix.method import Method
from vlm_fix.pruning.kinds import CachePruner, LayerPruner, TokenPruner
from vlm_fix.pruning.merge import TokenMerger


class NoDecorator(ScoreEdit):
    name: ClassVar[str] = "no_decorator"
    bonus: float = vlm_fix.param(0.5, "added")

    def edit_scores(self, scores, rows):
        return scores + self.bonus


class PlainField(ScoreEdit):
    name: ClassVar[str] = "plain_field"
    bonus: float = 0.5

    def edit_scores(self, scores, rows):
        return scores + self.bonus


@dataclass(frozen=True)
class NoName(ScoreEdit):
    bonus: float = vlm_fix.param(0.5, "added")

    def edit_scores(self, scores, rows):
        return scores + self.bonus


class OnlyAnotherDefault(vlm_fix.registry.get_method("pai")):
    """A class without parameters of its own needs no decorator."""

    name: ClassVar[str] = "louder_pai"

    @property
    def neutral(self):
        return False


@pytest.mark.parametrize("cls", [NoDecorator, PlainField])
def test_a_forgotten_decorator(cls):
    with pytest.raises(vlm_fix.VlmFixError, match=r"write @dataclass\(frozen=True\) above it"):
        cls()


def test_a_forgotten_name(monkeypatch):
    with pytest.raises(vlm_fix.VlmFixError, match=r'NoName has no name: add name: ClassVar\[str\] = "noname"'):
        NoName()
    module = types.ModuleType("theirs")
    NoName.__module__, module.NoName = "theirs", NoName
    point = types.SimpleNamespace(load=lambda: module)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry._classes.cache_clear()
    try:
        with pytest.raises(vlm_fix.VlmFixError, match="NoName in theirs has no name"):
            vlm_fix.list_methods()
    finally:
        monkeypatch.undo()
        registry._classes.cache_clear()


def test_a_subclass_without_parameters_of_its_own(family, model):
    with vlm_fix.wrapped(model, OnlyAnotherDefault(alpha=0.7)):
        model(**make_inputs(family, [1]))


def made(base, function, value):
    """A method of a kind whose `function` returns `value(its first argument)`."""

    def own(self, x, *rest):
        return value(x)

    own.__name__ = function
    body = {"name": base.__name__.lower(), "__doc__": None, function: own}
    return dataclass(frozen=True)(type(base.__name__, (base,), body))()


KINDS = [(ScoreEdit, "edit_scores"), (WeightEdit, "edit_weights"), (HeadEdit, "edit_heads"), (LayerOutputEdit, "layer_output"),
         (LogitEdit, "edit")]  # fmt: skip
WRONG = {
    "nothing": lambda x: None,
    "one row": lambda x: x[:, :1, :1],
    "transposed": lambda x: x.mT,
    "a number": lambda x: 1.0,
    "a tuple": lambda x: (x, x),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("base", "function"), KINDS, ids=lambda v: getattr(v, "__name__", v))
def test_a_wrong_shape(family, model, base, function, wrong):
    method = made(base, function, WRONG[wrong] if base is not LogitEdit or wrong != "one row" else lambda x: x[:, :1])
    with vlm_fix.wrapped(model, method):
        match = f"{method.name}: {function} must return a tensor of shape"
        with pytest.raises(vlm_fix.VlmFixError, match=match):
            model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, do_sample=False)


def test_wrong_log_weights_and_masks(family, model):
    @dataclass(frozen=True)
    class Bias(LogWeightEdit):
        name: ClassVar[str] = "bias"

        def log_weights(self, rows):
            return torch.zeros(3)

    @dataclass(frozen=True)
    class Mask(ColumnMasker):
        name: ClassVar[str] = "mask"

        def mask_columns(self, weights_from, rows):
            return torch.zeros(7, dtype=torch.bool)

    for method, function in ((Bias(), "log_weights"), (Mask(), "mask_columns")):
        with vlm_fix.wrapped(model, method), pytest.raises(vlm_fix.VlmFixError, match=f"{function} must return"):
            model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, do_sample=False)


def test_wrong_contrasts(family, model):
    @dataclass(frozen=True)
    class Two(Contrast):
        name: ClassVar[str] = "two"

        def negative(self, call):
            return call.inputs["input_ids"]

        def combine(self, l, l_neg):
            return l[:1, :3]

    @dataclass(frozen=True)
    class Short(Two):
        name: ClassVar[str] = "short"

        def negative(self, call):
            return call.inputs

    for method, match in (
        (Two(), "negative must return model inputs"),
        (Short(), "combine must return a tensor of shape"),
    ):
        with vlm_fix.wrapped(model, method), pytest.raises(vlm_fix.VlmFixError, match=match):
            model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    "value",
    [None, [1, 2], torch.ones(36, dtype=torch.bool), torch.ones(2, 2).long(), torch.arange(99)]
    + [torch.tensor(v) for v in ([1, 1], [0, -1], [0, 999])],
)
def test_wrong_choices_of_a_pruner(family, model, value):
    @dataclass(frozen=True)
    class Chooser(TokenPruner):
        name: ClassVar[str] = "chooser"

        def encoder_layers(self, arch):
            return ()

        def select(self, image):
            return value

    with (
        vlm_fix.wrapped(model, Chooser()),
        pytest.raises(vlm_fix.VlmFixError, match="chooser: select must return the indices"),
    ):
        model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, do_sample=False)


def written(base, **body):
    """A class derived from `base` with this body, as one would write it."""
    return dataclass(frozen=True)(type("Mine", (base,), {"name": "mine", "__doc__": None, **body}))


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (ScoreEdit, "edit_scores"),
        (LogitEdit, "edit"),
        (LayerOutputEdit, "layer_output"),
        (TokenPruner, "select"),
        (Contrast, "negative or branches, combine or combine_at"),
        (LayerPruner, "stages, quota or choose, scores or choose"),
        (CachePruner, "scores"),
        (TokenMerger, "reduce"),
    ],
)
def test_a_function_that_is_not_written(base, missing):
    with pytest.raises(vlm_fix.VlmFixError, match=f"Mine does not say what it does: write {missing}, which"):
        written(base)()


@pytest.mark.parametrize(
    ("base", "typed", "meant"),
    [
        (ScoreEdit, "edit_score", "edit_scores"),
        (LayerOutputEdit, "layer_outputs", "layer_output"),
        (LayerOutputEdit, "row_scopes", "row_scope"),
        (LogitEdit, "nuetral", "neutral"),
        (HiddenEdit, "needs_images", "needs_image"),
        (Contrast, "negatives", "negative"),
    ],
)
def test_a_misspelt_name(base, typed, meant):
    with pytest.raises(vlm_fix.VlmFixError, match=f"Mine.{typed} would never be asked for: did you mean {meant}?"):
        written(base, **{typed: lambda self, *rest: None})()


@pytest.mark.parametrize("base", [Method, Procedure, HiddenEdit])
def test_a_kind_that_does_not_act(model, base):
    method = written(base, edit_scores=lambda self, x, rows: x + 1)()
    with pytest.raises(vlm_fix.VlmFixError, match="mine is of no kind that acts: derive it from one of .*ScoreEdit"):
        vlm_fix.wrap(model, method)
    vlm_fix.wrap(model, "baseline")  # neither is nothing at all


@pytest.mark.parametrize("scope", ["nonsense", "last", None])
@pytest.mark.parametrize(("base", "function"), [KINDS[0], KINDS[3]])
def test_a_row_scope_that_is_none(model, base, function, scope):
    method = written(base, row_scope=scope, **{function: lambda self, x, rows: x})()
    with pytest.raises(vlm_fix.VlmFixError, match="mine: row_scope is .*; it must be one of RowScope.LAST"):
        vlm_fix.wrap(model, method)


def test_the_name_of_another_method(model):
    method = written(ScoreEdit, name="pai", edit_scores=lambda self, x, rows: x)()
    with pytest.raises(vlm_fix.VlmFixError, match="Mine is called 'pai', as PAI of vlm_fix.methods.*of its own"):
        vlm_fix.wrap(model, [method])
    with pytest.raises(vlm_fix.VlmFixError, match="name='my method' does not fit a spec"):
        written(ScoreEdit, name="my method", edit_scores=lambda self, x, rows: x)()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("base", "function"), KINDS, ids=lambda v: getattr(v, "__name__", v))
def test_scores_that_are_no_numbers(model, family, base, function, value):
    """Read on a CPU at once; on a device it is asked for after the last token."""
    inputs, asked = make_inputs(family, [1, 2]), []

    def broken(self, x, rows):
        asked.append(1)
        return torch.full_like(x, value)

    with vlm_fix.wrapped(model, written(base, **{function: broken})()):
        with pytest.raises(vlm_fix.VlmFixError, match="with mine the scores of a token were NaN, or none"):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert asked


UNCHANGED = {  # each gives back what it is given, as it is or as a copy
    "ScoreEdit": (ScoreEdit, {"edit_scores": lambda self, z, rows: z}),
    "copied": (ScoreEdit, {"edit_scores": lambda self, z, rows: z.clone()}),
    "LogWeightEdit": (LogWeightEdit, {"log_weights": lambda self, rows: torch.zeros(1, 1, 1, 1)}),
    "WeightEdit": (WeightEdit, {"edit_weights": lambda self, a, rows: a * 1}),
    "HeadEdit": (HeadEdit, {"edit_heads": lambda self, out, rows: out}),
    "LayerOutputEdit": (LayerOutputEdit, {"layer_output": lambda self, x, rows: x}),
    "LogitEdit": (LogitEdit, {"edit": lambda self, l, step: l.clone()}),
    "Contrast": (
        Contrast,
        {"negative": lambda self, call: call.without_images(), "combine": lambda self, l, other: l},
    ),
}


@pytest.mark.parametrize("kind", UNCHANGED)
def test_a_method_that_changes_nothing_is_told_once(kind, family, model):
    base, functions = UNCHANGED[kind]
    cls = dataclass(frozen=True)(type("Mine", (base,), {"name": "mine", "__annotations__": {}, **functions}))
    inputs, settings = make_inputs(family, [1, 1]), dict(max_new_tokens=3, do_sample=False)
    vlm_fix.wrap(model, cls())
    with pytest.warns(UserWarning) as said:
        model.generate(**inputs, **settings)
        model.generate(**inputs, **settings)
    assert [str(w.message) for w in said if w.category is UserWarning] == [
        "mine changed nothing in this call: it gave back what it was given, unchanged, wherever it was asked."
    ]


@pytest.mark.parametrize("layers", ["0", "3", "0-"])
def test_a_method_that_acts_somewhere_is_not_told(layers, family, model, recwarn):
    """In one layer of four, or only from the third row on: that is enough."""

    def late(self, scores, rows):
        return scores + rows.visual if int(rows.positions[-1]) >= rows.session.prompt_len + 1 else scores

    cls = dataclass(frozen=True)(
        type("Late", (ScoreEdit,), {"name": "late", "__annotations__": {}, "edit_scores": late})
    )
    vlm_fix.wrap(model, cls(layers=layers))
    model.generate(**make_inputs(family, [1, 1]), max_new_tokens=4, do_sample=False)
    assert not [w for w in recwarn if "changed nothing" in str(w.message)]


def test_effects_are_asked_for_until_there_is_one():
    from vlm_fix.effects import Effects

    seen, x = Effects(), torch.zeros(3)
    seen.note("a", x, x)
    seen.note("b", x.clone(), x)
    seen.note("c", x + 1, x)
    seen.note("d", x, x)
    seen.note("d", x * torch.nan, x)
    assert list(seen.idle()) == ["a", "b"] and seen.moved == {"a": False, "b": False, "c": True, "d": True}
    seen.note("c", x, x)
    seen.note("b", x + 1, x)
    assert list(seen.idle()) == ["a"]


@pytest.mark.parametrize("grad", [True, False])
def test_a_bare_forward_that_ends_in_nan(grad, family, model):
    """As in generate; a model in training has its own ways with NaN."""
    functions = {"edit_heads": lambda self, out, rows: out * torch.nan}
    cls = dataclass(frozen=True)(type("Mine", (HeadEdit,), {"name": "mine", "__annotations__": {}, **functions}))
    vlm_fix.wrap(model, cls())
    inputs = make_inputs(family, [1, 1])
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(vlm_fix.VlmFixError, match="with mine the scores of a token were NaN"),
    ):
        model(**inputs)
    model.train()
    try:
        assert model(**inputs).logits[:, -1].isnan().all()
    finally:
        model.eval()
    vlm_fix.unwrap(model)
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("base", "function", "own", "meant"),
    [
        (ScoreEdit, "edit_scores", lambda self, scores: scores, r"def edit_scores\(self, scores, rows\)"),
        (ScoreEdit, "edit_scores", lambda self, scores, rows, more: scores, r"def edit_scores\(self, scores, rows\)"),
        (TokenPruner, "select", lambda self: None, r"def select\(self, image\)"),
    ],
)
def test_other_arguments_than_its_kind_hands_over(base, function, own, meant):
    with pytest.raises(vlm_fix.VlmFixError, match=f"Mine.{function} gets other arguments: write {meant}"):
        written(base, **{function: own})()
