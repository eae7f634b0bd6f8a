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
from vlm_fix.effects import Effects
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of, final_norm, get_part, image_token_ids, language_head
from vlm_fix.generating import MISSING, Generating, generate, logits_processors
from vlm_fix.method import Method
from vlm_fix.wing import ATTRIBUTE, Running, Wing


class Engine(Generating):
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
        self.sessions, self.effects = Sessions(), Effects()
        self.lock, self.installed = threading.RLock(), False
        self.key = compiled.number(self)
        self.wings = [wing for kind in Wing.kinds if (wing := kind.claim(self)) is not None]
        self._check_kinds()
        for wing in self.wings:
            wing.check()
        names = [m.name for m in self.active]
        if twice := [name for name in names if names.count(name) > 1]:
            raise VlmFixError(f"{twice[0]} is listed twice; give it once, with the parameters you want.")
        self._undo = contextlib.ExitStack()
        self._ours: dict[str, Any] = {}  # what `_put` has put on the model

    def _check_kinds(self) -> None:
        """VlmFixError for a method that no kind of wing looks for: it would change nothing, and nobody would say so."""
        kinds = [kind for kind in Wing.kinds if Method not in kind.runs] + [type(wing) for wing in self.wings]
        for method in self.active:
            if not any(isinstance(method, kind.runs) for kind in kinds):
                names = ", ".join(dict.fromkeys(base.__name__ for kind in kinds for base in kind.runs))
                raise VlmFixError(f"{method.name} is of no kind that acts: derive it from one of {names}.")

    def early_exit(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] states after any layer -> logits [..., V] float32, through the final norm and the language head."""
        head = language_head(self.model, self.family)
        return head(final_norm(self.language)(x.to(head.weight.dtype))).float()

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
        base = "eager" if capped else "sdpa"
        if before == attention.NAME:  # its config is from a model that was wrapped when it was made
            self.attention_before = before = base
        if before != base:
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
            config._attn_implementation_internal = copies.Lent(attention.NAME, base)
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
        with self.lock, copies.removed(self):
            mine = vars(self.model)
            own = mine.pop(ATTRIBUTE)
            later = {name: mine[name] for name, ours in self._ours.items() if mine.get(name, ours) is not ours}
            mine.update(self._ours)
            self.remove()
            try:
                yield
            finally:
                self.install()
                mine.update(later, **{ATTRIBUTE: own})

    def _others_on(self, config: Any) -> list[Engine]:
        """The engines on other models that share this model's config."""
        engines = [e for e in compiled.ENGINES.values() if e is not self and e.installed]
        return [e for e in engines if e.model.config.get_text_config() is config]

    def _put_back_attention(self, config: Any) -> None:
        if not self._others_on(config):
            self.model.set_attn_implementation({"text_config": self.attention_before})

    def _put(self, name: str, function: Callable[..., Any]) -> Any:
        """Put a method on the model; `remove` gives it back the caller's own of that name, which is returned, or its class's.

        What the caller has put in its place since then stays.
        """
        own = vars(self.model).get(name, MISSING)
        ours = self._ours[name] = types.MethodType(functools.partial(function, self), self.model)

        def put_back() -> None:
            if vars(self.model).get(name, ours) is not ours:
                return
            vars(self.model).pop(name, None)
            if own is not MISSING:
                setattr(self.model, name, own)

        self._undo.callback(put_back)
        setattr(self.model, name, ours)
        return own
