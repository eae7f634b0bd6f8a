"""wrap's errors, one sentence each; specs round-trip; the kernel against plain softmax on random shapes."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import BatchFeature

import vlm_fix
from tests.support.cases import CASES, SPECS
from tests.support.models import IMAGE, make_inputs, single
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.kernel import edited_rows
from vlm_fix.attention.stages import LayerEdits, Stages
from vlm_fix.call import Call
from vlm_fix.families.compat import CACHE, cache_of
from vlm_fix.method import Layers, parse_layers
from vlm_fix.packing import left_pack
from vlm_fix.registry import get_method, parse, split_methods
from vlm_fix.rows import Rows
from vlm_fix.session import Session
from vlm_fix.wing import installed


def test_a_generate_that_was_put_on_a_wrapped_model_stays(models, monkeypatch):
    model, inputs = models["llava"], single("llava", [1], 0)
    plain, calls = model.generate(**inputs, max_new_tokens=2, do_sample=False), []
    vlm_fix.wrap(model, "pai:alpha=1")
    wrapped = model.generate

    def mine(*args, **kwargs):
        calls.append(1)
        return wrapped(*args, **kwargs)

    try:
        model.generate = mine
        vlm_fix.wrap(model, "vhr", replace=True)
        model.generate(**inputs, max_new_tokens=2)
        with vlm_fix.wing.engine_of(model).away():
            assert model.generate is mine
        vlm_fix.unwrap(model)
        assert model.generate is mine and torch.equal(
            model.generate(**inputs, max_new_tokens=2, do_sample=False), plain
        )
        vlm_fix.wrap(model, "vhr")
        model.generate = later = lambda *a, **k: "later"
        with vlm_fix.wing.engine_of(model).away():
            assert model.generate is mine
        assert model.generate is later and len(calls) == 2
        vlm_fix.unwrap(model)
        assert model.generate is later
    finally:
        vlm_fix.unwrap(model)
        vars(model).pop("generate", None)


def test_what_reads_all_heads_names_itself_where_tensor_parallelism_shares_them_out(models, monkeypatch):
    model = models["llava"]
    with vlm_fix.wrapped(model, "vista"):
        monkeypatch.setattr(model, "_tp_size", 2)
        with pytest.raises(vlm_fix.VlmFixError, match="^vista works on all heads of a layer"):
            model.generate(**single("llava", [1], 0), max_new_tokens=1)


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("vcdd", "there is no method 'vcdd'; did you mean 'vcd'"),
        ("pai:alfa=1", "pai has no parameter 'alfa'; did you mean 'alpha'"),
        ("pai:alpha=high", "pai: alpha='high' is not a valid value; it takes a number"),
        ("nullu:rank=1.5", "nullu: rank='1.5' is not a valid value; it takes a whole number"),
        ("vcd+", "'vcd+' has a + without a method on one side"),
        ("+vcd", "'+vcd' has a + without a method on one side"),
        ("marine:objects=", "give marine:objects=FILE"),
        ("pai:alpha=-1", "pai: alpha=-1.0 must be a number at least 0"),
        ("pai:alpha=nan", "pai: alpha=nan must be a number at least 0"),
        ("var:p=1.5", "var: p=1.5 must be a number between 0 and 1"),
        ("avar:system=40", "avar: system=40.0 must be a number between 0 and 1"),
        ("vhr:prompt_rows=some", "prompt_rows='some' is not one of last, all"),
        ("pai:layers=2-99", "pai: layers='2-99' does not fit this model, which has layers 0 to 3"),
        ("pai:layers=1|3-2", "pai: 3-2 in layers='1|3-2' is reversed; write 2-3"),
        ("var:sink_dims=3|640", "var: sink_dims=3|640 do not fit this model, which has dimensions 0 to 63"),
        ("pai:layers=x", "pai: layers='x' is not of the form \"2-31\""),
        ("pai:alpha", "'alpha' in 'pai:alpha' is not of the form name=value"),
        ("hiprune:object_layer=9", "object_layer=9 must be a full-attention encoder layer: "),
        ("pai,vcd", "'pai,vcd' has a comma before 'vcd': write 'pai+vcd' for a stack, or a list"),
        ("pai:alpha=.2,vcd:beta=0", "write 'pai:alpha=.2+vcd:beta=0' for a stack"),
        ("pai+vdc", "there is no method 'vdc'; did you mean 'vcd'"),
        ("PAI", "there is no method 'PAI'; did you mean 'pai'"),
        ("pai:alpha=0.2,alpha=0.9", "alpha is given twice in 'pai:alpha=0.2,alpha=0.9'; give it once"),
        ("hiprune:keep=5.5", "hiprune: keep=5.5 is neither a share up to 1 nor a count, which must be whole"),
        ("pyramid_drop:keep=5.5", "keep=(5.5,) is neither a share up to 1 nor a count"),
        (["vcd", "pai:gamma=1.1"], "vcd and pai both contrast; use one of them at a time"),
        (["pai", "pai:alpha=1"], "pai is listed twice"),
        ([], "no method was given"),
    ],
)
def test_bad_spec_is_refused_in_a_sentence(models, spec, sentence):
    model = models["llava"]
    with pytest.raises(vlm_fix.VlmFixError) as error:
        vlm_fix.wrap(model, spec)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert "generate" not in model.__dict__, "nothing half-patched may be left"
    vlm_fix.wrap(vlm_fix.unwrap(model), "pai")
    vlm_fix.unwrap(model)


def test_a_method_at_a_neutral_setting_is_told_where_it_is_put_on(models):
    model, neutral = models["llava"], "these settings are neutral"
    with pytest.warns(UserWarning, match=rf"^pai:alpha=0.0\+hiprune:keep=1.0 .*{neutral}") as told:
        vlm_fix.wrap(model, "pai:alpha=0+vhr+hiprune:keep=1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vlm_fix.wrapped(model, "baseline", replace=True):  # asked for by its name
            pass
        assert [m.name for m in vlm_fix.active(model)] == ["pai", "vhr", "hiprune"], "put back, and not told again"
        with pytest.raises(vlm_fix.VlmFixError):
            vlm_fix.wrap(model, "pai:layers=99", replace=True)
        for spec in SPECS:
            vlm_fix.wrap(model, spec, replace=True)
        vlm_fix.unwrap(model)
    assert len(told) == 1


def of_the_model():
    """(a case's spec of each method, its parameters that name layers or tokens of the model), by their help texts."""
    for name, case in CASES.items():
        for f in dataclasses.fields(get_method(name)):
            whole = f.type in ("int", "int | None", "tuple[int, ...] | None")
            if whole and re.search(r"(?<!every )\blayer\b|token ids", f.metadata["help"]):
                yield pytest.param(case.specs[0], f, id=f"{name}-{f.name}")


@pytest.mark.parametrize(("spec", "field"), of_the_model())
def test_layers_and_tokens_outside_of_the_model_are_refused_when_it_is_wrapped(models, spec, field):
    """Not in the midst of `generate`, as an IndexError."""
    for value in (999, 10**9):
        value = (11, value) if field.type.startswith("tuple") else value
        method = parse(spec)[0].but(**{field.name: value})
        with pytest.raises(vlm_fix.VlmFixError, match=rf"^{method.name}\b.*\d") as error:
            vlm_fix.wrap(models["llava"], method)
        assert "\n" not in str(error.value) and not vlm_fix.active(models["llava"])


@pytest.mark.parametrize(
    ("name", "field", "value", "sentence"),
    [
        ("pai", "layers", 2, 'layers=2 must be layers such as "2-31"'),
        ("pai", "layers", (1.9,), "layers=(1.9,) must be layers"),
        ("pai", "alpha", True, "alpha=True must be a number at least 0"),
        ("vcd", "seed", 1.5, "seed=1.5 must be a whole number"),
        ("icd", "prompt", 3, "prompt=3 must be a text"),
        ("act", "head_list", "5.0", "head_list='5.0' must be a tuple, each of it a text"),
        ("var", "sink_dims", (1.5,), "sink_dims=(1.5,) must be a tuple, each of it a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(name, field, value, sentence):
    with pytest.raises(vlm_fix.VlmFixError) as error:
        get_method(name)(**{field: value})
    assert f"{name}: {sentence}" in str(error.value)


def test_values_of_numpy_are_plain_numbers(models):
    method = get_method("pai")(alpha=np.float32(0.5), layers=[np.int64(1), 2])
    assert type(method.alpha) is float and method == get_method("pai")(alpha=0.5, layers=(1, 2))
    assert vlm_fix.parse_spec(method.spec()) == get_method("pai")(alpha=0.5, layers="1|2")


def test_what_is_no_prompt(models):
    inputs = single("llava", [1, 2], 1)
    ids = inputs["input_ids"]
    with vlm_fix.wrapped(models["llava"], "pai") as model:
        for given, sentence in (
            ({"inputs": ids.tolist()}, 'input_ids must be a tensor, not list: give the processor return_tensors="pt"'),
            ({"inputs": BatchFeature(dict(inputs))}, r"write generate\(\*\*inputs\), with two stars"),
            ({"input_ids": ids[0]}, rf"not of shape \[{ids.shape[1]}\]; one prompt is input_ids\[None\]"),
            ({}, "generate needs a prompt"),
            ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds alone hide where the images are"),
        ):
            with pytest.raises(vlm_fix.VlmFixError, match=sentence):
                model.generate(**given, max_new_tokens=2)


@pytest.mark.parametrize("spec", ["pai", "hulluedit"])
def test_images_that_are_masked(models, spec):
    inputs = single("llava", [1, 2], 1)
    inputs["attention_mask"] = (inputs["input_ids"] != IMAGE).long()
    match = f"{spec} changed nothing in this call: attention_mask masks every image"
    with vlm_fix.wrapped(models["llava"], spec) as model, pytest.warns(UserWarning, match=match):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_a_stack_as_text(models):
    with vlm_fix.wrapped(models["llava"], "pai:alpha=1e+1+vcd") as model:
        assert [m.spec() for m in installed(model).methods] == ["pai:alpha=10.0", "vcd"]
    assert [m.spec() for m in parse(["steer:file=a+b.json", "vhr+vcd"])] == ["steer:file=a+b.json", "vhr", "vcd"]


def test_models_and_calls_that_do_not_fit_are_refused(models):
    model = models["llava"]
    with pytest.raises(vlm_fix.VlmFixError, match="'Linear' are not supported; supported: llava, qwen2_5_vl"):
        vlm_fix.wrap(torch.nn.Linear(2, 2), "pai")
    with pytest.raises(
        vlm_fix.VlmFixError, match="has no language-model head; load it with AutoModelForImageTextToText"
    ):
        vlm_fix.wrap(model.model, "pai")
    model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(vlm_fix.VlmFixError, match="runs 'eager' attention.*set_attn_implementation\\(\"sdpa\"\\)"):
        vlm_fix.wrap(model, "pai")
    model.set_attn_implementation({"text_config": "sdpa"})
    one = single("llava", [1], 0)
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    with vlm_fix.wrapped(model, ["hiprune:keep=4", "vcd"]):
        with pytest.raises(
            vlm_fix.VlmFixError, match="already wrapped with hiprune.*pass replace=True, call vlm_fix.unwrap"
        ):
            vlm_fix.wrap(model, "pai")
        with pytest.raises(vlm_fix.VlmFixError, match="drop output_attentions=True"):
            model.generate(**one, max_new_tokens=2, output_attentions=True)
        with pytest.raises(vlm_fix.VlmFixError, match="drop output_attentions=True"):
            model(**one, output_attentions=True)
        with pytest.raises(vlm_fix.VlmFixError, match="pass the prompt as input_ids"):
            model.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=2)
        with pytest.raises(vlm_fix.VlmFixError, match="hiprune does not work with chunked prefill; drop that option"):
            model.generate(**one, max_new_tokens=2, prefill_chunk_size=11)
    with vlm_fix.wrapped(model, "pai"):
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match="pai changed nothing in this call: no prompt contains an image"),
        ):
            out = model(**text)
        assert out.logits.shape[1] == 4
    with torch.no_grad():
        cache = cache_of(model(**one))
    with (
        vlm_fix.wrapped(model, "pai"),
        pytest.raises(vlm_fix.VlmFixError, match="filled while the model was not wrapped"),
    ):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})


def test_prompts_padded_on_the_right_are_refused(family, model):
    """In generate and in a forward of the caller's own; one prompt of a batch is enough."""
    inputs = make_inputs(family, [1, 2])
    padding = int((inputs["attention_mask"][0] == 0).sum())
    assert padding
    for key in {"input_ids", "attention_mask", "mm_token_type_ids"} & inputs.keys():
        inputs[key][0] = inputs[key][0].roll(-padding)
    for spec in ("pai", "vhr"):
        with vlm_fix.wrapped(model, spec), torch.no_grad():
            for run in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=1)):
                with pytest.raises(vlm_fix.VlmFixError, match='padded on the right.*padding_side = "left"'):
                    run()


def test_a_method_that_changes_nothing_says_so_once(models):
    model, one = models["llava"], single("llava", [1], 0)
    with vlm_fix.wrapped(model, "var:tau=8.1"):  # above sqrt(64): no column can be a sink
        with pytest.warns(UserWarning, match="var changed nothing in this call: no image token was a sink"):
            model.generate(**one, max_new_tokens=2, do_sample=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(**one, max_new_tokens=2, do_sample=False)


def test_lists_serve_as_tuples(models):
    """`layers` and `sink_dims` from Python, as a list, do what the spec string does."""
    from vlm_fix.methods.attention.var import VAR

    one, model, got = single("llava", [1], 0), models["llava"], []
    text = "var:sink_dims=3|17|40,tau=1.5,min_visual_mass=0.1,layers=1|2"
    method = VAR(sink_dims=[3, 17, 40], tau=1.5, min_visual_mass=0.1, layers=[1, 2])
    for spec in (text, method):
        with vlm_fix.wrapped(model, spec):
            got.append(model.generate(**one, max_new_tokens=4, do_sample=False))
    assert torch.equal(*got) and hash(method)


def test_failed_call_leaves_nothing_behind(family, model):
    """After an exception in the middle of generate the next call is right."""
    inputs = make_inputs(family, [1, 2])

    def fail(*args):
        raise RuntimeError("stop")

    with vlm_fix.wrapped(model, ["pai:alpha=0.5", "vcd:beta=0.01"]):
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(**inputs, max_new_tokens=4, do_sample=False, stopping_criteria=[fail])
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


def test_next_turn_on_a_kept_cache(family, model):
    """Two turns with one cache give what the whole conversation gives at once (an edit of the last layer leaves no trace
    in the cache, so that both must be equal)."""
    from transformers import DynamicCache

    first = single(family, [1], 0)
    with vlm_fix.wrapped(model, "pai:alpha=0.5,layers=3"):
        cache = DynamicCache(config=model.config.get_text_config())
        a = model.generate(**first, max_new_tokens=4, do_sample=False, **{CACHE: cache})
        ids = torch.cat([a, torch.tensor([[7, 8, 9]])], 1)
        turn = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family == "qwen2_5_vl":
            turn["mm_token_type_ids"] = (ids == IMAGE).int()
        fresh = model.generate(**turn, max_new_tokens=4, do_sample=False)
        for key in ("pixel_values", "image_grid_thw"):
            turn.pop(key, None)
        kept = model.generate(**turn, max_new_tokens=4, do_sample=False, **{CACHE: cache})
    assert torch.equal(kept, fresh)


@given(st.integers(1, 40), st.data())
def test_layer_ranges_and_lists_parse_to_sorted_indices(depth, data):
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    assert parse_layers(f"{first}-{last}", depth, "x") == tuple(range(first, last + 1))
    assert parse_layers(f"{first}-", depth, "x") == tuple(range(first, depth))
    assert parse_layers(f"{last}|{first}", depth, "x") == tuple(sorted({first, last}))


def _values(hint, meta):
    """Values of one parameter: of its type, in its range."""
    if meta.get("choices"):
        return st.sampled_from(meta["choices"])
    if hint == Layers:
        return st.sampled_from([None, "2-", "1|18-31", (3,), (1, 2)])
    low, high = meta.get("low"), meta.get("high")
    kinds = {
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text()
        | st.sampled_from(["a, b", "a+vcd", "a|b", '"a"', '"', " a", "none", "auto", "", "a\n:=", "a\\", "x.yaml"]),
        type(None): st.none(),
    }
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return st.one_of(
        *(
            st.lists(kinds[typing.get_args(o)[0]], max_size=3).map(tuple) if typing.get_origin(o) is tuple else kinds[o]
            for o in options
            if o in kinds or typing.get_origin(o) is tuple
        )
    )


@pytest.mark.parametrize("cls", vlm_fix.list_methods(), ids=lambda cls: cls.name)
@settings(max_examples=25)
@given(data=st.data())
def test_every_parameter_of_every_method_round_trips(cls, data):
    hints = typing.get_type_hints(cls)
    values = {f.name: data.draw(_values(hints[f.name], f.metadata), label=f.name) for f in dataclasses.fields(cls)}
    try:
        method = cls(**values)
    except vlm_fix.VlmFixError:  # above an open bound, or counts that are not whole
        reject()
    layers = {k: "|".join(map(str, v)) for k, v in values.items() if hints[k] == Layers and isinstance(v, tuple)}
    method = method.but(**layers)
    assert vlm_fix.parse_spec(method.spec()) == method
    stack = [m.spec() for m in (get_method("pai")(), method, get_method("vcd")())]
    assert [m.spec() for m in parse("+".join(stack))] == stack
    assert split_methods(",".join(stack)) == [[spec] for spec in stack]


def test_a_spec_quotes_what_parts_specs():
    marine = get_method("marine")(prompt="It shows {objects}, so+pai")
    assert marine.spec() == 'marine:prompt="It shows {objects}, so+pai"' and parse(f"{marine.spec()}+vhr")[0] == marine
    assert get_method("head_pursuit")(head_list=()).spec() == "head_pursuit:head_list=()"
    assert get_method("steer")(file="a+b.json").spec() == "steer:file=a+b.json"


@given(st.floats(0, 3), st.integers(0, 50), st.integers(51, 99), st.tuples(st.integers(0, 9), st.integers(10, 20)))
def test_specs_round_trip(alpha, low, high, dims):
    for text in (f"pai:alpha={alpha},layers={low}-{high}", f"var:sink_dims={dims[0]}|{dims[1]},rho=0.25"):
        method = vlm_fix.parse_spec(text)
        assert vlm_fix.parse_spec(method.spec()) == method
    assert split_methods(f"vcd,var+pai:alpha={alpha},gamma=1.1,vhr") == [
        ["vcd"],
        ["var", f"pai:alpha={alpha},gamma=1.1"],
        ["vhr"],
    ]
    assert split_methods("pai:alpha=1,gamma=1.1+vhr,vcd") == [["pai:alpha=1,gamma=1.1", "vhr"], ["vcd"]]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_kernel_without_edits_is_attention(batch, groups, kv, rows, extra, seed, chunked):
    """Grouped heads, masks with fully masked rows, any chunk size: equal to softmax by definition in float64."""
    import vlm_fix.attention.kernel as kernel

    g = torch.Generator().manual_seed(seed)
    width = rows + extra
    q, k, v = (torch.randn(batch, h, n, 4, generator=g) for h, n in ((groups * kv, rows), (kv, width), (kv, width)))
    allowed = torch.rand(batch, 1, rows, width, generator=g) < 0.7
    allowed[0, 0, 0] = False
    session = Session(Call(None, None, {}), types=torch.ones(batch, width), prompt_len=width)
    mask = torch.zeros(batch, 1, 1, width, dtype=torch.bool)
    method = vlm_fix.parse_spec("pai")
    seen = Rows(0, session, method, torch.arange(rows), mask, mask, mask)
    edits = LayerEdits(Stages.of([method]), [seen], [None])
    before, kernel.CHUNK_BYTES = kernel.CHUNK_BYTES, 1 if chunked else kernel.CHUNK_BYTES
    try:
        ours = edited_rows(QueryRows(q, k, v, allowed, kernel.Scores(0.5)), edits)
    finally:
        kernel.CHUNK_BYTES = before
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    z = (q @ k.transpose(2, 3) * 0.5).masked_fill(~allowed, -torch.inf)
    assert torch.allclose(ours.double(), z.softmax(-1).nan_to_num(0) @ v, atol=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_left_pack_moves_kept_columns_to_the_right(rows):
    keep = torch.tensor(rows)
    index, mask = left_pack(keep)
    for i, row in enumerate(rows):
        wanted = [j for j, k in enumerate(row) if k]
        assert index[i][mask[i]].tolist() == wanted
        assert mask[i].tolist() == sorted(mask[i].tolist())


def test_every_method_is_documented():
    for cls in vlm_fix.list_methods():
        assert cls.__doc__ and cls.kind
        if cls.paper:
            assert "Source:" in cls.__doc__, cls.name


@pytest.mark.parametrize(
    ("target", "spec"), [("name", "pai"), (None, 3), (None, None), (None, ["pai", 3]), (None, {"pai"})]
)
def test_what_is_no_model_or_no_method(models, target, spec):
    with pytest.raises(vlm_fix.VlmFixError, match="wrap takes a loaded model" if target else "is no method"):
        vlm_fix.wrap(target or models["llava"], spec)
    assert "_vlm_fix_engine" not in models["llava"].__dict__


def test_attention_set_after_wrap_is_refused(family, model):
    inputs = make_inputs(family, [1])
    before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with vlm_fix.wrapped(model, "pai"):
        model.set_attn_implementation({"text_config": "eager"})
        with pytest.raises(vlm_fix.VlmFixError, match="set to 'eager' after wrap.*unwrap the model, then wrap it"):
            model.generate(**inputs, max_new_tokens=3)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), before)


def test_a_pipeline():
    """It holds the model: wrapping either wraps the model."""
    from transformers import pipeline

    from vlm_fix.eval.picto import model_path, scene

    pipe = pipeline("image-text-to-text", model=str(model_path("picto-llava")))
    content = [{"type": "image", "image": scene("test", 0, 0).image}, {"type": "text", "text": "Describe the image."}]
    asked = dict(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    plain = pipe(**asked)
    for target in (pipe.model, pipe):
        with vlm_fix.wrapped(target, "pai:alpha=8"):
            assert pipe(**asked) != plain
        assert pipe(**asked) == plain
