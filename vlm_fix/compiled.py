"""What torch.compile sees of a wrapped model inside `generate`: three opaque operators, so that one graph holds a forward.

The state of a call stays in Python, where an operator finds it when it runs; a graph knows the engine's number alone and
is not made again for the next token or the next call.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from vlm_fix.families.compat import cache_of


def uncompiled(function: Any) -> Any:
    """Under torch.compile, graphs end here: a session is Python state, which a graph would freeze."""
    return torch.compiler.disable(
        function,
        reason="vlm-fix runs as one graph where attention and hidden edits decode inside generate; elsewhere graphs end "
        "at its own code: compile without fullgraph=True.",
    )


ENGINES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
TAGS = (torch.Tag.cudagraph_unsafe,)  # Python runs in them at every replay


def number(engine: Any) -> int:
    """A number of its own for an engine, under which the operators find it."""
    n = next(_numbers)
    ENGINES[n] = engine
    return n


def tracing(engine: Any, rows: int) -> bool:
    """True while a graph of `rows` query rows is made that may hold the operators; elsewhere it ends at our own code."""
    inside = engine.one_graph(rows) and engine.call is not None
    return torch.compiler.is_compiling() and inside and not torch.is_grad_enabled()


@torch.library.custom_op("vlm_fix::enter", mutates_args=(), tags=TAGS)
def _enter(
    ids: torch.Tensor, mask: torch.Tensor | None, past: torch.Tensor | None, start: int, engine: int
) -> torch.Tensor:
    ENGINES[engine].enter_compiled(ids, mask, start if past is None else int(past))
    return ids.clone()


@torch.library.custom_op("vlm_fix::through", mutates_args=(), tags=TAGS)
def _through(x: torch.Tensor, engine: int, what: str, layer: int) -> torch.Tensor:
    new = ENGINES[engine].callbacks[what, layer](x)
    return x.clone() if new is None or new.data_ptr() == x.data_ptr() else new  # an operator's output is a new tensor


@torch.library.custom_op("vlm_fix::attention", mutates_args=(), tags=TAGS)
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    is_causal: bool | None,
    softcap: float | None,
    engine: int,
    layer: int,
) -> torch.Tensor:
    kwargs = {"sliding_window": sliding_window, "is_causal": is_causal, "softcap": softcap}
    function = ENGINES[engine].attention_functions[layer]
    return function(query, key, value, mask, scaling=scaling, **kwargs)[0].contiguous()


_enter.register_fake(lambda ids, *rest: torch.empty_like(ids))
_through.register_fake(lambda x, *rest: torch.empty_like(x))
_attention.register_fake(
    lambda query, key, value, *rest: query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
)


def enter(engine: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`Engine._enter` in a graph: input_ids pass through the operator, which runs before everything that needs them."""
    ids = args[0] if args else kwargs["input_ids"]
    cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
    past = 0 if cache is None else cache.get_seq_length()
    mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    lazy = isinstance(past, torch.Tensor)  # a static cache counts in a tensor
    new = _enter(ids, mask, past if lazy else None, 0 if lazy else past, engine.key)
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "input_ids": new})


def through(engine: Any, what: str, layer: int, x: torch.Tensor, rows: int) -> torch.Tensor | None:
    """engine.callbacks[what, layer](x): a tensor of `rows` query rows looked at or changed; None: as it was."""
    return _through(x, engine.key, what, layer) if tracing(engine, rows) else _look(engine, what, layer, x)


@uncompiled
def _look(engine: Any, what: str, layer: int, x: torch.Tensor) -> torch.Tensor | None:
    return engine.callbacks[what, layer](x)


def attention(
    handle: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The attention function in a graph; what SDPA does not look at is left out of kwargs."""
    known = (kwargs.get(name) for name in ("sliding_window", "is_causal", "softcap"))
    return _attention(query, key, value, mask, scaling, *known, handle.engine.key, handle.layer)
