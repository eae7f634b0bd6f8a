"""torch.compile: one graph for attention and hidden edits, made once, with the tokens of the uncompiled model."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

import vlm_fix
from tests.support import families
from tests.support.models import BUILD, make_inputs, single
from tests.support.run import error
from tests.support.tensors import DIRECTIONS, SUBSPACE, VTI, shallow
from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.decoding.kinds import Contrast, LogitEdit, Procedure
from vlm_fix.families.compat import CACHE, cache_of
from vlm_fix.hidden.edit import HiddenEdit
from vlm_fix.registry import list_methods

SPECS = {
    "act": "act:threshold=0.01",
    "ad_hh": "ad_hh:head_list=1.0|1.3,threshold=0",
    "gift": "gift:source_layer=0,layers=1",
    "head_pursuit": "head_pursuit:head_list=1.0|1.3",
    "iri": "iri:rr_attention=1|0.2,rr_mlp=0.3|1",
    "nullu": f"nullu:file={shallow(SUBSPACE, 2)},layers=0-",
    "steer": f"steer:file={shallow(DIRECTIONS, 2)}",
    "var": "var:tau=1.5,min_visual_mass=0,rho=0,layers=0-",
    "vti": f"vti:file={shallow(VTI, 2)}",
}
OTHERS = Contrast | LogitEdit | Procedure  # some are attention edits as well
EDITS = [m.name for m in list_methods() if issubclass(m, AttentionEdit | HiddenEdit) and not issubclass(m, OTHERS)]
KINDS = ("pai", "var", "iri", "paint", "cca")  # one that changes scores, looks at inputs, writes them, prepares, moves


@pytest.fixture(autouse=True)
def forget():
    counters.clear()
    yield
    torch.compiler.reset()


def spec_of(name: str) -> str:
    return SPECS.get(name, name if name in ("cca", "act", "hulluedit") else f"{name}:layers=0-")


def generate(model, inputs, **options):
    keep = dict(do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    return model.generate(**inputs, **keep, **options)


def static(**options) -> dict:
    """Options with which `generate` compiles its decoding steps, on a CPU too."""
    compiled = CompileConfig(backend="aot_eager", mode=None, **options)
    compiled._compile_all_devices = True
    return dict(cache_implementation="static", compile_config=compiled)


def check(model, inputs, spec, graphs=1):
    """Two calls as one graph give the uncompiled logits, and the edit matters."""
    plain = generate(model, inputs)
    with vlm_fix.wrapped(model, spec):
        expected = generate(model, inputs)
        got = [generate(model, inputs, **static(fullgraph=True)) for _ in range(2)]
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert max(error(a, b) for a, b in zip(plain.logits, expected.logits, strict=True)) > 1e-4
    for again in got:
        assert torch.equal(again.sequences, expected.sequences)
        assert max(error(a, b) for a, b in zip(again.logits, expected.logits, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("name", "method"),
    [("llava", m) for m in EDITS] + [("qwen2_5_vl", m) for m in KINDS] + [("gemma3", "pai")],
)
def test_decoding_is_one_graph(name, method):
    """Left-padded batch, static cache: no graph ends, and none is made for another token or call."""
    if name == "gemma3":  # its window fills up on the way, which makes one more graph, unwrapped as well
        check(families.build(name), families.prompt(name, [1, 2]), spec_of(method), graphs=2)
    else:
        check(BUILD[name](depth=2), make_inputs(name, [1, 2]), spec_of(method))


def test_a_stack_is_one_graph():
    check(
        BUILD["llava"](depth=2),
        make_inputs("llava", [1, 2]),
        ["pai:layers=0-", *map(spec_of, ("iri", "var")), "apc_only"],
    )


@pytest.mark.parametrize("option", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_compiled_forward_is_one_graph_from_the_prompt_on(option):
    """model.forward compiled by hand: the prompt is a graph too; a kept cache goes on in the next turn."""
    model, inputs = BUILD["llava"](depth=1), single("llava", [1], 0)
    with vlm_fix.wrapped(
        model, ["pai:alpha=0.5,layers=0-", "vhr:layers=0-", "var:tau=1.5,min_visual_mass=0,rho=0,layers=0"]
    ):

        def turns():
            first = generate(model, inputs, **option)
            if option:
                return first.sequences, first.sequences
            longer = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
            more = dict(input_ids=longer, attention_mask=torch.ones_like(longer), **{CACHE: cache_of(first)})
            return first.sequences, generate(model, more).sequences

        expected, counter = turns(), torch._dynamo.testing.CompileCounter()
        model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
        got = turns()
        made = counter.frame_count
        generate(model, inputs, **option)
    assert all(map(torch.equal, got, expected)) and made <= (2 if option else 5)
    assert counter.frame_count == made


def test_capped_scores_in_one_graph():
    """PaliGemma 2, which transformers cannot run on a static cache: the graph of a growing one knows the cap."""
    model, inputs = families.build("paligemma2"), families.prompt("paligemma2", [1, 2])
    model.set_attn_implementation({"text_config": "eager"})
    with vlm_fix.wrapped(model, "tame"):
        expected = generate(model, inputs)
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        got = generate(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    assert max(error(a, b) for a, b in zip(got.logits, expected.logits, strict=True)) < 1e-5


@pytest.mark.parametrize("spec", ["vcd", "dola:layers=0"])
def test_other_kinds_are_refused_as_one_graph_and_run_in_several(spec):
    model, inputs = BUILD["llava"](depth=2), single("llava", [1], 0)
    with vlm_fix.wrapped(model, spec):
        expected = generate(model, inputs).sequences
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
            generate(model, inputs, **static(fullgraph=True))
        torch.compiler.reset()
        model.__dict__.pop("_compiled_call", None)
        assert torch.equal(generate(model, inputs, **static(fullgraph=False)).sequences, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_static_cache_compiles_by_itself_where_transformers_does(backend, monkeypatch):
    """Unasked, as on an accelerator: one graph without CUDA graphs; other methods, and none, in turns on the same model."""
    from vlm_fix import options

    made = static()["compile_config"]
    made.backend, made.mode = backend, None
    asked = []
    monkeypatch.setattr(options, "compiles_by_itself", lambda model: True)
    monkeypatch.setattr(options, "CompileConfig", lambda mode: asked.append(mode) or made)
    model, inputs = BUILD["llava"](depth=2), make_inputs("llava", [1, 2])
    kept = GenerationConfig(cache_implementation="static", max_new_tokens=6, do_sample=False)
    plain = generate(model, inputs)
    for spec in ("pai:layers=0-", spec_of("iri"), ["vhr:layers=0-", spec_of("var")]):
        with vlm_fix.wrapped(model, spec):
            expected = generate(model, inputs)
            assert not asked and not counters["stats"]["unique_graphs"], "a growing cache is not compiled"
            got = generate(model, inputs, cache_implementation="static")
            again = model.generate(**inputs, generation_config=kept)
        assert asked == ["default"] * 2 and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        assert max(error(a, b) for a, b in zip(plain.logits, expected.logits, strict=True)) > 1e-4
        assert max(error(a, b) for a, b in zip(got.logits, expected.logits, strict=True)) < 1e-5
        assert torch.equal(got.sequences, expected.sequences) and torch.equal(again, expected.sequences)
        asked.clear()
        counters.clear()
    assert kept.compile_config is None and not kept.disable_compile
    with vlm_fix.wrapped(model, "vcd"):
        generate(model, inputs, cache_implementation="static")
    assert not asked and not counters["stats"]["unique_graphs"], "a contrast is not one graph"
    assert torch.equal(generate(model, inputs, cache_implementation="static").sequences, plain.sequences)
