"""The engine on one model: a host that finds the session of each forward and calls its wings in one order.

It knows no kind of method. What a kind needs on a model is its wing's business (`wing.py`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlm_fix import attention, checkpointing, compiled, copies, decoding, hidden, inputs, pruning  # noqa: F401 (built-in wings register themselves)
from vlm_fix.caches import Sessions
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of, get_part, image_token_ids
from vlm_fix.families.compat import cache_of, generate_of
from vlm_fix.forwards import Forwards
from vlm_fix.method import Method
from vlm_fix.options import GenerateOptions, named
from vlm_fix.processors import ordered
from vlm_fix.wing import ATTRIBUTE, NO_IMAGE, Running, Wing

MISSING: Any = object()


class Engine(Forwards):
    """Everything installed on one model."""

    def __init__(self, model: Any, methods: list[Method]):
        self.model, self.methods = model, methods
        self.arch = arch_of(model)
        self.family = self.arch.family
        self.base = get_part(model, self.family.base)
        self.language = get_part(model, self.family.language)
        self.tokens = torch.tensor(image_token_ids(model, self.family))
        self.active = [m for m in (m.resolve(self.arch) for m in methods) if not m.neutral]
        self.callbacks, self.attention_functions = {}, {}
        self.running, self.warned = Running(), set()
        self.sessions = Sessions()
        self.lock, self.installed = threading.RLock(), False
        self.key = compiled.number(self)
        self.wings = [wing for kind in Wing.kinds if (wing := kind.claim(self)) is not None]
        self._check_kinds()
        for wing in self.wings:
            wing.check()
        names = [m.name for m in self.active]
        if twice := [name for name in names if names.count(name) > 1]:
            raise VlmFixError(f"{twice[0]} is listed twice; give it once, with the parameters you want.")
        self.own_generate = self.own_processors = MISSING
        self._undo = contextlib.ExitStack()

    def _check_kinds(self) -> None:
        """VlmFixError for a method that no kind of wing looks for: it would change nothing, and nobody would say so."""
        kinds = [kind for kind in Wing.kinds if Method not in kind.runs] + [type(wing) for wing in self.wings]
        for method in self.active:
            if not any(isinstance(method, kind.runs) for kind in kinds):
                names = ", ".join(dict.fromkeys(base.__name__ for kind in kinds for base in kind.runs))
                raise VlmFixError(f"{method.name} is of no kind that acts: derive it from one of {names}.")

    # ---- on the model and off again ----------------------------------------------------------------------------------

    def install(self, idle: bool = False) -> None:
        """Put attention function, hooks and generate on the model; undone by `remove` if anything goes wrong.

        Without an active method nothing is installed, unless `idle` asks for it.
        """
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        if others := self._others_on(config):
            before = others[0].attention_before
        self.attention_before: str | None = before
        capped = getattr(config, "attn_logit_softcapping", None)  # no kernel of SDPA does that: such models run eager
        if before != (base := "eager" if capped else "sdpa"):
            why = (
                "builds on its eager attention" if capped else "builds on SDPA (which uses flash kernels where it can)"
            )
            raise VlmFixError(
                f"the language model runs {before!r} attention; vlm-fix {why}: call "
                f'model.set_attn_implementation("{base}") first.'
            )
        if not self.active and not idle:
            return
        try:
            attention.register()
            self._undo.callback(self._put_back_attention, config)
            self.model.set_attn_implementation({"text_config": attention.NAME})
            self._undo.callback(self.base.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self._undo.callback(self.base.register_forward_hook(self._leave, with_kwargs=True).remove)
            for wing in self.wings:
                for handle in wing.install():
                    self._undo.callback(handle.remove)
            self.own_generate = self._put("generate", generate)
            self.own_processors = self._put("_get_logits_processor", logits_processors)
            self.installed = True
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the model exactly, once no other thread's `generate` runs on it."""
        with self.lock:
            self.installed = False
            copies.remove(self)
            checkpointing.remove(self)
            self._undo.close()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The model as it was before `wrap`, for as long as this lasts."""
        with self.lock:
            own = {name: vars(self.model).pop(name) for name in (ATTRIBUTE, *copies.PROTOCOL)}
            self.remove()
            try:
                yield
            finally:
                self.install()
                vars(self.model).update(own)

    def _others_on(self, config: Any) -> list[Engine]:
        """The engines on other models that share this model's config."""
        engines = [e for e in compiled.ENGINES.values() if e is not self and e.installed]
        return [e for e in engines if e.model.config.get_text_config() is config]

    def _put_back_attention(self, config: Any) -> None:
        if not self._others_on(config):
            self.model.set_attn_implementation({"text_config": self.attention_before})

    def _put(self, name: str, function: Callable[..., Any]) -> Any:
        """Put a method on the model; `remove` gives it back the caller's own of that name, which is returned, or its class's."""
        own = vars(self.model).get(name, MISSING)

        def put_back() -> None:
            vars(self.model).pop(name, None)
            if own is not MISSING:
                setattr(self.model, name, own)

        self._undo.callback(put_back)
        setattr(self.model, name, types.MethodType(functools.partial(function, self), self.model))
        return own

    def plain_generate(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        """The model's `generate` as it was before `wrap`."""
        if self.own_generate is not MISSING:
            return self.own_generate(ids, **kwargs)
        return generate_of(self.model)(self.model, ids, **kwargs)

    # ---- generate ----------------------------------------------------------------------------------------------------

    def rests(self, options: GenerateOptions) -> bool:
        """True, with one warning, for prompts without an image under methods that all need one: the model answers alone.

        Raises VlmFixError where only a part of a stack could act.
        """
        needy = [m.name for m in self.active if m.needs_image]
        if not needy or self.has_image(options.ids):
            return False
        others = [m.name for m in self.active if not m.needs_image]
        if others:
            raise VlmFixError(
                f"{', '.join(needy)} needs an image, but no prompt contains an image token, and {', '.join(others)} beside "
                "it would act alone: pass images to the processor, or unwrap the model for text-only prompts."
            )
        self.warn_once(self.active, NO_IMAGE)
        return True

    def refuse(self, options: GenerateOptions) -> None:
        """Raise VlmFixError for options of `generate` that do not go with the methods, before the first token."""
        if options.setting("output_attentions"):
            raise VlmFixError(
                "attention weights are never formed here: drop output_attentions=True, or unwrap the model first."
            )
        if options.setting("cache_implementation") == "paged":
            raise VlmFixError(
                "continuous batching (cache_implementation='paged') is not supported; call generate with a padded batch."
            )
        for wing in self.wings:
            wing.refuse(options)

    def answer_alone(self, options: GenerateOptions) -> Any:
        """What the model answers without any wing."""
        return self.plain_generate(options.ids, **options.final_kwargs())

    @contextlib.contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """`call` is the one that this thread's forwards belong to, until this ends; drafting may begin one inside another."""
        with self.outside():
            self.call, self.touched, self.running.generating = call, set(), True
            yield

    @contextlib.contextmanager
    def outside(self, quiet: bool = False) -> Iterator[None]:
        """While `generate` runs the caller's own code: forwards in it are not the call's."""
        mine = vars(self.running).copy()
        self.session = self.call = self.main = self.joint = None
        self.quiet = quiet
        try:
            yield
        finally:
            vars(self.running).update(mine)

    def keep(self, output: Any) -> None:
        """Remember the session of the cache in `generate`'s output, for the next turn; a compiled prefill shows no cache."""
        cache = cache_of(output)
        if cache is not None and self.main and cache not in self.sessions:
            self.sessions[cache] = self.main

    def refuse_broken(self, call: Call) -> None:
        """VlmFixError if the scores of a token were no numbers; a plain model picks some token then and says nothing."""
        if bool(call.broken):
            raise VlmFixError(
                f"with {'+'.join(m.name for m in self.active)} the scores of a token were NaN, or none of them was finite: "
                "edits must leave numbers, and at least one token; if they do, load the model in bfloat16 or float32."
            )

    def report_unused(self) -> None:
        """After a call: warn, once per method, if it changed nothing in it."""
        unused = [u for wing in self.wings for u in wing.unused(self.main)] if self.main else []
        for method, reason in unused:
            self.warn_once([method], reason)


def generate(engine: Engine, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a wrapped model; arguments and output are the model's own."""
    own = engine.own_generate
    function = functools.partial(generate_of(model), model) if own is MISSING else own
    options = GenerateOptions.read(model, named(function, args, kwargs))
    options.keep_apart(engine.outside)
    if engine.rests(options):
        return engine.answer_alone(options)
    engine.refuse(options)
    with engine.lock, contextlib.ExitStack() as stack:
        if not engine.installed:  # unwrapped while this call waited for another thread's
            return engine.answer_alone(options)
        call = Call(model, engine.family, options.tensors(), cache=cache_of(options.kwargs))
        stack.enter_context(engine.during(call))
        for wing in engine.wings:
            stack.enter_context(wing.around_generate(call, options))
        output = engine.plain_generate(call.inputs["input_ids"], **options.final_kwargs())
        engine.refuse_broken(call)
        if call.processors and not call.scored:
            raise VlmFixError(
                f"{', '.join(m.name for m in engine.active)} could not act: this generate (or custom_generate) does not ask "
                "the model for its logits processors."
            )
        engine.report_unused()
        engine.keep(output)
        for finish in options.finish:
            output = finish(output)
        return output


def logits_processors(engine: Engine, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`_get_logits_processor` of a wrapped model."""
    own = engine.own_processors
    own = functools.partial(type(model)._get_logits_processor, model) if own is MISSING else own
    prepared, call = own(*args, **kwargs), engine.call
    if call is None:
        return prepared
    call.scored = True

    def check(scores: torch.Tensor) -> None:
        call.check_scores(scores)
        if call.broken is True:  # else it is asked for at the end, which costs no step the wait for its device
            engine.refuse_broken(call)

    return ordered(call.processors, prepared, functools.partial(engine.outside, quiet=True), check)
