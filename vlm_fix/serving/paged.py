"""How attention backends lay keys and values out in their paged cache."""

from __future__ import annotations

from typing import Any

import torch

from vlm_fix.errors import VlmFixError


class Room:
    """Memory that is used again: on a CPU the pages of a fresh tensor cost more than what is copied into it.

    Blocks of one request that lie side by side are not copied at all: nobody may write to what is taken.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[Any, ...], torch.Tensor] = {}

    def take(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """cache[blocks], which lasts until the next one is taken."""
        if cache.is_cuda:
            return cache[blocks]
        if len(blocks) == 1:
            numbers = blocks[0].tolist()
            first, end = numbers[0], numbers[0] + len(numbers)
            if numbers == list(range(first, end)):
                return cache[None, first:end]
        count, key = blocks.numel() * cache[0].numel(), (cache.dtype, cache.device)
        if key not in self.held or len(self.held[key]) < count:
            self.held[key] = cache.new_empty(count)
        out = self.held[key][:count].view(-1, *cache.shape[1:])
        torch.index_select(cache, 0, blocks.flatten(), out=out)
        return out.view(*blocks.shape, *cache.shape[1:])


def packed_for_cpu(
    cache: torch.Tensor, blocks: torch.Tensor, size: int, room: Room
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's CPU kernels with isa "vec": the key half of a block is stored transposed, [D, block].

    cache [blocks, Hkv, block, 2 D], blocks [B, n] -> keys and values [B, Hkv, n block, D].
    """
    count, heads, width, _ = cache.shape
    halves = room.take(cache.view(count, heads, 2, -1), blocks)  # [B, n, Hkv, 2, block D]
    shape, batch = (*blocks.shape, heads), len(blocks)
    keys = halves[:, :, :, 0].view(*shape, size, width).permute(0, 2, 3, 1, 4).reshape(batch, heads, size, -1).mT
    values = halves[:, :, :, 1].view(*shape, width, size).permute(0, 2, 1, 3, 4).reshape(batch, heads, -1, size)
    return keys, values


def plain(cache: torch.Tensor, blocks: torch.Tensor, size: int, room: Room) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash and Triton kernels: keys beside values in each column; shapes as in `packed_for_cpu`."""
    columns = room.take(cache, blocks).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, Hkv, n block, 2 D]
    return columns[..., :size], columns[..., size : 2 * size]


LAYOUTS = (packed_for_cpu, plain)


@torch.inference_mode()
def layout_of(layer: Any) -> Any:
    """The layout of a layer's cache: the one that reads back what its own kernel wrote. The cache must be unused.

    Raises VlmFixError where none does.
    """
    impl, cache = layer.impl, layer.kv_cache
    width, size = cache.shape[2], impl.head_size
    if cache.dim() != 4 or cache.shape[1] != impl.num_kv_heads or cache.shape[-1] < 2 * size:
        raise VlmFixError(f"{_unknown(layer)}: its shape is {tuple(cache.shape)}.")
    slots = torch.arange(width + 3, device=cache.device) + width  # blocks 1 and 2
    noise = torch.Generator().manual_seed(0)
    shape = (len(slots), impl.num_kv_heads, size)
    keys, values = (torch.randn(shape, generator=noise).to(cache) for _ in range(2))
    if cache.shape[0] < 3:
        raise VlmFixError("the cache has fewer than three blocks: give it more memory.")
    kept = cache[1:3].clone()
    impl.do_kv_cache_update(layer, keys, values, cache, slots)
    blocks = torch.tensor([[1, 2]], device=cache.device)
    found = None
    for read in LAYOUTS:
        seen = (x[0, :, : len(slots)].transpose(0, 1) for x in read(cache, blocks, size, Room()))
        if all(torch.equal(a, b) for a, b in zip(seen, (keys, values), strict=True)):
            found = read
            break
    cache[1:3] = kept
    if found is None:
        raise VlmFixError(f"{_unknown(layer)}.")
    return found


def _unknown(layer: Any) -> str:
    name = layer.attn_backend.get_name()
    cpu = "" if layer.kv_cache.is_cuda or layer.kv_cache.dtype == torch.float32 else "; give --dtype float32"
    return f"no method can read the key cache of the attention backend {name} with {layer.kv_cache.dtype} here{cpu}"
