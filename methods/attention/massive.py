"""Massive activations: the dimensions of a hidden state that tower over its root mean square in sink tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix.arch import Arch
from vlm_fix.families import arch_of, get_part
from vlm_fix.hooks import hooked
from vlm_fix.sample import Sample
from vlm_fix.session import PAD
from vlm_fix.tensors import one_stream

# (family, text model, hidden size, layers, words of the tokenizer) -> massive-activation dimensions: LLaVA-1.5-7B and 13B
# by the official code, Qwen2-VL-7B and InternVL2-8B by a table elsewhere
SINK_DIMS = {
    ("llava", "llama", 4096, 32, 32000): (1415, 2533),
    ("llava", "llama", 5120, 40, 32000): (2100, 4743),
    ("qwen2_vl", "qwen2_vl_text", 3584, 28, 151643): (458, 2570),
    ("internvl", "llama", 4096, 32, 92544): (3584,),
}


def known_dims(arch: Arch) -> tuple[int, ...] | None:
    """The dimensions that are known of a model."""
    sizes = (arch.family.name, arch.text_type, arch.hidden, arch.depth)
    vocab = range(arch.vocab - 511, arch.vocab + 1)  # it may be padded
    return next((dims for (*key, words), dims in SINK_DIMS.items() if (*key,) == sizes and words in vocab), None)


def ratios(x: torch.Tensor) -> torch.Tensor:
    """|x_d| / rms(x) of hidden states [..., C], float32."""
    x = x.float()
    return x.abs() / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def first_dims(
    ratio: torch.Tensor, types: torch.Tensor, start: int, tau: float, known: torch.Tensor | None
) -> torch.Tensor:
    """[B, C] True where the first real token exceeds tau: ratio [B, q, C] of the columns from `start` on, types [B, n].

    A row whose first token is not among these columns keeps what is `known` of it.
    """
    first = (types != PAD).int().argmax(dim=1) - start  # not yet here while a row is padding alone
    begins = ((first >= 0) & (types != PAD).any(dim=1))[:, None]
    dims = ratio[torch.arange(len(ratio), device=ratio.device), first.clamp(min=0)] > tau
    return torch.where(begins, dims, torch.zeros_like(dims) if known is None else known)


@torch.no_grad()
def massive_ratios(
    model: Any, layers: Sequence[int], samples: Sequence[Sample], progress: Callable[[str, float], None]
) -> torch.Tensor:
    """[len(layers), C]: |x_d| / rms(x) of the first token's hidden state at each layer's input, mean over the samples."""
    arch = arch_of(model)
    modules, total = get_part(model, arch.family.language).layers, torch.zeros(len(layers), arch.hidden)

    def look(row: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = one_stream(args[0] if args else kwargs["hidden_states"], "var")[0, 0]
        total[row] += ratios(x.cpu()) / len(samples)

    looks = [(modules[i], functools.partial(look, row)) for row, i in enumerate(layers)]
    with hooked([module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in looks]):
        for n, sample in enumerate(samples):
            model(**sample.inputs)
            progress("massive activations", (n + 1) / len(samples))
    return total
