"""vLLM's attention backends with the edited rows written over their output.

The platform's own kernels run for all rows of the batch; without a method nothing else happens.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import worker
from .beside import BesideForward

MADE: dict[str, tuple[str, str]] = {
    "CPU_ATTN": ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend"),
    "FLASH_ATTN": ("vllm.v1.attention.backends.flash_attn", "FlashAttentionBackend"),
    "TRITON_ATTN": ("vllm.v1.attention.backends.triton_attn", "TritonAttentionBackend"),
}
"""Backends that are served -> where vLLM has them."""


class EditingImpl:
    """Mixed into a backend's implementation."""

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attn_metadata, BesideForward):
            attn_metadata.attend(layer, self, query, key, value, output)
            return output
        result = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        step = getattr(attn_metadata, "vlm_fix_step", None)
        if step is not None:
            step.edit(layer, self, query, kv_cache, attn_metadata.block_table, output)
        return result


class NotingBuilder:
    """Mixed into a backend's metadata builder: the metadata of a step say which rows belong to which request."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        made = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)  # type: ignore[misc]
        served = worker.of(self.vllm_config)  # type: ignore[attr-defined]
        if served is not None and served.running:
            made.vlm_fix_step = served.step(common_attn_metadata)
        return made


def _made(name: str) -> type:
    module, cls = MADE[name]
    base: Any = getattr(importlib.import_module(module), cls)
    own, builder = base.get_impl_cls(), base.get_builder_cls()
    impl = type(f"Editing{own.__name__}", (EditingImpl, own), {})
    changes: dict[str, Any] = {}
    if hasattr(builder, "_cudagraph_support"):  # the replay of a full graph runs no Python
        changes["_cudagraph_support"] = importlib.import_module("vllm.v1.attention.backend").AttentionCGSupport.NEVER
    noting = type(f"Noting{builder.__name__}", (NotingBuilder, builder), changes)
    members = {"get_impl_cls": staticmethod(lambda: impl), "get_builder_cls": staticmethod(lambda: noting)}
    return type(f"Editing{cls}", (base,), members)


def __getattr__(name: str) -> type:
    """vLLM resolves "vlm_fix.serving.backend.CPU_ATTN" when it chooses that backend."""
    if name not in MADE:
        raise AttributeError(name)
    globals()[name] = _made(name)
    return globals()[name]
