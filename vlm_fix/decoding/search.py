"""What a Procedure's own search works with: prompts with their cache, which it extends, copies and rolls back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import prompt_positions
from vlm_fix.families.compat import cache_of, detach, with_cache
from vlm_fix.memory import Memory
from vlm_fix.method import Method
from vlm_fix.pruning.cache import ShortLayer
from vlm_fix.wing import Host

M = TypeVar("M", bound=Memory)


@dataclass
class Search:
    """One generate call of a Procedure: a left-padded batch of B prompts, and what generate prepared for it."""

    host: Host
    call: Call
    prompt: torch.Tensor  # [B, L] token ids
    processors: Callable[..., torch.Tensor]  # user's and configuration's: (ids [n, L + t], scores [n, V]) -> scores
    stopping: Callable[..., torch.Tensor]  # (ids [n, L + t], None) -> [n] booleans
    config: GenerationConfig
    streamer: Any
    inputs: dict[str, Any]  # the model's other inputs

    def prefill(self) -> tuple[Sequences, torch.Tensor]:
        """The prompts in a cache, and the logits [B, V] after them."""
        model = self.host.model
        inputs = model.prepare_inputs_for_generation(self.prompt, is_first_iteration=True, **self.inputs)
        cache = cache_of(inputs)
        if cache is None:
            cache = DynamicCache(config=model.config.get_text_config())
        out = model(**with_cache(inputs, cache), return_dict=True)
        _, position = prompt_positions(model, self.host.family, self.call.inputs)
        mask = self.call.inputs["attention_mask"].to(self.prompt.device)
        return Sequences(self.host, cache, mask, position), out.logits[:, -1].float()

    def greedy(self, prompt: torch.Tensor, sequence: Sequences, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
        """(score, tokens [t]) of the model's own greedy answer to one prompt [1, L] whose first token has `logits` [1, V].

        score: the log-probabilities' sum / length ** length_penalty, as in `beam_step`.
        """
        ids, score = prompt, 0.0
        penalty = 1.0 if self.config.length_penalty is None else self.config.length_penalty
        while True:
            z = self.processors(ids, logits)
            new = z.argmax(dim=-1, keepdim=True)
            score += float(z.log_softmax(dim=-1).gather(1, new))
            ids = torch.cat([ids, new], dim=1)
            if bool(self.stopping(ids, None).all()):
                tokens = ids[0, prompt.shape[1] :]
                return score / len(tokens) ** penalty, tokens
            logits = sequence.forward(new)

    def beam_step(
        self, prompt: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor, z: torch.Tensor, done: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[float, torch.Tensor]]]:
        """One step of beam search for one prompt: n beams tokens [n, t] with `scores` [n] and next logits z [n, V].

        Returns tokens [n, t + 1], scores, the beams they come from (all empty if the search is over), and the up to n
        finished answers, best first, as (score / length ** length_penalty, tokens).
        """
        count, length, penalty = len(tokens), tokens.shape[1] + 1, self.config.length_penalty
        penalty = 1.0 if penalty is None else penalty
        log_p = self.processors(torch.cat([prompt, tokens], dim=1), z.log_softmax(dim=-1))
        best, flat = (scores[:, None] + log_p).view(-1).topk(2 * count)
        parents, new = flat // z.shape[1], flat % z.shape[1]
        tokens = torch.cat([tokens[parents], new[:, None]], dim=1)
        ends = self.stopping(torch.cat([prompt[:1].expand(len(tokens), -1), tokens], dim=1), None).to(best.device)
        finished = [(float(best[i]) / length**penalty, tokens[i]) for i in range(count) if ends[i]]
        done = sorted([*done, *finished], key=lambda d: -d[0])[:count]
        attainable = float(best[0]) / length**penalty
        full = len(done) == count and (self.config.early_stopping is True or done[-1][0] >= attainable)
        keep = (~ends).nonzero()[: 0 if full else count, 0]
        left = len(keep)
        keep = keep[[min(i, left - 1) for i in range(count if left else 0)]]
        scores = best[keep]
        scores[left:] = -1e9  # with several ends there may be too few that go on
        return tokens[keep], scores, parents[keep], done

    @property
    def pad(self) -> int:
        """The id that fills up finished rows."""
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        return pad if pad is not None else eos[0] if isinstance(eos, list) else eos if eos is not None else 0

    def output(self, answers: list[torch.Tensor], **more: Any) -> Any:
        """Answers [t_b], one for each prompt -> what generate returns; `more` are further fields of its output class."""
        width = max(len(a) for a in answers)
        rows = [torch.nn.functional.pad(a, (0, width - len(a)), value=self.pad) for a in answers]
        sequences: Any = torch.cat([self.prompt, torch.stack(rows)], dim=1)
        if not self.config.return_dict_in_generate:
            return sequences
        kind = GenerateBeamDecoderOnlyOutput if "sequences_scores" in more else GenerateDecoderOnlyOutput
        return kind(sequences=sequences, **more)


@dataclass
class Sequences:
    """n sequences with a cache of their own: `mask` [n, L] and next `position` [n] are the prompts'."""

    host: Host
    cache: Any  # a DynamicCache
    mask: torch.Tensor
    position: torch.Tensor
    length: int = 0  # generated tokens in the cache

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [n, k]; the logits [n, V] after the last one."""
        new = torch.ones(len(tokens), self.length + tokens.shape[1], dtype=self.mask.dtype, device=tokens.device)
        places = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)
        return self._step(tokens, torch.cat([self.mask, new], dim=1), places, 1)[:, -1]

    def side_by_side(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append k tokens [n, k] that stand in one place and do not see each other; the logits [n, k, V] after each.

        `keep` or `crop` must follow. Only where no other method is active: it would take them for k places.
        """
        count, device = tokens.shape[1], tokens.device
        past = torch.cat([self.mask.bool(), self.mask.new_ones(len(tokens), self.length).bool()], dim=1)
        seen = past[:, None].expand(-1, count, -1)
        own = torch.eye(count, dtype=torch.bool, device=device).expand(len(tokens), -1, -1)
        places = torch.full((count,), self.length, device=device)
        return self._step(tokens, torch.cat([seen, own], dim=2)[:, None], places, count)

    def keep(self, rows: torch.Tensor, ranks: torch.Tensor, count: int) -> None:
        """After `side_by_side` of `count` tokens, row i becomes what row rows[i] was with its token ranks[i]."""
        for layer in self.cache.layers:
            layer.keys, layer.values = (_kept(x, rows, ranks, count) for x in (layer.keys, layer.values))
        self.length -= count - 1

    def _step(self, tokens: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, logits: int) -> torch.Tensor:
        """The last `logits` rows of logits [n, k, V] of tokens [n, k] at `places` [k] of the answer."""
        positions = self.position.to(tokens.device)[:, None] + places
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": positions.expand(3, -1, -1) if self.host.family.mrope else positions,
            "use_cache": True,
            "logits_to_keep": logits,
        }
        out = self.host.model(**with_cache(inputs, self.cache))
        self.length += tokens.shape[1]
        detach(self.cache)  # a differentiated step must not reach into the next one
        return out.logits[:, -logits:].float()

    def crop(self, count: int) -> None:
        """Take the last `count` tokens off again."""
        if count:
            self.cache.crop(-count)
            self.length -= count

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was; rows of one prompt only."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]

    def take(self, rows: torch.Tensor) -> Sequences:
        """Copies of the given rows, with a cache of their own."""
        cache = DynamicCache(config=self.host.model.config.get_text_config())
        for i, layer in enumerate(self.cache.layers):
            here = rows.to(layer.keys.device)
            cache.update(layer.keys.index_select(0, here), layer.values.index_select(0, here), i)
            if isinstance(layer, ShortLayer):
                cache.layers[i] = ShortLayer.of(cache.layers[i], layer.dropped)
        self.host.sessions[cache] = self.host.sessions[self.cache].take(rows)
        return Sequences(self.host, cache, self.mask[rows], self.position[rows.to(self.position.device)], self.length)

    def memory(self, method: Method, kind: type[M]) -> M:
        """What `method` remembers, as of the last forward."""
        return self.host.sessions[self.cache].memory(method, kind)

    def need_gradients(self, name: str) -> None:
        """VlmFixError if a step cannot be differentiated, because the cache overwrites what it was computed from."""
        if any(x is not None for layer in self.cache.layers for x in getattr(layer, "recurrent_states", {}).values()):
            raise VlmFixError(
                f"{name} differentiates each step, which linear attention, whose running states are overwritten, rules out."
            )

    def need_rollback(self, name: str) -> None:
        """VlmFixError if the cache cannot forget tokens."""
        if not self.host.keeps_columns(self.cache):
            raise VlmFixError(
                f"{name} rolls its cache back, which sliding-window, linear attention and cross-attention layers cannot do."
            )


def _kept(x: torch.Tensor, rows: torch.Tensor, ranks: torch.Tensor, count: int) -> torch.Tensor:
    """Keys or values [n, H, K, D] whose last `count` columns stand side by side -> [m, H, K - count + 1, D]."""
    rows, ranks, past = rows.to(x.device), ranks.to(x.device), x.shape[2] - count
    own = x[rows, :, past + ranks]
    return torch.cat([x[:, :, :past].index_select(0, rows), own[:, :, None]], dim=2)
