"""wrap, unwrap, wrapped: put methods on a model and take them off again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from vlm_fix import calibrated, copies, presets
from vlm_fix.decoding import ContrastWing, DraftWing
from vlm_fix.decoding.drafting import Drafted
from vlm_fix.decoding.term import Term
from vlm_fix.engine import Engine
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of
from vlm_fix.families.compat import warn_if_untested
from vlm_fix.method import Baseline, Method
from vlm_fix.registry import Spec, parse
from vlm_fix.wing import ATTRIBUTE, bare, installed

Model = TypeVar("Model")
NEUTRAL = "leaves the model as it is: these settings are neutral."


def wrap(
    model: Model, spec: Spec, calibration: calibrated.Files = None, *, replace: bool = False, **settings: Any
) -> Model:
    """Install one method or a stack of methods on a Hugging Face vision-language model, in place.

    model: also a PEFT model, one from `torch.compile`, or a pipeline: the model inside is wrapped.
    spec: a name ("var"), a spec string ("pai:alpha=0.2,layers=2-31"), a stack of them ("pai+vcd"), a Method or its class,
    a file that `vlm-fix recommend` wrote ("vlm-fix.yaml"), or a list of these. Returns the model.
    calibration: a file of `vlm-fix calibrate`, or several; it fills the parameters that spec does not give. A
    method without one takes calibration/METHOD.json of the checkpoint's folder, if that is there.
    replace: take off what is on the model first; if the new methods cannot be installed, the old ones stay.
    settings: parameters of a single method by name, as in `wrap(model, "pai", alpha=0.3)`.
    Warns of methods whose settings change nothing.
    Raises VlmFixError for an unknown method or value, an unsupported or already wrapped model, a senseless stack, a
    calibration or a file of another method or model.
    """
    inside = bare(model)
    if not isinstance(inside, torch.nn.Module) and not hasattr(inside, "config"):
        raise VlmFixError(f"wrap takes a loaded model, not {model!r}: load it with AutoModelForImageTextToText.")
    before = active(model)
    if before and not replace:
        names = "+".join(m.name for m in before)
        raise VlmFixError(
            f"the model is already wrapped with {names}; pass replace=True, call vlm_fix.unwrap(model) first, or pass a "
            "list of methods."
        )
    warn_if_untested()
    methods = parse(spec, settings)
    presets.check(spec, inside)
    unwrap(model)
    try:
        engine = _install(model, methods, calibration)
    except BaseException:
        if before:
            _install(model, before)
        raise
    if idle := [m.spec() for m in engine.methods if not isinstance(m, Baseline) and m.resolve(engine.arch).neutral]:
        warnings.warn(f"{'+'.join(idle)} {NEUTRAL}", stacklevel=2)
    return model


def _install(model: Any, methods: list[Method], calibration: calibrated.Files = None) -> Engine:
    engine = _plan(model, methods, calibration)
    engine.install()
    vars(engine.model)[ATTRIBUTE] = engine
    copies.install(engine, wrap)
    return engine


def plan(model: Model, spec: Spec, calibration: calibrated.Files = None) -> Engine:
    """The engine that `wrap` would install; raises what it would say of the methods, and touches nothing."""
    presets.check(spec, bare(model))
    return _plan(model, parse(spec), calibration)


def _plan(model: Any, methods: list[Method], calibration: calibrated.Files) -> Engine:
    inside = bare(model)
    found = calibrated.choose(calibration, inside, methods)
    if found:
        methods = calibrated.apply(found, methods, arch_of(inside))
    return Engine(inside, methods)


def active(model: Any) -> list[Method]:
    """The methods on a model, with their settings, in the order in which they were given; [] on one that is not wrapped."""
    engine = installed(model)
    return list(engine.methods) if engine else []


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


def drafted(model: Any) -> Drafted | None:
    """What `draft` did in the last `generate` call of a wrapped model: its rounds, its candidates, how many were accepted.

    `.tokens_per_round` is what one verification gave. None without it, and before the first call.
    """
    engine: Engine | None = installed(model)
    wing = engine.wing(DraftWing) if engine else None
    return wing.report if wing else None


@contextlib.contextmanager
def wrapped(
    model: Model, spec: Spec, calibration: calibrated.Files = None, *, replace: bool = False, **settings: Any
) -> Iterator[Model]:
    """`with vlm_fix.wrapped(model, "vhr"): model.generate(...)`, with the arguments of `wrap`.

    With replace=True, what was on the model before is put back on it afterwards.
    """
    before = active(model)
    wrap(model, spec, calibration, replace=replace, **settings)
    try:
        yield model
    finally:
        unwrap(model)
        if before:
            _install(model, before)
