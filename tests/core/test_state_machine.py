"""Whatever is done with two models, in whatever order: a wrapped one answers as a fresh one does, and unwrapped nothing is left.

Every step is followed by a look at the model without its methods, whose logits must be bit for bit those from before any
wrap. `VLM_FIX_STEPS=20000` takes more steps than the 2,000 of every run of the tests.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import threading
import warnings

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import vlm_fix
from tests.support.models import BUILD, IMAGE, make_inputs
from vlm_fix.families.compat import CACHE, cache_of
from vlm_fix.wing import installed

STEPS = int(os.environ.get("VLM_FIX_STEPS", "2000"))
PARTS = 4  # which workers of the tests share
LENGTH = 50  # steps of one example
SPECS = [
    "pai:alpha=0.5",
    "vhr:layers=0-",
    "var:tau=2.2,min_visual_mass=0.1,rho=0.2,layers=1-3",
    "vcd:beta=0.01,noise_step=900",
    "dola:layers=0|1|2",
    "hiprune:keep=4",
    "fastv:keep=5,layer=2",
    "knorm:keep=0.5",
    "act:threshold=0.06,beta=0.1,layers=0-3",
    "iri:rr_attention=0.9|0.2|0.7|0.6,rr_mlp=0.8|0.9|0.3|0.6,sources=2,targets=2",
    "pai:alpha=0.5+vcd:beta=0.01,noise_step=900",
]
MODES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=1.3),
    "beams": dict(num_beams=2),
    "several": dict(do_sample=True, num_return_sequences=2),
    "penalty": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "lookup": dict(prompt_lookup_num_tokens=2),
    "static": dict(cache_implementation="static"),
    "cacheless": dict(use_cache=False),
    "chunks": dict(prefill_chunk_size=11),
}
PROMPTS = {"image": [1], "batch": [1, 2], "text": [0]}
BROKEN = [
    "nosuchmethod",
    "pai:alpha=-1",
    "pai:layers=99",
    "pai+pai",
    "vcd+icd:tokens=5",
    "fastv:layer=77",
    "gift:source_layer=9",
]
FAMILIES = list(BUILD)
OWN = {
    "_output_capturing_hooks_installed",
    "_previous_max_cache_length",
}  # transformers' own marks, from their first use


@functools.cache
def pristine(family):
    """A model that only makes references, each under a wrap of its own."""
    return BUILD[family]()


@functools.cache
def prompt(family, name):
    return make_inputs(family, PROMPTS[name])


@contextlib.contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcome(function):
    """What a call gives: its tensors, or the sentence with which it is refused, by us or by transformers itself."""
    try:
        with silent():
            return function()
    except vlm_fix.VlmFixError as error:
        return str(error)
    except ValueError as error:
        if str(error) != "assisted generate is only supported for batch_size = 1":
            raise
        return str(error)


def same(one, other):
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(map(torch.equal, one, other))


def answered(model, family, name, mode, **more):
    """Tokens and scores of an answer of three tokens, none of which is an image."""
    torch.manual_seed(0)
    asked = {"do_sample": False, "suppress_tokens": [IMAGE], **MODES[mode], **more}
    out = model.generate(
        **prompt(family, name), max_new_tokens=3, return_dict_in_generate=True, output_scores=True, **asked
    )
    return [out.sequences, *out.scores]


@torch.no_grad()
def forwarded(model, family, name):
    """Logits of a prompt and of a step after it, of a caller's own loop."""
    inputs = prompt(family, name)
    first = model(**inputs, use_cache=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": first.logits[:, -1:].argmax(-1), "attention_mask": mask, CACHE: cache_of(first)}
    if family == "qwen2_5_vl":  # its own positions of a step are those of the whole mask
        moved = model.model.rope_deltas if "pixel_values" in inputs else 0
        step["position_ids"] = (mask.sum(-1, keepdim=True) - 1 + moved).expand(3, -1, -1)
        step["mm_token_type_ids"] = torch.zeros_like(step["input_ids"])
    return [first.logits, model(**step).logits]


def conversed(model, family):
    """The cache of a first turn, and the ids of a second one that begins with it."""
    out = model.generate(**prompt(family, "image"), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    return cache_of(out), torch.cat([out.sequences, torch.tensor([[7, 8, 9]])], dim=1)


def went_on(model, cache, ids):
    """Tokens and scores of the second turn."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: copy.deepcopy(cache)}
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_scores=True)
    return [out.sequences, *out.scores]


@functools.cache
def reference(family, spec, function, *args):
    """What a fresh wrap of `spec` (None: no wrap) gives."""
    model = pristine(family)
    with vlm_fix.wrapped(model, spec) if spec else contextlib.nullcontext():
        return outcome(lambda: function(model, family, *args))


def two_turns(model, family):
    return went_on(model, *conversed(model, family))


def hooks(found):
    """Without those by which transformers itself keeps hidden states, and which it leaves."""
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in found.values())


def captured(model):
    """True if hooks that cannot be pickled are on a model, by which transformers itself keeps hidden states."""
    return any(
        hook.__module__.startswith("transformers.")
        for part in model.modules()
        for hook in part._forward_hooks.values()
        if hasattr(hook, "__module__")
    )


def traces(model):
    """What could be left on a model: attributes and hooks of its parts, its attention, its generation config."""
    parts = [
        (name, sorted(vars(part).keys() - OWN), *map(hooks, (part._forward_hooks, part._forward_pre_hooks)))
        for name, part in model.named_modules()
    ]
    config = model.config.get_text_config()
    return (
        parts,
        str(config._attn_implementation),
        type(config._attn_implementation_internal),
        repr(model.generation_config),
    )


def different(now, clean):
    """The parts and names in which two `traces` differ."""
    parts = [(a[0], {*a[1]} ^ {*b[1]}, a[2:], b[2:]) for a, b in zip(now[0], clean[0], strict=True) if a != b]
    return parts + [pair for pair in zip(now[1:], clean[1:], strict=True) if len({*map(str, pair)}) > 1]


@torch.no_grad()
def plain(model, family):
    """Logits of one token more: the prompt's alone are not asked for."""
    torch.manual_seed(0)
    out = model.generate(
        **prompt(family, "image"), max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.logits[0]


@functools.cache
def untouched(family):
    return plain(pristine(family), family), traces(pristine(family))


class Interrupted(Exception):
    pass


class Raise:
    """Raises at its n-th call: a hook, a stopping criterion, a logits processor or a streamer."""

    def __init__(self, error, n):
        self.error, self.left = error, n

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return torch.zeros(len(args[0]), dtype=torch.bool) if len(args) == 2 and args[0].dim() == 2 else None


class Models(RuleBasedStateMachine):
    """`self.now` is the model that a step is about."""

    steps = 0  # of all examples

    def __init__(self):
        super().__init__()
        self.models = {family: live(family) for family in FAMILIES}
        self.specs = dict.fromkeys(FAMILIES)
        self.kept = dict.fromkeys(
            FAMILIES
        )  # a cache of an earlier turn, its ids, and how often the model was wrapped then
        self.wraps, self.now = 0, FAMILIES[0]

    # ---- what is looked at after every step ------------------------------------------------------------------------

    def look(self, model, family):
        expected, clean = untouched(family)
        engine = installed(model)
        with engine.away() if engine else contextlib.nullcontext():
            assert traces(model) == clean, f"left on the model: {different(traces(model), clean)}"
            assert torch.equal(plain(model, family), expected), "the model answers otherwise than before"

    def looked(function):
        """A rule about the model `family`, with the look after it."""

        @functools.wraps(function)
        def step(self, family, **drawn):
            self.now = family
            Models.steps += 1
            function(self, family, **drawn)
            assert (installed(self.models[family]) is not None) == bool(self.specs[family])
            self.look(self.models[family], family)

        return step

    def check(self, family, function, *args, model=None):
        """The model gives what a fresh one gives."""
        model = self.models[family] if model is None else model
        expected = reference(family, self.specs[family], function, *args)
        found = outcome(lambda: function(model, family, *args))
        assert same(found, expected), (
            self.specs[family],
            function.__name__,
            args,
            found if isinstance(found, str) else "",
        )

    # ---- on and off --------------------------------------------------------------------------------------------------

    @rule(family=st.sampled_from(FAMILIES), spec=st.sampled_from(SPECS))
    @looked
    def wrap(self, family, spec):
        before = self.specs[family]
        try:
            vlm_fix.wrap(self.models[family], spec)
        except vlm_fix.VlmFixError as error:
            assert before and "already wrapped" in str(error)
        else:
            assert not before
            self.specs[family], self.wraps = spec, self.wraps + 1

    @rule(family=st.sampled_from(FAMILIES))
    @looked
    def unwrap(self, family):
        vlm_fix.unwrap(self.models[family])
        self.specs[family] = None

    @rule(family=st.sampled_from(FAMILIES), spec=st.sampled_from(SPECS))
    @looked
    def replace(self, family, spec):
        vlm_fix.wrap(vlm_fix.unwrap(self.models[family]), spec)
        self.specs[family], self.wraps = spec, self.wraps + 1

    @rule(family=st.sampled_from(FAMILIES), spec=st.sampled_from(BROKEN))
    @looked
    def wrap_in_vain(self, family, spec):
        with pytest.raises(vlm_fix.VlmFixError):
            vlm_fix.wrap(self.models[family], spec)

    # ---- answers -----------------------------------------------------------------------------------------------------

    @rule(family=st.sampled_from(FAMILIES), name=st.sampled_from(list(PROMPTS)), mode=st.sampled_from(list(MODES)))
    @looked
    def generate(self, family, name, mode):
        self.check(family, answered, name, mode)

    @rule(family=st.sampled_from(FAMILIES), name=st.sampled_from(list(PROMPTS)))
    @looked
    def forward(self, family, name):
        self.check(family, forwarded, name)

    @rule(family=st.sampled_from(FAMILIES))
    @looked
    def keep_a_cache(self, family):
        made = outcome(lambda: conversed(self.models[family], family))
        self.kept[family] = None if isinstance(made, str) else (*made, self.wraps, self.specs[family])

    @precondition(lambda self: any(self.kept.values()))
    @rule(family=st.sampled_from(FAMILIES))
    @looked
    def go_on(self, family):
        if self.kept[family] is None:
            return
        cache, ids, wraps, spec = self.kept[family]
        found = outcome(lambda: went_on(self.models[family], cache, ids))
        if spec == self.specs[family] and (wraps == self.wraps or spec is None):
            assert same(found, reference(family, spec, two_turns))

    @rule(family=st.sampled_from(FAMILIES), names=st.tuples(*[st.sampled_from(list(PROMPTS))] * 2))
    @looked
    def in_threads(self, family, names):
        model, found = self.models[family], {}

        def run(i, name):  # silenced outside: the filters of warnings are the process's
            try:
                found[i] = answered(model, family, name, "greedy")
            except vlm_fix.VlmFixError as error:
                found[i] = str(error)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(names)]
        with silent():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for i, name in enumerate(names):
            assert same(found[i], reference(family, self.specs[family], answered, name, "greedy")), (name, found[i])

    # ---- failures ----------------------------------------------------------------------------------------------------

    @rule(
        family=st.sampled_from(FAMILIES),
        error=st.sampled_from([Interrupted("stop"), KeyboardInterrupt()]),
        place=st.integers(0, 200),
        n=st.integers(1, 4),
        bare=st.booleans(),
    )
    @looked
    def interrupt(self, family, error, place, n, bare):
        """Somewhere in the model."""
        model = self.models[family]
        parts = list(model.modules())
        hook = parts[place % len(parts)].register_forward_hook(Raise(error, n))
        try:
            with contextlib.suppress(type(error), vlm_fix.VlmFixError), silent():
                (forwarded if bare else answered)(model, family, *(["image"] if bare else ["image", "greedy"]))
        finally:
            hook.remove()

    @rule(
        family=st.sampled_from(FAMILIES),
        error=st.sampled_from([Interrupted("stop"), KeyboardInterrupt()]),
        n=st.integers(1, 3),
        what=st.sampled_from(["stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"]),
    )
    @looked
    def interrupt_from_outside(self, family, error, n, what):
        """In the caller's own code."""
        function = Raise(error, n)

        def processor(ids, scores):
            function(ids)
            return scores

        def allowed(row, ids):
            function(ids)
            return list(range(96))

        more = {
            "stopping_criteria": {"stopping_criteria": [function]},
            "logits_processor": {"logits_processor": [processor]},
            "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
        }[what]
        with contextlib.suppress(type(error), vlm_fix.VlmFixError), silent():
            answered(self.models[family], family, "image", "greedy", **more)

    # ---- copies ------------------------------------------------------------------------------------------------------

    def check_copy(self, family, made):
        assert (installed(made) is not None) == bool(self.specs[family])
        self.check(family, answered, "image", "greedy", model=made)
        self.look(vlm_fix.unwrap(made), family)

    @rule(family=st.sampled_from(FAMILIES))
    @looked
    def deepcopy(self, family):
        self.check_copy(family, copy.deepcopy(self.models[family]))

    @rule(family=st.sampled_from(FAMILIES), saved=st.sampled_from(["torch", "pickle"]))
    @looked
    def save_and_load(self, family, saved):
        if captured(self.models[family]):
            return  # no model of transformers can be pickled then
        if saved == "pickle":
            made = pickle.loads(pickle.dumps(self.models[family]))
        else:
            file = io.BytesIO()
            torch.save(self.models[family], file)
            file.seek(0)
            made = torch.load(file, weights_only=False)
        self.check_copy(family, made)

    @rule(family=st.sampled_from(FAMILIES))
    @looked
    def weights(self, family):
        model, given = self.models[family], pristine(family).state_dict()
        state = model.state_dict()
        assert list(state) == list(given) and all(torch.equal(state[k], given[k]) for k in given)
        model.load_state_dict(given)

    def teardown(self):
        for family, model in self.models.items():
            self.look(vlm_fix.unwrap(model), family)


@functools.cache
def live(family):
    """The model that all examples share: what one left on it the next would see."""
    return BUILD[family]()


@pytest.mark.parametrize("part", range(PARTS))
def test_any_sequence_of_steps(part):
    """The seeds part, part + PARTS, ... until this part's share is done: other steps in each part, the same in each run."""
    Models.steps, number = 0, part
    while Models.steps < STEPS / PARTS:
        run_state_machine_as_test(
            seed(number)(Models),
            settings=settings(
                max_examples=2,
                stateful_step_count=LENGTH,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        number += PARTS
        if STEPS > 2000 and number // PARTS % 10 == 0:
            print(f"part {part}: {Models.steps} steps", flush=True)
