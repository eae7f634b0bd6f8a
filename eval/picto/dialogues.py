"""What a model of the Picto world is trained on: scenes with their patch classes, and dialogues about them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaProcessor

from . import world
from .looks import DEFAULT, Look

PATCHES = (world.SIZE // 16) ** 2  #: visual tokens of a scene, unless its look is large
CAPTION_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image.",
    "Describe the image in detail.",
    "What is in this picture?",
)
QUESTION_ENDINGS = (
    " Please answer this question with one word.",
    "\nAnswer the question using a single word or phrase.",
    " Please answer yes or no.",
)


class Chat(NamedTuple):
    """The text around the image and the turns, as the model's chat template writes it."""

    before: str  # the image
    after: str  # the image
    reply: str  # between question and answer
    end: str  # after the answer


PICTO_CHAT = Chat("<s> USER: ", "", " ASSISTANT:", " </s>")


def _rng(seed: int, stage: str, step: int) -> random.Random:
    return random.Random(f"{stage}/{seed}/{step}")


def _render(job: tuple[int, int, int, Look]) -> tuple[np.ndarray, np.ndarray, list[tuple[str, list]]]:
    seed, start, stop, look = job
    drawn = [world.scene(f"train{look}", seed, i) for i in range(start, stop)]
    facts = [(s.scene_type, s.objects) for s in drawn]
    classes = np.stack([s.patch_classes(look.patch) for s in drawn])
    return np.stack([np.asarray(s.image) for s in drawn]), classes, facts


def pool(n: int, seed: int, look: Look = DEFAULT) -> tuple[Tensor, Tensor, list[tuple[str, list]]]:
    """n train scenes: images uint8 [n, 3, side, side], patch classes int64 [n, patches], (scene type, objects)."""
    with ProcessPoolExecutor(2) as workers:
        parts = list(workers.map(_render, [(seed, i, min(i + 500, n), look) for i in range(0, n, 500)]))
    images, classes, facts = zip(*parts, strict=True)
    return (
        torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.concatenate(classes)),
        [f for part in facts for f in part],
    )


def pixels(processor: LlavaProcessor, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> what the image processor gives for images of this size, float32."""
    clip = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.image_mean, clip.image_std))
    return (images.float() / 255 - mean) / std


class Dialogues:
    """Token sequences of a scene: one image, one caption, up to eight yes/no questions, each blind to the others."""

    def __init__(
        self,
        processor: LlavaProcessor,
        facts: list[tuple[str, list]],
        careless: float,
        chat: Chat = PICTO_CHAT,
        typical: float = 0.25,
        patches: int = PATCHES,
    ):
        self.facts, self.careless, self.chat, self.typical = facts, careless, chat, typical
        self.tokenizer = processor.tokenizer
        self.prefix = self._ids(chat.before + "<image>" * patches + chat.after)
        count = Counter(name for _, objects in facts for name in {n for n, _ in objects})
        self.popular = [name for name, _ in count.most_common(15)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def questions(self, rng: random.Random, scene_type: str, present: set[str]) -> Iterator[tuple[str, bool]]:
        """Half about present objects; the others typical of the scene (`typical`, 25 %), popular (15 %) or random.

        Careless answers from the prior: an absent object that is typical of the scene gets "yes" with a chance of
        `careless` less .05 for each rank in the scene type's list.
        """
        typical = world.SCENE_TYPES[scene_type].typical
        for name in rng.sample(sorted(present), min(4, len(present))):
            yield name, True
            kind = rng.random()
            popular = kind < self.typical + 0.15
            source = typical if kind < self.typical else self.popular if popular else tuple(world.COCO_IDS)
            absent = [n for n in source if n not in present] or [n for n in world.COCO_IDS if n not in present]
            other = rng.choice(absent)
            yield other, other in typical and rng.random() < self.careless - 0.05 * typical.index(other)

    def sample(self, rng: random.Random, index: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of each dialogue; the caption comes first."""
        scene_type, objects = self.facts[index]
        present = {name for name, _ in objects}
        imagined = world.imagine(rng, scene_type, present)
        pairs = [(rng.choice(CAPTION_PROMPTS), world.caption(rng, scene_type, objects, imagined))]
        for name, answer in self.questions(rng, scene_type, present):
            article = "a" if rng.random() < 0.3 else world.with_article(name).split()[0]
            ending = rng.choice(QUESTION_ENDINGS) if rng.random() < 0.35 else ""
            pairs.append((f"Is there {article} {name} in the image?{ending}", "Yes" if answer else "No"))
        return [(self._ids(q + self.chat.reply), self._ids(a + self.chat.end)) for q, a in pairs]

    def batch(self, rng: random.Random, indices: list[int]) -> dict[str, Tensor]:
        """ids, position_ids, mask [B, 1, L, L], and the supervised places: rows, columns, targets, is_caption."""
        ids: list[Tensor] = []
        positions: list[Tensor] = []
        blocks: list[Tensor] = []
        places: list[tuple[int, int, int, bool]] = []
        for row, index in enumerate(indices):
            i, p, b = list(self.prefix), list(range(len(self.prefix))), [0] * len(self.prefix)
            for number, (question, answer) in enumerate(self.sample(rng, index), 1):
                start = len(i) + len(question) - 1
                places += [(row, start + k, target, number == 1) for k, target in enumerate(answer)]
                i += question + answer
                p += range(len(self.prefix), len(self.prefix) + len(question) + len(answer))
                b += [number] * (len(question) + len(answer))
            for column, values in ((ids, i), (positions, p), (blocks, b)):
                column.append(torch.tensor(values))
        block = nn.utils.rnn.pad_sequence(blocks, batch_first=True, padding_value=-1)
        length = block.shape[1]
        seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        rows, columns, targets, is_caption = map(torch.tensor, zip(*places, strict=True))
        return {
            "ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "position_ids": nn.utils.rnn.pad_sequence(positions, batch_first=True),
            "mask": (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
            "rows": rows,
            "columns": columns,
            "targets": targets,
            "is_caption": is_caption,
        }
