"""`generate` of a wrapped model: what the engine does before, around and after the model's own."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of, generate_of
from vlm_fix.forwards import Forwards
from vlm_fix.options import GenerateOptions, named
from vlm_fix.processors import ordered
from vlm_fix.wing import NO_IMAGE, NOT_NUMBERS, UNMOVED

MISSING: Any = object()


class Generating(Forwards):
    """The engine's part that knows the steps of one `generate`."""

    lock: threading.RLock
    installed: bool
    own_generate: Any = MISSING  # the caller's own on the model, from before `wrap`
    own_processors: Any = MISSING

    def plain_generate(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        """The model's `generate` as it was before `wrap`."""
        if self.own_generate is not MISSING:
            return self.own_generate(ids, **kwargs)
        return generate_of(self.model)(self.model, ids, **kwargs)

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
        if call.is_broken:
            raise VlmFixError(f"with {'+'.join(m.name for m in self.active)} {NOT_NUMBERS}")

    def report_unused(self) -> None:
        """After a call: warn, once per method, if it changed nothing in it."""
        unused = [u for wing in self.wings for u in wing.unused(self.main)] if self.main else []
        for method, reason in unused:
            self.warn_once([method], reason)
        told = {method for method, _ in unused}
        for method in self.effects.idle():
            if method not in told:
                self.warn_once([method], UNMOVED)


def generate(engine: Generating, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a wrapped model; arguments and output are the model's own."""
    own = engine.own_generate
    function = functools.partial(generate_of(model), model) if own is MISSING else own
    if not engine.installed:  # the caller's own generate, put on the wrapped model, has kept this one
        return function(*args, **kwargs)
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
        output = engine.plain_generate(call.inputs["input_ids"], **options.final_kwargs(engine.one_graph(1)))
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


def logits_processors(engine: Generating, model: Any, *args: Any, **kwargs: Any) -> Any:
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
