"""wrap, unwrap, wrapped: put methods on a model and take them off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from vlm_fix import calibrated, copies
from vlm_fix.decoding import ContrastWing
from vlm_fix.decoding.term import Term
from vlm_fix.engine import Engine
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of
from vlm_fix.families.compat import warn_if_untested
from vlm_fix.registry import Spec, parse
from vlm_fix.wing import ATTRIBUTE, bare, installed

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, spec: Spec, calibration: calibrated.Files = None) -> Model:
    """Install one method or a stack of methods on a Hugging Face vision-language model, in place.

    model: also a PEFT model, or one from `torch.compile`: the model inside is wrapped.
    spec: a name ("var"), a spec string ("pai:alpha=0.2,layers=2-31"), a Method, or a list of these. Returns the model.
    calibration: a file of `vlm-fix calibrate`, or several; it fills the parameters that spec does not give. A
    method without one takes calibration/METHOD.json of the checkpoint's folder, if that is there.
    Raises VlmFixError for an unknown method or value, an unsupported or already wrapped model, a senseless stack, a
    calibration of another method or model.
    """
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        raise VlmFixError(f"wrap takes a model; this {type(model).__name__} holds one: wrap its `.model`, in place.")
    if not isinstance(model, nn.Module) and not hasattr(model, "config"):
        raise VlmFixError(f"wrap takes a loaded model, not {model!r}: load it with AutoModelForImageTextToText.")
    current = installed(model)
    if current:
        names = "+".join(m.name for m in current.methods)
        raise VlmFixError(
            f"the model is already wrapped with {names}; call vlm_fix.unwrap(model) first, or pass a list of methods."
        )
    warn_if_untested()
    engine = plan(model, spec, calibration)
    engine.install()
    vars(engine.model)[ATTRIBUTE] = engine
    copies.install(engine, wrap)
    return model


def plan(model: Model, spec: Spec, calibration: calibrated.Files = None) -> Engine:
    """The engine that `wrap` would install; raises what it would say of the methods, and touches nothing."""
    methods, inside = parse(spec), bare(model)
    found = calibrated.choose(calibration, inside, methods)
    if found:
        methods = calibrated.apply(found, methods, arch_of(inside))
    return Engine(inside, methods)


def unwrap(model: Model) -> Model:
    """Take everything off again; the model is bit for bit what it was. Unwrapping an unwrapped model does nothing.

    It waits for a `generate` that runs in another thread; inside one, as from a stopping criterion, it raises VlmFixError.
    """
    engine = installed(model)
    if engine:
        if engine.running.generating:
            raise VlmFixError("generate is running on this model: unwrap it when generate has returned.")
        engine.remove()
        vars(engine.model).pop(ATTRIBUTE, None)
    return model


def contrast_term(model: Any) -> Term | None:
    """How large the term was that the contrast of a wrapped model added in its last `generate` call.

    `.sd` is its standard deviation in nats over the tokens left uncut, None where no step left two; `.squares` and `.dof`
    add up over calls. None without a contrast, before the first call, and after assisted decoding.
    """
    engine: Engine | None = installed(model)
    wing = engine.wing(ContrastWing) if engine else None
    return wing.term if wing else None


@contextlib.contextmanager
def wrapped(model: Model, spec: Spec, calibration: calibrated.Files = None) -> Iterator[Model]:
    """`with vlm_fix.wrapped(model, "vhr"): model.generate(...)`."""
    wrap(model, spec, calibration)
    try:
        yield model
    finally:
        unwrap(model)
