"""What vLLM loads by the entry point `vllm.general_plugins`, in each of its processes, before there is a configuration."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable
from typing import Any

from vlm_fix.errors import VlmFixError

from . import options, refusals
from .beside import GROWTH
from .engine import ServedEngine
from .settings import KEY, Settings, skeleton

log = logging.getLogger("vllm.vlm_fix")
ATTRIBUTE = "_vlm_fix_settings"  # on vLLM's ModelConfig, with which it reaches every process
WRAPPED = "_vlm_fix_wrapped"
TOWER = re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)")


def register() -> None:
    """Override the attention backends and wrap what reads a configuration, loads a model and takes requests. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs.create_engine_config, WRAPPED, False):
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.model_executor.models.utils import AutoWeightsLoader
    from vllm.multimodal.registry import MultiModalRegistry, _ProcessorFactories
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_worker import Worker

    for name in ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"):
        register_backend(AttentionBackendEnum[name], f"vlm_fix.serving.backend.{name}")
    _wrap(EngineArgs, "create_engine_config", _configure)
    _wrap(AutoWeightsLoader, "load_weights", _name)
    _wrap(Worker, "load_model", _load)
    _wrap(Worker, "initialize_from_config", _check_caches)
    _wrap(Executor, "determine_available_memory", _leave_room)
    _wrap(Scheduler, "__init__", _schedule)
    _wrap(_ProcessorFactories, "build_processor", _count_in_processor)
    _wrap(MultiModalRegistry, "_create_processing_info", _count)
    _wrap(InputProcessor, "_validate_params", _validate)
    _wrap(OpenAIServingModels, "show_available_models", _list)
    for request in (ChatCompletionRequest, CompletionRequest):
        _wrap(request, "to_sampling_params", _take_extra)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Let owner.name be wrapper(old, self, ...), where old(...) is what it was."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def after(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(before, self), self, *args, **kwargs)

    setattr(after, WRAPPED, True)
    setattr(owner, name, after)


@functools.lru_cache(maxsize=4)
def planned(settings: Settings, path: str, revision: str | None, trust: bool) -> ServedEngine:
    """The engine of a server's settings, to check requests by."""
    engine = ServedEngine.plan(skeleton(path, revision, trust), settings)
    refusals.check_engine(engine)
    return engine


def _configure(create: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Any:
    """EngineArgs.create_engine_config: refuse what cannot be served, and set what the methods need."""
    settings = Settings.read(args.additional_config)
    if settings is None:
        return create(*more, **kwargs)
    engine = planned(settings, args.model, args.revision, bool(args.trust_remote_code))
    if not engine.active:
        log.warning("%s: these settings change nothing, so answers are those of the model.", "+".join(settings.methods))
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    for name, wrong, needed, why in (
        (
            "enable_prefix_caching",
            True,
            "prompts without a prefix cache",
            "change or read rows of the prompt before its last",
        ),
        ("enable_chunked_prefill", True, "prompts in one piece", "need the whole prompt in one step"),
        ("enforce_eager", None, "hooks on layers", "look into the layers"),
        ("enforce_eager", None, "a pass beside the batch", "run a second pass"),
        ("async_scheduling", True, "the tokens of a step before the next begins", "need the tokens chosen so far"),
    ):
        if not engine.needs[needed]:
            continue
        value = name == "enforce_eager"
        if wrong is not None and getattr(args, name) is wrong:
            raise VlmFixError(
                f"{'+'.join(settings.methods)} cannot be served with {name}={wrong}: methods {why}. Leave it out."
            )
        if getattr(args, name) is not value:
            log.info("%s: %s is set to %s, since methods %s.", "+".join(settings.methods), name, value, why)
            setattr(args, name, value)
    if engine.needs["the vision tower"] and engine.family.mrope:  # methods there take images alone
        args.limit_mm_per_prompt = {**(args.limit_mm_per_prompt or {}), "video": 0}
    config = create(*more, **kwargs)
    refusals.check_config(config, engine)
    object.__setattr__(config.model_config, ATTRIBUTE, settings)
    return config


def _load(load: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Worker.load_model: methods act from here on."""
    made, model_config = load(*args, **kwargs), worker.vllm_config.model_config
    settings = Settings.read(worker.vllm_config.additional_config)
    if settings is not None:
        from . import worker as workers

        model = skeleton(model_config.model, model_config.revision, bool(model_config.trust_remote_code))
        workers.start(worker.model_runner, settings, model)
    return made


def _name(load: Callable[..., Any], loader: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
    """AutoWeightsLoader.load_weights: transformers 5 leaves `vision_model` out of the names of a LLaVA's tower, vLLM wants it."""
    if hasattr(getattr(loader.module, "vision_tower", None), "vision_model"):
        weights = ((TOWER.sub(r"\1vision_tower.vision_model.", name), weight) for name, weight in weights)
    return load(weights, *args, **kwargs)


def _check_caches(initialize: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Worker.initialize_from_config: the caches are there."""
    from . import worker as workers

    made, served = initialize(*args, **kwargs), workers.of(worker.vllm_config)
    if served is not None:
        served.check_caches()
    return made


def _leave_room(determine: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Executor.determine_available_memory: second branches get their part of what the cache would have."""
    found, engine = determine(*args, **kwargs), _engine_of(executor.vllm_config.model_config)
    if engine is None or engine.contrast is None:
        return found
    share = 1 / (1 + GROWTH * (engine.contrast.passes - 1))
    log.info(
        "%s: vLLM's cache gets %.0f %% of its memory, second branches the rest.", engine.contrast.name, 100 * share
    )
    return [int(each * share) for each in found]


def _schedule(init: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Scheduler.__init__: blocks with the prompt's last row or generated tokens are never given to another request.

    Methods edit these rows, so that their keys are not what the same tokens have as part of a longer prompt. And pixels
    go to the worker also where the prefix cache covers an image, if a method may need them there.
    """
    init(*args, **kwargs)
    engine = _engine_of(scheduler.vllm_config.model_config)
    if engine is None:
        return
    if engine.reads_pixels:
        scheduler.schedule = functools.partial(_keep_pixels, scheduler.schedule, scheduler)
    coordinator = scheduler.kv_cache_manager.coordinator
    before = coordinator.cache_blocks

    def cache_blocks(request: Any, num_computed_tokens: int, *more: Any, **others: Any) -> Any:
        return before(request, min(num_computed_tokens, request.num_prompt_tokens - 1), *more, **others)

    coordinator.cache_blocks = cache_blocks


def _keep_pixels(schedule: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Scheduler.schedule: new requests with the images that vLLM leaves out where no encoder has to run."""
    made = schedule(*args, **kwargs)
    for new in made.scheduled_new_reqs:
        new.mm_features = scheduler.requests[new.req_id].mm_features
    return made


def _engine_of(config: Any) -> ServedEngine | None:
    """The engine planned for a ModelConfig of vLLM; None without one."""
    settings = getattr(config, ATTRIBUTE, None)
    return settings and planned(settings, config.model, config.revision, bool(config.trust_remote_code))


def _count_in_processor(build: Callable[..., Any], factories: Any, ctx: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's processor, which asks its `info` how many placeholders an image has; Qwen-VL's counts from the grid."""
    made = build(ctx, *args, **kwargs)
    _counted(made.info, ctx.model_config)
    engine = _engine_of(ctx.model_config)
    if engine is not None and engine.pruner is not None and engine.family.mrope:
        budget, updates = engine.pruner.budget, made._get_prompt_updates

        def fewer(*given: Any, **named: Any) -> Any:
            return [
                dataclasses.replace(u, replacement=functools.partial(_cut, u.replacement, budget))
                if u.modality == "image"
                else u
                for u in updates(*given, **named)
            ]

        made._get_prompt_updates = fewer
    return made


def _cut(replacement: Callable[[int], list[int]], budget: Callable[[int], int], item: int) -> list[int]:
    tokens = replacement(item)
    return tokens[: budget(len(tokens))]


def _count(create: Callable[..., Any], registry: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """The same where vLLM asks `info` itself."""
    return _counted(create(config, *args, **kwargs), config)


def _counted(info: Any, config: Any) -> Any:
    """`info`, counting the image tokens that a pruner leaves."""
    engine = _engine_of(config)
    pruner = engine.pruner if engine is not None else None
    if pruner is not None:
        count = info.get_num_image_tokens
        info.get_num_image_tokens = lambda **size: pruner.budget(count(**size))
    return info


def _validate(validate: Callable[..., Any], processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """InputProcessor._validate_params: a 400 for what a request cannot have."""
    made = validate(params, *args, **kwargs)
    asked = (getattr(params, "extra_args", None) or {}).get(KEY)
    if asked is None:
        return made
    from vllm.exceptions import VLLMValidationError

    config = processor.model_config
    try:
        options.check(asked, _engine_of(config))
    except VlmFixError as error:
        raise VLLMValidationError(str(error), parameter=KEY) from error
    return made


def _take_extra(make: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """to_sampling_params of a request over HTTP: "vlm_fix" may stand beside the fields that OpenAI's API knows."""
    params = make(*args, **kwargs)
    asked = (request.model_extra or {}).get(KEY)
    if asked is not None:
        params.extra_args = {**(params.extra_args or {}), KEY: asked}
    return params


async def _list(show: Callable[..., Any], models: Any, *args: Any, **kwargs: Any) -> Any:
    """OpenAIServingModels.show_available_models: each card says what the server runs, for clients that measure it."""
    made, engine = await show(*args, **kwargs), _engine_of(models.model_config)
    for card in made.data:
        card.vlm_fix = options.described(engine.methods, engine.arch) if engine is not None else []
    return made
