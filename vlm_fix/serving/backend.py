"""vLLM's attention backends with the edited rows written over their output.

The platform's own kernels run for all rows of the batch; without a method nothing else happens.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import worker
from .beside import BesideForward
from .settings import Settings

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
        step = getattr(attn_metadata, "vlm_fix_step", None)
        made = output
        if step is None or not step.replaces(layer, self, query):
            made = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        if step is not None:
            step.edit(layer, self, query, key, value, kv_cache, attn_metadata.block_table, output)
        return made


class NotingBuilder:
    """Mixed into a backend's metadata builder: the metadata of a step say which rows belong to which request."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """No full graphs where a method is served: their replay runs no Python. Pieces between attention layers may be graphs."""
        if Settings.read(vllm_config.additional_config) is None:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        from vllm.v1.attention.backend import AttentionCGSupport

        return AttentionCGSupport.NEVER

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
    noting = type(f"Noting{builder.__name__}", (NotingBuilder, builder), {})
    members = {"get_impl_cls": staticmethod(lambda: impl), "get_builder_cls": staticmethod(lambda: noting)}
    return type(f"Editing{cls}", (base,), members)


def __getattr__(name: str) -> type:
    """vLLM resolves "vlm_fix.serving.backend.CPU_ATTN" when it chooses that backend."""
    if name not in MADE:
        raise AttributeError(name)
    globals()[name] = _made(name)
    return globals()[name]
