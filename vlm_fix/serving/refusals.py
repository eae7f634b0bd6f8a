"""What cannot be served, with the reason. Checked before the server starts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_fix.attention.edits import AttentionEdit, ColumnMasker, QueryKeyReader
from vlm_fix.decoding.kinds import Contrast, LogitEdit, Procedure
from vlm_fix.errors import VlmFixError
from vlm_fix.hidden.edit import HiddenEdit
from vlm_fix.inputs import InputEdit
from vlm_fix.method import Method
from vlm_fix.pruning.kinds import CachePruner, ImageShrinker, LayerPruner, TokenPruner
from vlm_fix.scope import RowScope

from .engine import ServedEngine

KINDS: tuple[tuple[Any, str], ...] = (
    (Procedure, "it runs generate in a loop of its own, and vLLM's scheduler has no place for one"),
    (ColumnMasker, "it masks columns for rows of the prompt that vLLM's own kernels compute"),
    (
        QueryKeyReader,
        "it reads queries and keys of the whole prompt at once, which vLLM may compute in chunks or take from its cache",
    ),
    (LayerPruner, "it drops tokens inside the language model, and vLLM keeps one block table for all layers"),
    (CachePruner, "it drops keys layer by layer, and vLLM keeps one block table for all layers"),
    (ImageShrinker, "it gives the vision tower a smaller image, and vLLM's towers here take one size"),
)
TOWERS = ("llava", "qwen2_5_vl")  # families whose vision towers methods read, and whose placeholders are counted anew


def reason(method: Method, engine: ServedEngine) -> str | None:
    """Why `method` cannot be served; None if it can."""
    for kind, why in KINDS:
        if isinstance(method, kind):
            return why
    if method.name == "random_tokens" and engine.family.mrope:
        return f"its draws were seen to differ from those of generate in {engine.family.name}"
    read, tower = _tower_layers(method, engine), engine.arch.vision_last + 1
    if read and max(read) >= tower:
        return f"it reads layer {max(read) + 1} of the vision tower, of which vLLM has the first {tower}: choose an earlier one"
    if isinstance(method, InputEdit) and method.prepares and method.previews:
        return "these settings take one more pass over the prompt with its images before it is answered"
    if isinstance(method, Contrast) and isinstance(method, InputEdit):
        return "it sends other images through the vision tower, some of them backwards, and vLLM's tower runs once, forwards"
    if isinstance(method, Contrast) and method.contrasts and (method.fork is not None or not _plain_branch(method)):
        return (
            "a second branch of it has other image features, other layers or what the first branch saw; those beside the "
            "batch differ in their prompt, image or attention alone"
        )
    if isinstance(method, LogitEdit) and isinstance(method, AttentionEdit):
        return "it reads attention weights for its edit of the next token, and these are not kept in a batch"
    if isinstance(method, TokenPruner) and engine.family.name not in TOWERS:
        return (
            f"image tokens can be dropped before the language model in {', '.join(TOWERS)}, not in {engine.family.name}"
        )
    if isinstance(method, TokenPruner) and method.asks:
        return "it chooses image tokens by the question, and vLLM keeps an image's features for whatever is asked next"
    if isinstance(method, TokenPruner) and not method.exact:
        return "it keeps as many tokens as an image needs, and vLLM counts an image's tokens before it is seen"
    if not isinstance(method, AttentionEdit | HiddenEdit | Contrast | LogitEdit | TokenPruner):
        return "its kind is not known to the server"
    return None


def _tower_layers(method: Method, engine: ServedEngine) -> tuple[int, ...]:
    """The vision layers that it reads, of a kind that looks into the tower here."""
    return (method.encoder_layers(engine.arch) or ()) if isinstance(method, InputEdit | TokenPruner) else ()


def _plain_branch(method: Contrast) -> bool:
    """True if its one second branch is another prompt or image, or another attention."""
    return type(method).branches is Contrast.branches and type(method).stays is Contrast.stays


def _tokens_of_every_image(engine: ServedEngine) -> int | None:
    """How many tokens an image has; None where that depends on the image."""
    config = engine.model.config
    if engine.family.name != "llava":
        return None
    vision, whole = config.vision_config, config.vision_feature_select_strategy == "full"
    return (vision.image_size // vision.patch_size) ** 2 + whole


def check_engine(engine: ServedEngine) -> None:
    """Raise VlmFixError for a stack that cannot be served."""
    for method in engine.active:
        why = reason(method, engine)
        if why:
            raise VlmFixError(f"{method.name} cannot be served by vLLM: {why}. It runs with vlm_fix.wrap and generate.")
    encoder = [m.name for m in engine.active if _tower_layers(m, engine)]
    encoder += [m.name for m in engine.vision]
    if encoder and engine.family.name not in TOWERS:
        raise VlmFixError(
            f"{encoder[0]} cannot be served by vLLM in {engine.family.name}: it reads the vision towers of "
            f"{' and '.join(TOWERS)} alone there."
        )
    tokens = _tokens_of_every_image(engine)
    if engine.pruner is not None and tokens and engine.pruner.budget(tokens) >= tokens:
        raise VlmFixError(
            f"{engine.pruner.name} would change nothing: keep={engine.pruner.keep:g} covers every one of an image's "
            f"{tokens} tokens; lower it."
        )
    if engine.contrast is not None and engine.pruner is not None:
        raise VlmFixError(
            f"{engine.contrast.name} beside {engine.pruner.name} cannot be served by vLLM: the second branch has all image "
            "tokens. Serve one of them."
        )
    readers = [m.name for m in engine.active if isinstance(m, HiddenEdit) and m.reads_prompt]
    if engine.contrast is not None and readers:
        raise VlmFixError(
            f"{engine.contrast.name} beside {readers[0]} cannot be served by vLLM: {readers[0]} would read the second branch's "
            "prompt with its image, too. Serve one of them."
        )
    if engine.contrast is not None and engine.family.mrope:
        raise VlmFixError(
            f"{engine.contrast.name} cannot be served by vLLM in {engine.family.name}: its second branch has no M-RoPE positions."
        )


def check_options(words: Sequence[str], engine: ServedEngine) -> None:
    """As `check_config`, of options as they are typed, before vLLM is started; what they leave open it says later.

    words: options of `vllm serve`, such as ["--enable-lora", "--kv-cache-dtype=fp8"].
    """
    given: dict[str, str] = {}
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            given[name.replace("_", "-")] = value if equals else after

    def more_than_one(*names: str) -> bool:
        return any(given[name].isdigit() and int(given[name]) > 1 for name in names if name in given)

    _refuse(
        engine,
        {
            "speculative decoding": bool(given.keys() & {"--speculative-config", "-sc"}),
            "pipeline parallelism": more_than_one("--pipeline-parallel-size", "-pp"),
            "context parallelism": more_than_one(
                "--decode-context-parallel-size", "-dcp", "--prefill-context-parallel-size", "-pcp"
            ),
            "microbatches (--enable-dbo)": "--enable-dbo" in given,
            "a pooling runner": given.get("--runner") == "pooling",
            "prompts of embeddings (--enable-prompt-embeds)": "--enable-prompt-embeds" in given,
            "embeddings in place of images (--enable-mm-embeds)": "--enable-mm-embeds" in given,
            "a quantised KV cache": _quantised(given.get("--kv-cache-dtype")),
            "a KV connector": "--kv-transfer-config" in given,
            "LoRA": "--enable-lora" in given,
        },
        more_than_one("--tensor-parallel-size", "-tp"),
    )


def check_config(config: Any, engine: ServedEngine) -> None:
    """Raise VlmFixError for options of vLLM that do not go with the methods."""
    parallel, model = config.parallel_config, config.model_config
    _refuse(
        engine,
        {
            "speculative decoding": config.speculative_config is not None,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "microbatches (--enable-dbo)": bool(getattr(parallel, "enable_dbo", False)),
            "a pooling runner": getattr(model, "runner_type", "generate") != "generate",
            "prompts of embeddings (--enable-prompt-embeds)": bool(getattr(model, "enable_prompt_embeds", False)),
            "embeddings in place of images (--enable-mm-embeds)": bool(
                getattr(model.multimodal_config, "enable_mm_embeds", False)
            ),
            "a quantised KV cache": _quantised(config.cache_config.cache_dtype),
            "a KV connector": config.kv_transfer_config is not None,
            "LoRA": config.lora_config is not None,
        },
        parallel.tensor_parallel_size > 1,
    )


def _refuse(engine: ServedEngine, used: Mapping[str, bool], divided: bool) -> None:
    """used: by name, what vLLM was asked for; divided: each device has a part of the heads."""
    for what in (name for name, asked in used.items() if asked and engine.active):
        names = ", ".join(m.name for m in engine.active)
        raise VlmFixError(f"{names} cannot be served with {what}; leave it out.")
    shared = [m.name for m in engine.active if not _apart(m)]
    if divided and shared:
        raise VlmFixError(
            f"{shared[0]} compares heads with each other or names them, and tensor parallelism gives each device a part of "
            "them: serve it on one device, or with data parallelism."
        )


def _quantised(dtype: Any) -> bool:
    return "fp8" in str(dtype) or "int" in str(dtype)


def _apart(method: Method) -> bool:
    """True if the method may run where each device has a part of the heads."""
    if isinstance(method, AttentionEdit):
        return method.heads_apart
    return isinstance(method, LogitEdit) and not method.exits


def check_worker(runner: Any, engine: ServedEngine) -> None:
    """Raise VlmFixError for a loaded model in which the methods could not act."""
    from .backend import MADE, EditingImpl
    from .layers import attention_layers, decoder_layers

    if not hasattr(runner, "input_batch"):
        raise VlmFixError("vLLM's second model runner is not served: set VLLM_USE_V2_MODEL_RUNNER=0.")
    found = attention_layers(runner)
    if len(found) != len(engine.arch.attention) or len(decoder_layers(runner)) != engine.arch.depth:
        raise VlmFixError(
            f"{type(runner.model).__name__} of vLLM has {len(found)} attention layers, and the methods expect "
            f"{len(engine.arch.attention)}: this architecture is not served."
        )
    for name, layer in found.items():
        impl: Any = layer.impl
        if not issubclass(type(impl), EditingImpl):
            backend = layer.attn_backend.get_name()
            raise VlmFixError(
                f"the attention backend {backend} is not served: give --attention-backend {' or '.join(MADE)}."
            )
        for what, used in {
            "chunks that rows do not look out of": getattr(layer, "attention_chunk_size", None) is not None,
            "attention sinks": getattr(impl, "sinks", None) is not None,
            "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
            "a quantised KV cache": _quantised(impl.kv_cache_dtype),
            "a shared KV cache": getattr(impl, "kv_sharing_target_layer_name", None) is not None,
        }.items():
            if used:
                raise VlmFixError(f"{name} has {what}, in which methods are not served.")
    check_rows(runner, engine)


def check_rows(runner: Any, engine: ServedEngine) -> None:
    """Raise VlmFixError for methods that need the attention of image rows where these look both ways."""
    if not getattr(runner.model_config, "is_mm_prefix_lm", False):
        return
    for method in engine.active:
        what = (
            "edits the attention of these rows"
            if isinstance(method, AttentionEdit)
            and method in engine.attention.edits
            and method.row_scope is RowScope.ALL
            else "has a second branch, which may have an image"
            if method is engine.contrast
            else "reads the prompt with its image beforehand"
            if isinstance(method, HiddenEdit) and method.reads_prompt
            else None
        )
        if what:
            raise VlmFixError(
                f"{method.name} cannot be served in {type(runner.model).__name__}, where rows of an image look both ways: "
                f"it {what}. It runs with vlm_fix.wrap and generate."
            )
