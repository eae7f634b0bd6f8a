"""A prompt about an image in the model's own form, with its start token once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def chat(processor: Any, prompt: str) -> str:
    """A prompt about one image in the model's chat template."""
    words = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)


def starts_itself(processor: Any, text: str) -> bool:
    """True if the template already writes the start token, so that the tokenizer must not."""
    bos = processor.tokenizer.bos_token
    return bos is not None and text.startswith(bos)


def without_start(processor: Any, prompt: str) -> str:
    """What `chat` returns, for a tokenizer that writes the start token and cannot be told not to, as vLLM's."""
    text = chat(processor, prompt)
    return text.removeprefix(processor.tokenizer.bos_token) if starts_itself(processor, text) else text


def encode(model: Any, processor: Any, images: Sequence[Any], prompts: Sequence[str]) -> Any:
    """Encode (image, prompt) pairs with the model's chat template as a left-padded batch on the model's device."""
    texts = [chat(processor, prompt) for prompt in prompts]
    return processor(
        images=[[image] for image in images],
        text=texts,
        padding=True,
        return_tensors="pt",
        **({"add_special_tokens": False} if starts_itself(processor, texts[0]) else {}),
    ).to(model.device, model.dtype)
