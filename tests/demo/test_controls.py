"""Controls: one a field of a method, with its explanation."""

import dataclasses
import html

import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio")

from vlm_fix import list_methods, parse_spec  # noqa: E402
from vlm_fix.demo import compare  # noqa: E402
from vlm_fix.demo.controls import about, control, remember  # noqa: E402


@pytest.mark.parametrize("cls", list_methods(), ids=lambda c: c.name)
def test_each_field_has_a_control_that_sets_it(cls):
    for field in dataclasses.fields(cls):
        made = control(cls, field, None)
        assert made.info == field.metadata["help"] and made.label == field.name
        untouched = remember({}, made.value, method=cls.name, field=field.name)
        if made.value != "auto":
            assert compare.stack_of([cls.name], untouched) == [cls.name]
        if isinstance(made, gr.Slider):
            low, high = field.metadata["low"], field.metadata["high"]
            low += made.step if field.metadata.get("open") else 0  # such as keep, which must be above 0
            assert made.minimum == low and made.maximum == (
                high or (1 if field.metadata.get("counts") else 5 * field.default)
            )
            for end in (made.minimum, made.maximum):
                spec = compare.stack_of([cls.name], remember({}, end, method=cls.name, field=field.name))[0]
                assert getattr(parse_spec(spec), field.name) == pytest.approx(end, rel=1e-5)


@pytest.mark.parametrize("cls", list_methods(), ids=lambda c: c.name)
def test_each_method_is_explained(cls):
    shown = html.unescape(about(cls))
    for line in (cls.__doc__ or "").strip().splitlines():
        assert line.strip() in shown
    assert cls.paper in shown


def test_numbers_get_sliders_choices_lists_and_layers_boxes():
    pai, hiprune = (next(c for c in list_methods() if c.name == name) for name in ("pai", "hiprune"))
    kinds = {
        f.name: type(control(c, f, None)) for c in (pai, hiprune) for f in dataclasses.fields(c) if f.name != "alpha"
    }
    assert kinds["beta"] is kinds["gamma"] is gr.Slider
    assert kinds["positions"] is gr.Dropdown and kinds["layers"] is kinds["keep"] is gr.Textbox


def test_an_emptied_box_is_the_default():
    options = remember({}, "2-3", method="pai", field="layers")
    assert compare.stack_of(["pai"], options) == ["pai:layers=2-3"]
    assert compare.stack_of(["pai"], remember(options, "", method="pai", field="layers")) == ["pai"]
