"""One method of each kind on every family, and the decoders that a LLaVA may hold."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

import vlm_fix
from tests.support import families
from tests.support.families import TINY, prompt
from tests.support.models import IMAGE, make_inputs, single, tiny_llava
from tests.support.run import greedy
from vlm_fix import Sample
from vlm_fix.families import FAMILIES, arch_of, conventions, table
from vlm_fix.pruning.rows import Seen, rows_attention

build = functools.cache(families.build)
IMAGES = [1, 2, 1]
RATES = "iri:rr_attention=0.9|0.2|0.7|0.6,rr_mlp=0.8|0.9|0.3|0.6,sources=2,targets=2"
READ = {  # towers that pruners can look into
    *("llava_next", "llava_onevision", "llava_next_video", "video_llava"),
    *("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
}
STREAMS = ("gemma3n",)  # AltUp: four hidden states for each token between layers
HYBRID = {"qwen3_5": (1, 3), "qwen3_5_moe": (1, 3), "minicpmv4_6": (1, 3), "lfm2_vl": (1, 3)}


def alone(model, name, spec):
    """The answer changes, each row of a batch answers as it does alone, and nothing stays behind."""
    batch = prompt(name, IMAGES)
    plain = greedy(model, batch, 4, suppress_tokens=[IMAGE])
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, batch, 4, suppress_tokens=[IMAGE])
        change = (scores - plain[2])[torch.isfinite(scores) & torch.isfinite(plain[2])].abs().max()
        assert float(change) > 1e-3, spec
        for row in range(2):
            t, _, s = greedy(model, prompt(name, IMAGES, rows=[row]), 4, suppress_tokens=[IMAGE])
            finite = torch.isfinite(s[0]) & torch.isfinite(scores[row])
            assert torch.equal(t[0], tokens[row]) and float((s[0] - scores[row])[finite].abs().max()) < 5e-4, spec
    assert torch.equal(greedy(model, batch, 4, suppress_tokens=[IMAGE])[1], plain[1])


@pytest.mark.parametrize("name", [n for n in TINY if n != "mllama"])
def test_each_kind(name):
    """Logits, hidden states, a second branch with masked columns, and pruning where the tower is read; neutral is exact."""
    model, batch = build(name), prompt(name, IMAGES)
    plain = greedy(model, batch, 3)[1]
    for spec in ("pai:alpha=0", "dola:alpha=0"):
        with vlm_fix.wrapped(model, spec):
            assert torch.equal(greedy(model, batch, 3)[1], plain)
    alone(model, name, RATES)
    for spec in ("dola:layers=0|1|2", "sid:layers=2-"):
        if name in STREAMS:
            with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match="carry 4 streams of them"):
                greedy(model, batch, 1)
        else:
            alone(model, name, spec)
    if name in READ:
        if name != "llava_onevision":  # its larger images here are resized after packing: refused, see test_images.py
            alone(model, name, "hiprune:keep=0.3")
        return
    for spec in ("hiprune:keep=4", "causalmm", "paint"):
        with pytest.raises(vlm_fix.VlmFixError, match="cannot read the vision tower of|reads vision encoders"):
            vlm_fix.wrap(model, spec)
    assert "generate" not in model.__dict__
    assert torch.equal(greedy(model, batch, 3)[1], plain)


@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_decoders_edit_what_has_weights(name):
    model = build(name)
    assert arch_of(model).attention == HYBRID[name]
    assert vlm_fix.parse_spec("pai:layers=0-").resolve(arch_of(model)).layers == HYBRID[name]
    with pytest.raises(vlm_fix.VlmFixError, match="none of the layers 0, 2 has attention weights; .* layers 1, 3 do"):
        vlm_fix.wrap(model, "pai:layers=0|2")
    with pytest.raises(vlm_fix.VlmFixError, match="gift: source_layer=2 has no attention weights"):
        vlm_fix.wrap(model, "gift:source_layer=2")
    with pytest.raises(vlm_fix.VlmFixError, match=r"layer 0 of '0.1' has no attention weights"):
        vlm_fix.wrap(model, "ad_hh:head_list=0.1")
    with pytest.raises(vlm_fix.VlmFixError, match="fastv does not work with this model's (linear attention|conv)"):
        vlm_fix.wrap(model, "fastv")


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_hybrid_decoders_with_beams(name):
    """The second branch follows beams: its running states are reordered with its keys."""
    model, inputs = build(name), prompt(name, [1])
    settings = dict(max_new_tokens=5, num_beams=3, suppress_tokens=[IMAGE], do_sample=False)
    with vlm_fix.wrapped(model, "vcd:beta=0.01,noise_step=900"):
        tokens = model.generate(**inputs, **settings)
        twice = model.generate(**prompt(name, [1, 2]), **settings)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 5 and twice.shape[0] == 2


DECODERS = {
    "phi3": (transformers.Phi3Config, {}),  # one projection for queries, keys and values
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layers": [1, 0, 1, 0]}),
    "hunyuan": (transformers.HunYuanDenseV1Config, {"head_dim": 16}),  # norms after the rotary embedding
    "olmo2": (transformers.Olmo2Config, {}),  # norms over all heads, and after each module
    "ministral3": (  # queries grow with their position
        transformers.Ministral3Config,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "llama": (transformers.LlamaConfig, {}),
}


@functools.cache
def with_decoder(name):
    config, more = DECODERS[name]
    return tiny_llava(config=config, **more)


@pytest.mark.parametrize("name", DECODERS)
def test_recomputed_attention_is_the_models_own(name):
    """Rows of attention, recomputed from a layer's input, equal the weights that eager attention shows."""
    model, inputs, seen = with_decoder(name), make_inputs("llava", [1]), {}

    def note(i, attn, args, kwargs):
        seen[i] = Seen(attn, kwargs["hidden_states"], kwargs["position_embeddings"], None, kwargs.get("position_ids"))

    rows = torch.ones_like(inputs["input_ids"]).bool()
    with vlm_fix.wrapped(model, "vcd"), torch.no_grad():
        handles = [
            layer.self_attn.register_forward_pre_hook(functools.partial(note, i), with_kwargs=True)
            for i, layer in enumerate(model.model.language_model.layers)
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        found = [rows_attention(seen[i], rows, rows) for i in range(4)]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    assert max(float((a - b.mean(dim=1)).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "spec", ["fastv:keep=5,layer=2", "pyramid_drop", "sparsevlm", "ptp", "a_vl:core=0.1,every=2", "sid"]
)
def test_pruners_on_other_decoders(name, spec):
    model, batch = with_decoder(name), make_inputs("llava", [1, 2, 1])
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, batch, 4)
        for row in range(2):
            t, own, _ = greedy(model, single("llava", [1, 2, 1], row), 4)
            assert torch.equal(t[0], tokens[row]) and float((own[0] - logits[row]).abs().max()) < 2e-4


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "llama"])
def test_expected_attention_needs_plain_queries(name):
    with (
        vlm_fix.wrapped(with_decoder(name), "expected_attention:keep=3"),
        pytest.raises(vlm_fix.VlmFixError, match="which those of .*Attention are not"),
    ):
        greedy(with_decoder(name), make_inputs("llava", [1]), 2)


def test_a_family_that_is_not_in_the_table(monkeypatch):
    """One that follows the conventions is tried with a warning, and answers as it does with a row of its own."""
    model, inputs = build("ovis2"), prompt("ovis2", [1, 2])
    with vlm_fix.wrapped(model, "pai:alpha=0.5"):
        expected = greedy(model, inputs, 4)
    monkeypatch.setattr(table, "FAMILIES", tuple(f for f in FAMILIES if f.name != "ovis2"))
    with pytest.warns(UserWarning, match="'ovis2' were not tested .* follows the conventions .get_placeholder_mask, "):
        vlm_fix.wrap(model, "pai:alpha=0.5")
    assert torch.equal(greedy(model, inputs, 4)[1], expected[1])
    vlm_fix.unwrap(model)
    with pytest.raises(vlm_fix.VlmFixError, match="hiprune cannot read the vision tower of ovis2"):
        vlm_fix.wrap(model, "hiprune")
    assert vlm_fix.observe(model, prompt("ovis2", [1])).cells == ()
    conventions._known.clear()
    monkeypatch.setattr(type(model.model.language_model.layers[1].self_attn), "forward", deaf)
    with pytest.raises(vlm_fix.VlmFixError, match="do not call transformers' attention interface"):
        vlm_fix.wrap(model, "pai")
    assert model.config.get_text_config()._attn_implementation == "sdpa" and "generate" not in model.__dict__


def deaf(self, hidden_states, **kwargs):
    return hidden_states, None


def test_a_family_that_lacks_conventions(monkeypatch):
    monkeypatch.setattr(table, "FAMILIES", tuple(f for f in FAMILIES if f.name != "idefics2"))
    with pytest.raises(
        vlm_fix.VlmFixError, match="'idefics2' are not supported; .* it lacks get_placeholder_mask on its"
    ):
        vlm_fix.wrap(build("idefics2"), "pai")


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_heads_of_hybrid_decoders_are_found(name):
    """Where there are heads."""
    model, inputs = build(name), prompt(name, [1])
    best = model(**inputs).logits[0, -1].argsort(descending=True).tolist()
    samples = [Sample(inputs, *pair, {"dog": 7, "cat": 8}) for pair in ((best[0], best[1]), (best[3], best[2]))]
    for spec in ("ad_hh:top=16", "head_pursuit:top=16"):
        found = vlm_fix.parse_spec(spec).calibrate(model, samples, 0, lambda what, share: None)["head_list"]
        assert found and {int(head.partition(".")[0]) for head in found} <= {*HYBRID[name]}
