"""What users hand to `generate`, and where they call the model from: nothing of it is read another way once wrapped."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vlm_fix
from tests.support import families
from tests.support.models import BUILD, PAD, VOCAB, make_inputs, single
from tests.support.run import Streamed
from vlm_fix import copies
from vlm_fix.engine import Engine
from vlm_fix.families import get_part, vision_blocks
from vlm_fix.hooks import hooked
from vlm_fix.wing import Host, Wing, installed

STRONG = "pai:alpha=3,layers=0-"
SPECS = [STRONG, "vcd:beta=0.01,noise_step=900", "hiprune:keep=4", "dola:layers=0|2"]
STEPS = {"max_new_tokens": 5, "do_sample": False}


def answer(model, inputs, **more):
    return model.generate(**inputs, **STEPS, **more)


@pytest.mark.parametrize("spec", SPECS)
def test_left_out_mask_is_the_one_transformers_infers(family, model, spec):
    """Padding stays padding where attention_mask is left out, as in the unwrapped model; unless it may end an answer."""
    batch = make_inputs(family, [1, 2])
    bare = {k: v for k, v in batch.items() if k != "attention_mask"}
    assert (batch["input_ids"] == PAD).any()
    plain = answer(model, batch)
    with vlm_fix.wrapped(model, spec):
        expected = answer(model, batch)
        assert torch.equal(answer(model, bare), expected) and not torch.equal(expected, plain)
        ones = answer(model, {**bare, "attention_mask": torch.ones_like(batch["input_ids"])}, eos_token_id=None)
        unknown = answer(model, bare, pad_token_id=PAD, eos_token_id=[2, PAD])
    length = batch["input_ids"].shape[1]
    stop = (ones[:, length:] == PAD).any() or (ones[:, length:] == 2).any()
    assert stop or torch.equal(unknown, ones)


def test_arguments_by_position(family, model):
    inputs = single(family, [1, 2], 1)
    config, ids = copy.deepcopy(model.generation_config), inputs.pop("input_ids")
    config.max_new_tokens, config.do_sample = 5, False
    with vlm_fix.wrapped(model, STRONG):
        expected = model.generate(input_ids=ids, **inputs, **STEPS)
        seen, streamer = [], Streamed()
        processors = LogitsProcessorList([lambda ids, scores: seen.append(1) or scores])
        stop = StoppingCriteriaList([lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)])
        for args, more in (
            ((ids, config), {}),
            ((ids,), {"generation_config": config}),
            ((), {"inputs": ids, "generation_config": config}),
            ((), {"input_ids": ids, "generation_config": config}),
            ((ids, config, processors), {}),
            ((ids, config, None, stop), {}),
            ((ids, config, processors, stop, None, False, None, streamer), {}),
            ((None, config), {"input_ids": ids}),
        ):
            assert torch.equal(model.generate(*args, **more, **inputs), expected)
        assert len(seen) == 10 and streamer.tokens == expected[0].tolist()
        twice = {"generation_config": config}
        for args, more in (((ids, config), {"inputs": ids}), ((ids, *[None] * 11), {}), ((ids, config), twice)):
            with pytest.raises(TypeError):
                model.generate(*args, **more, **inputs)
        for args, more in (((ids, config), {"input_ids": ids}), ((), {"inputs": ids, "input_ids": ids})):
            with pytest.raises(vlm_fix.VlmFixError, match="the prompt is given twice.*leave one of them out"):
                model.generate(*args, **more, **inputs)
    assert not getattr(config, "disable_compile", False), "the caller's config is not written to"


def test_a_callers_generate_with_names_of_its_own(family, model):
    """Its first argument is the prompt, whatever it is called."""
    inputs = single(family, [1, 2], 1)
    ids = inputs.pop("input_ids")
    model.generate = lambda prompt, length=5, **kwargs: type(model).generate(
        model, prompt, max_new_tokens=length, do_sample=False, **kwargs
    )
    try:
        with vlm_fix.wrapped(model, STRONG):
            got = [
                model.generate(ids, **inputs),
                model.generate(ids, 5, **inputs),
                model.generate(prompt=ids, **inputs),
            ]
    finally:
        del model.generate
    with vlm_fix.wrapped(model, STRONG):
        expected = model.generate(ids, **inputs, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(g, expected) for g in got)


def test_janus_own_order_of_arguments():
    """Its generate takes the mask where others take a config."""
    model, inputs = families.build("janus"), families.prompt("janus", [1, 2])
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    with vlm_fix.wrapped(model, "pai:alpha=0.5"):
        expected = model.generate(input_ids=ids, attention_mask=mask, **inputs, **STEPS)
        assert torch.equal(model.generate(ids, mask, **inputs, **STEPS), expected)


def answers_elsewhere(model, inputs):
    return answer(model, inputs), [m.name for m in installed(model).methods]


def test_a_wrapped_model_in_another_process():
    """Qwen2.5-VL: a LLaVA loses its tower's hidden states there by itself, as transformers notes them where it is built."""
    model, inputs = BUILD["qwen2_5_vl"](), make_inputs("qwen2_5_vl", [1, 2])
    vlm_fix.wrap(model, STRONG)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs, names = pool.apply(answers_elsewhere, (model, inputs))
    assert torch.equal(theirs, answer(model, inputs)) and names == [m.name for m in installed(model).methods]


def test_users_own_generate_is_used_and_put_back(family, model):
    inputs, calls = single(family, [1, 2], 1), []

    def own(*args, **kwargs):
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    try:
        plain = answer(model, inputs)
        with vlm_fix.wrapped(model, STRONG):
            assert not torch.equal(answer(model, inputs), plain)
        assert model.generate is own and len(calls) == 2
        vlm_fix.unwrap(vlm_fix.wrap(model, "baseline"))
        assert model.generate is own
    finally:
        del model.generate


def state_of(model):
    ours = [
        (n, [h for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) if "vlm_fix" in repr(h)])
        for n, m in model.named_modules()
    ]
    hooks = [(n, found) for n, found in ours if found]
    extra = [(n, sorted(k for k in vars(m) if "vlm" in k)) for n, m in model.named_modules()]
    names = sorted(k for k in vars(model) if not k.startswith("_"))
    return hooks, extra, names, model.config.get_text_config()._attn_implementation


@pytest.mark.parametrize("step", range(0, 12, 2))
def test_failure_at_any_step_of_install_leaves_the_model_as_it_was(family, model, step, monkeypatch):
    """The n-th hook cannot be registered; afterwards the model is the same, and can be wrapped."""
    inputs, before, count = single(family, [1, 2], 1), state_of(model), [0]
    plain = answer(model, inputs)

    def failing(register):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] > step:
                raise RuntimeError("no more hooks")
            return register(*args, **kwargs)

        return run

    stack = ["hiprune:keep=4", "var:tau=1.7,layers=1-", "vcd", "iri:sources=mlp.1,targets=mlp.2"]
    stack = stack[:3]
    with monkeypatch.context() as patch:
        for name in ("register_forward_pre_hook", "register_forward_hook"):
            patch.setattr(nn.Module, name, failing(getattr(nn.Module, name)))
        with pytest.raises(RuntimeError, match="no more hooks"):
            vlm_fix.wrap(model, stack)
    assert state_of(model) == before and installed(model) is None
    assert torch.equal(answer(model, inputs), plain)
    with vlm_fix.wrapped(model, stack):
        answer(model, inputs)
    assert state_of(model) == before


def test_failing_wing_is_undone(family, model, monkeypatch):
    """Also where a wing's own install fails after others have installed theirs."""
    before = state_of(model)
    monkeypatch.setattr(Wing, "kinds", list(Wing.kinds))  # a wing registers itself

    class Broken(Wing):
        order = 99

        @classmethod
        def claim(cls, host: Host):
            return cls(host)

        def install(self):
            raise vlm_fix.VlmFixError("this wing is broken")

    with pytest.raises(vlm_fix.VlmFixError, match="this wing is broken"):
        vlm_fix.wrap(model, "pai")
    assert state_of(model) == before


@torch.no_grad()
def test_bare_forwards_in_threads_do_not_meet(family, model):
    """Prompts of other lengths, one model: each thread gets what it gets alone, beside a running generate."""
    prompts = [single(family, [1, 2, 1], i, seed=s) for i in range(3) for s in (0, 1)]
    with vlm_fix.wrapped(model, STRONG):
        alone = [model(**p).logits for p in prompts]
        tokens = answer(model, prompts[1])
        wrong, stop = [], threading.Event()

        def work(i):
            while not stop.is_set():
                if not torch.equal(model(**prompts[i]).logits, alone[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=torch.no_grad()(work), args=(i,)) for i in (0, 2, 4)]
        for thread in threads:
            thread.start()
        try:
            again = [answer(model, prompts[1]) for _ in range(4)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not wrong and all(torch.equal(a, tokens) for a in again)


LOOKING = ["hiprune", "visionzip:keep=4", "vscan:keep=4", "flowcut:keep=4", "downsample_image:keep=0.25"]
LOOKING += ["paint", "causalmm", "vista", "control_mllm:box=0|0|0.5|0.6,layers=0|1"]


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("spec", LOOKING)
@torch.no_grad()
def test_a_forward_amid_another_threads_own(family, spec, call):
    """At every place of a call's forwards, its methods' own passes among them, another thread runs a whole forward.

    The weights are float64: some methods compute with them in float32.
    """
    model, me, got = BUILD[family](dtype=torch.float64), threading.get_ident(), []
    inputs = make_inputs(family, [1, 2], dtype=torch.float64)
    # two passes of control_mllm wait for each other, which a forward without an image does not run
    images = [0] if spec.startswith("control_mllm") else [2, 0, 2]
    other = make_inputs(family, images, seed=1, text=9, dtype=torch.float64)

    def outer():
        return scores(model, inputs) if call == "generate" else model(**inputs, use_cache=False).logits

    def forward():
        got.append("failed")
        with torch.no_grad():
            got[-1] = model(**other, use_cache=False).logits

    def amid(*_):
        if threading.get_ident() == me:
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join(60)

    with vlm_fix.wrapped(model, spec):
        expected, alone = outer(), model(**other, use_cache=False).logits
    with vlm_fix.wrapped(model, spec):
        engine = installed(model)
        places = [getattr(b, "self_attn", None) or b.attn for b in vision_blocks(model, engine.family)]
        places += [getattr(engine.base, "multi_modal_projector", None) or engine.base.visual.merger]
        places += [get_part(model, engine.family.vision), *engine.language.layers, engine.language.norm, model.lm_head]
        with hooked([place.register_forward_hook(amid) for place in places]):
            result = outer()
    assert torch.equal(result, expected) and len(got) >= len(places)
    assert all(torch.is_tensor(x) and torch.equal(x, alone) for x in got)


@torch.no_grad()
def test_a_head_is_measured_in_one_thread(family):
    """In the first call another thread's forward has come from the language head to the model's end, and waits there."""
    model, inputs, me = BUILD[family](), single(family, [1, 2], 1), threading.get_ident()
    reached, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=torch.no_grad()(lambda: model(**single(family, [1, 2], 0, seed=3))))

    def at_end(*_):
        if threading.get_ident() != me:
            reached.set()
            go.wait(60)
        elif not reached.is_set():
            thread.start()
            assert reached.wait(60)

    with vlm_fix.wrapped(model, "dola:layers=0|2"):
        expected = scores(model, inputs)
    with vlm_fix.wrapped(model, "dola:layers=0|2"), hooked([model.register_forward_hook(at_end)]):
        try:
            assert torch.equal(scores(model, inputs), expected)
        finally:
            go.set()
            thread.join()


def scores(model, inputs):
    more = {"max_new_tokens": 2, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, **more).scores)


class Telling(BaseStreamer):
    """A streamer that calls `tell` for each piece and at the end."""

    def __init__(self, tell):
        self.tell = tell

    def put(self, value):
        self.tell()

    def end(self):
        self.tell()


@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"])
@pytest.mark.parametrize("spec", [STRONG, "vcd:beta=0.01,noise_step=900", "dola:layers=0|2", "sgrs"])
@torch.no_grad()
def test_what_a_callers_code_runs_is_a_call_of_its_own(family, model, spec, place):
    """Code of the caller's inside generate runs the model and its generate on another prompt; neither changes anything."""
    inputs, other = single(family, [1, 2], 1), single(family, [2], 0, seed=3)
    with vlm_fix.wrapped(model, spec):
        expected, logits, tokens, seen = answer(model, inputs), model(**other).logits, answer(model, other), []

        def look():
            seen.append(torch.equal(model(**other).logits, logits) and torch.equal(answer(model, other), tokens))

        code = {
            "logits_processor": [lambda ids, scores: look() or scores],
            "stopping_criteria": [lambda ids, scores, **kwargs: look() or torch.zeros(len(ids), dtype=torch.bool)],
            "prefix_allowed_tokens_fn": lambda row, ids: look() or list(range(VOCAB)),
            "streamer": Telling(look),
        }
        got = answer(model, inputs, **{place: code[place]})
    assert torch.equal(got, expected) and len(seen) >= 5 and all(seen)


@pytest.mark.parametrize("spec", [STRONG, "vcd:beta=0.01,noise_step=900", "hiprune:keep=4", "knorm:keep=3"])
def test_unwrap_inside_generate(family, model, spec):
    """From the caller's code inside generate it is refused, and the answer goes on edited; from a thread it waits."""
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, spec):
        expected, refused, waits, began = answer(model, inputs), [], [], threading.Event()

        def unwrap(ids, scores, **kwargs):
            with pytest.raises(vlm_fix.VlmFixError, match="unwrap it when generate has returned"):
                vlm_fix.unwrap(model)
            refused.append(installed(model) is not None)
            return torch.zeros(len(ids), dtype=torch.bool)

        assert torch.equal(answer(model, inputs, stopping_criteria=[unwrap]), expected) and refused == [True] * 5

        def wait(ids, scores, **kwargs):
            began.set()
            thread.join(0.05)
            waits.append(thread.is_alive())
            return torch.zeros(len(ids), dtype=torch.bool)

        thread = threading.Thread(target=lambda: began.wait() and vlm_fix.unwrap(model))
        thread.start()
        assert torch.equal(answer(model, inputs, stopping_criteria=[wait]), expected) and waits == [True] * 5
        thread.join(10)
        assert not thread.is_alive() and installed(model) is None and "generate" not in vars(model)


def test_copies_are_wrapped_and_stand_alone(family):
    model, inputs = BUILD[family](), make_inputs(family, [1, 2])
    vlm_fix.wrap(model, [STRONG])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    expected = answer(model, inputs)
    plain = answer(vlm_fix.unwrap(model), inputs)
    assert not torch.equal(plain, expected) and installed(model) is None
    for twin in made:
        assert isinstance(installed(twin), Engine) and installed(twin).model is twin
        assert torch.equal(answer(twin, inputs), expected)
        assert torch.equal(answer(vlm_fix.unwrap(twin), inputs), plain)
        assert torch.equal(answer(copy.deepcopy(twin), inputs), plain), "unwrapped, it is copied as ever"


def test_copies_of_parts_are_plain(family):
    model, inputs = BUILD[family](), make_inputs(family, [1, 2])
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(inputs["input_ids"])

    def read(decoder):
        return decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state

    vlm_fix.wrap(model, SPECS[:2])
    thawed = pickle.loads(pickle.dumps(decoder))  # before a forward, at which transformers adds what cannot be pickled
    plain = read(thawed)
    expected = answer(model, inputs)
    for part in (decoder.layers[1].self_attn, decoder.layers[1]):
        assert not any("_vlm_fix" in vars(module) for module in copy.deepcopy(part).modules())
    layers, whole, twin = copy.deepcopy([decoder.layers, model.model, decoder])
    assert twin is whole.language_model and layers is twin.layers, "one copy of each, however it is reached"
    assert torch.equal(read(twin), plain) and not twin._forward_pre_hooks
    assert twin.config._attn_implementation == "sdpa" and not {*copies.PROTOCOL} & {*vars(twin)}
    config, second = copy.deepcopy([model.config, model])
    assert second.config is config and torch.equal(answer(second, inputs), expected)
    assert torch.equal(answer(model, inputs), expected), "the model is still wrapped"
    left = [part for part in vlm_fix.unwrap(model).modules() if {*copies.PROTOCOL} & {*vars(part)}]
    assert not left and torch.equal(read(decoder), plain) and installed(thawed) is None


def test_a_config_of_a_wrapped_model_is_plain(family):
    model, inputs = BUILD[family](), make_inputs(family, [1, 2])
    before = model.config.get_text_config()._attn_implementation
    vlm_fix.wrap(model, [STRONG])
    expected = answer(model, inputs)
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        twin = type(model)(config).eval()
        twin.load_state_dict(model.state_dict())
        assert config.get_text_config()._attn_implementation == before
        assert torch.equal(answer(vlm_fix.wrap(twin, [STRONG]), inputs), expected)
    shared = type(model)(model.config).eval()  # the very config, which says our attention until `unwrap`
    shared.load_state_dict(model.state_dict())
    vlm_fix.unwrap(model)
    assert shared.config.get_text_config()._attn_implementation == before
    config = copy.copy(model.config)
    config._attn_implementation = {"text_config": "vlm_fix"}
    vlm_fix.unwrap(vlm_fix.wrap(type(model)(config), [STRONG]))
    assert config.get_text_config()._attn_implementation == before


def test_compiled_module_is_wrapped_inside(family, model):
    inputs = single(family, [1, 2], 1)
    plain = answer(model, inputs)
    compiled = torch.compile(model, backend="eager")
    with vlm_fix.wrapped(model, STRONG):
        expected = answer(model, inputs)
    with vlm_fix.wrapped(compiled, STRONG):
        assert torch.equal(answer(compiled, inputs), expected) and not torch.equal(expected, plain)
        with pytest.raises(vlm_fix.VlmFixError, match="already wrapped with pai"):
            vlm_fix.wrap(model, "pai")
    assert torch.equal(answer(model, inputs), plain)


def test_peft_model_is_wrapped_inside(family):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'vlm-fix[dev]'")
    model, inputs = BUILD[family](), single(family, [1, 2], 1)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    plain = answer(tuned, inputs)
    with vlm_fix.wrapped(tuned, STRONG):
        expected = answer(tuned, inputs)
        with tuned.disable_adapter():
            base = answer(tuned, inputs)
    assert not torch.equal(expected, plain) and torch.equal(answer(tuned, inputs), plain)
    with tuned.disable_adapter(), vlm_fix.wrapped(tuned, STRONG):
        assert torch.equal(answer(tuned, inputs), base)
    merged = tuned.merge_and_unload()
    with vlm_fix.wrapped(merged, STRONG):
        assert torch.equal(answer(merged, inputs), expected)


@pytest.mark.parametrize("spec", ["pai", "vcd", "hiprune:keep=4", "fastv", ["hiprune:keep=4", "vcd"]])
def test_prompts_without_an_image_pass_through_with_one_warning(family, model, spec):
    text = single(family, [0, 1], 0)
    plain = answer(model, text)
    with vlm_fix.wrapped(model, spec):
        with pytest.warns(UserWarning, match="changed nothing in this call: no prompt contains an image") as caught:
            assert torch.equal(answer(model, text), plain)
            assert torch.equal(answer(model, text), plain)
        assert len([w for w in caught if "no prompt" in str(w.message)]) == 1
    alone = pytest.raises(vlm_fix.VlmFixError, match="pai needs an image.*dola beside it would act alone")
    with vlm_fix.wrapped(model, ["pai", "dola:layers=0|2"]), alone:
        answer(model, text)
